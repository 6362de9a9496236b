"""Another projector between the vision tower and the language model: trained, saved, and opened again.

python examples/other_projector.py
"""

import numpy as np
import torch
from torch import nn

import paligemma


def projector(config: paligemma.PaliGemmaConfig) -> nn.Module:
    """Two layers with a GELU between them, as in LLaVA, in the place of PaliGemma's single layer."""
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
    return nn.Sequential(nn.Linear(vision, text), nn.GELU(), nn.Linear(text, text))


config = paligemma.load("tiny").model.config
new = projector(config)  # the checkpoint has no weights for it, so it keeps its own
pg = paligemma.load("tiny", dtype="float32", extra={"multi_modal_projector": new})

image = np.full((64, 64, 3), 200, np.uint8)
inputs = pg.processor(text=["caption en"], images=[image], suffix=["a gray square"])
inputs = {name: tensor.to(pg.model.device) for name, tensor in inputs.items()}
optimizer = torch.optim.AdamW(new.parameters(), lr=1e-3)
for step in range(5):
    loss = pg.model(**inputs).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

paligemma.save_pretrained(pg.model, "runs/other_projector", pg.processor, extra=["multi_modal_projector"])
again = paligemma.load("runs/other_projector", extra={"multi_modal_projector": projector(config)})  # with its weights
print(again.caption(image).text)
