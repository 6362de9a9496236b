"""A LoRA adapter on disk.

save_adapter(model, "runs/mine", "google/paligemma2-3b-pt-224")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from paligemma.checkpoints import folder_written_whole
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(
    model: PaliGemmaForConditionalGeneration,
    folder: str | os.PathLike[str],
    base_name: str | os.PathLike[str],
    processor: Any = None,
) -> None:
    """Writes what LoRA has learned (`train.parts.add_lora`), as peft writes and loads it beside transformers' model.

    base_name: the model that LoRA was added to: a hub id, a folder, "tiny". processor: whose files are written too.
    Raises ValueError for a model without LoRA, OSError when the files cannot be written; then what was there is left.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if not hasattr(model, "peft_config"):
        raise ValueError("the model has no LoRA to save: `save_pretrained` writes all of its weights")
    learned: Any = model  # with peft's attributes
    (config,) = learned.peft_config.values()
    state = get_peft_model_state_dict(learned, save_embedding_layers=False)
    tensors = {"base_model.model." + their_name(key): value.cpu().contiguous() for key, value in state.items()}
    base = str(base_name)
    if base != "tiny" and Path(base).expanduser().exists():
        base = str(Path(base).expanduser().resolve())  # so that it is found from everywhere
    with folder_written_whole(Path(folder)) as place:
        if processor is not None:
            processor.save_pretrained(place)
        save_file(tensors, place / TENSORS, metadata={"format": "pt"})
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(place)


def their_name(name: str) -> str:
    """The name of a module or parameter of ours in transformers' model."""
    for tower in ("vision_tower.vision_model.", "language_model.model."):
        if name.startswith(tower):
            name = tower.partition(".")[0] + "." + name.removeprefix(tower)
    return "model." + name
