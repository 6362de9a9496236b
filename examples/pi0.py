"""A robot policy on top of PaliGemma, as pi0 (arXiv 2410.24164): it moves noise towards the robot's next actions.

PaliGemma reads pictures and instruction, which see each other, once. A narrower Gemma, the action expert, runs at every
step and also attends to the keys and values that PaliGemma left in each layer. (Its weights are random here.)
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

import paligemma


class Pi0(nn.Module):
    def __init__(self, model: paligemma.PaliGemmaForConditionalGeneration, width=1024, numbers=32, horizon=50):
        super().__init__()
        self.model, self.width, self.horizon, self.text = model, width, horizon, model.config.text_config
        expert = replace(self.text, hidden_size=width, intermediate_size=4 * width)
        self.expert = paligemma.GemmaModel(expert, embedding=False)
        self.state, self.action_in = nn.Linear(numbers, width), nn.Linear(numbers, width)
        self.action_out = nn.Linear(width, numbers)
        self.with_time = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def read(self, input_ids: Tensor, image_features: Tensor, valid: Tensor) -> paligemma.KVCache:
        """Pictures and instruction, int64 and bool [B, S]: their keys and values, with room for state and actions."""
        x = self.model.embed(input_ids, image_features)
        cache = paligemma.KVCache(self.text, len(x), x.shape[1] + 1 + self.horizon, x.dtype, x.device)
        mask = valid[:, None, None] & valid[:, None, :, None] | torch.diag_embed(~valid)[:, None]  # padding sees itself
        places = (valid.cumsum(-1) - 1).clamp(min=0)
        self.model.read(inputs_embeds=x, attention_mask=valid, mask=mask, position_ids=places, cache=cache)
        return cache

    def velocity(self, cache: paligemma.KVCache, state: Tensor, actions: Tensor, time: float) -> Tensor:
        """Where the actions [B, horizon, numbers] move at a time from 1 (noise) to 0. The cache is left as it was."""
        periods = 4e-3 * 1000 ** torch.linspace(0, 1, self.width // 2, device=actions.device)
        waves = (2 * math.pi * time / periods).expand(*actions.shape[:2], -1).to(actions.dtype)
        timed = torch.cat([self.action_in(actions), waves.sin(), waves.cos()], dim=-1)
        x = torch.cat([self.state(state)[:, None], self.with_time(timed)], dim=1)  # [B, 1 + horizon, width]
        places = cache.extend(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        mask = cache.valid[:, None, None, : cache.used].repeat(1, 1, x.shape[1], 1)
        mask[:, :, 0, 1 - x.shape[1] :] = False  # the state does not see the actions
        out = self.expert(x, places, {None: mask}, cache)
        cache.rewind(x.shape[1])
        return self.action_out(out[:, 1:])

    @torch.no_grad()
    def act(self, input_ids, image_features, valid, state, noise, steps=10) -> Tensor:
        cache, actions = self.read(input_ids, image_features, valid), noise  # [B, horizon, numbers]
        for step in range(steps):
            actions = actions - self.velocity(cache, state, actions, 1 - step / steps) / steps
        return actions


if __name__ == "__main__":
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    given = pg.processor(text=["pick up the book"], images=["examples/scene.png"])
    row = given["input_ids"], pg.model.encode_image(given["pixel_values"]), given["attention_mask"].bool()
    print(Pi0(pg.model, width=64, numbers=7).act(*row, torch.zeros(1, 7), torch.randn(1, 50, 7)).shape)
