"""One picture, a dozen questions: the batches with which the decoder learns to speak.

PaliGemma lets the image tokens read the prompt, so every prompt needs the image tokens once more, and those are three
quarters of a row. Most training batches therefore *pack*: several rows of one picture share its image tokens, which
then see each other alone.

        i i p s p s        i image, p prompt, s answer; two rows
    i   1 1 0 0 0 0
    i   1 1 0 0 0 0
    p   1 1 1 0 0 0
    s   1 1 1 1 0 0
    p   1 1 0 0 1 0
    s   1 1 0 0 1 1

Every row has the positions it would have alone. Every other step (`alone`) has the true mask, a row at a time, so
that the model also learns to work as it will be used.

Answers hold 1 to 60 tokens. Means over tokens would hide the one-word answers, means over rows the boxes: a token of
a row of n answer tokens has the weight n^-0.5. A location's target is spread over its neighbours (sigma 0.8 bins):
being off by one is nearly right. So is a mask code whose vector is like the right one's.

A model that only ever reads right codes behind it learns to trust them, and when its own first ones are wrong it draws
what fits them instead of what it sees. So it reads wrong ones now and then (`misread`), with the right ones as targets.

Letters: B pictures (or rows), S length, V vocabulary, D width.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paligemma.answers.mask_codec import MaskCodec
from paligemma.tiny import rows as world_rows
from paligemma.tiny import world
from paligemma.tiny.recipe.codec import alike_codes, mask_codes
from paligemma.tiny.recipe.scenes import SHARD, Shard, shard_paths
from paligemma.tiny.recipe.vision_first import pixels, targets_of, varied
from paligemma.tokenizer import Tokenizer
from paligemma.train.loop import LossFunction

BIN_STEP = 8
PACKED_TOKENS = 208  # text tokens beside a picture
ROWS_ALONE = 3  # rows of a picture in a step with the true mask

# How often which task is drawn, where the scene allows it.
TASK_WEIGHTS = {
    "caption": 1.4,
    "what": 0.4,
    "largest": 0.6,
    "color": 0.8,
    "background": 0.1,
    "exists": 1.6,
    "count": 1.6,
    "count_all": 0.7,
    "left_right": 0.8,
    "left_of": 1.4,
    "detect_one": 1.8,
    "detect_all": 1.6,
    "detect_absent": 0.4,
    "segment": 4.0,
    "ocr": 2.4,
}


class TalkBatches:
    """Batches of pictures with rows, as a function of the step. `size` pictures a step, from four shards at a time."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        codec: MaskCodec,
        size: int,
        alone: int = 2,
        extra: int = 2,
        seed: int = 0,
    ):
        self.folder, self.tokenizer, self.codec, self.size, self.seed = folder, tokenizer, codec, size, seed
        self.alone = alone  # every so many steps one with the true mask
        self.extra = extra  # pictures without rows, for the patches' loss alone, to each with rows: they are cheap
        self.mixed = 4
        self.encode = lru_cache(maxsize=4096)(tokenizer.encode)
        self.letters = [tokenizer.encode(character)[0] for character in world.CHARACTERS]
        alike = alike_codes(codec).double().numpy()
        self.alike = alike / alike.sum(1, keepdims=True)  # sums of 1 to the precision that numpy asks for
        self.tasks = list(TASK_WEIGHTS)
        weights = np.array(list(TASK_WEIGHTS.values()))
        self.chances = weights / weights.sum()
        self._round: tuple[int, int] | None = None
        self._shards: list[tuple[Shard, np.ndarray, np.ndarray]] = []  # shard, codes, order of its scenes

    def __call__(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        share = self.size // parts // self.mixed
        round_, place = divmod(step, min(32, SHARD // share))
        if self._round != (round_, part):
            rng = np.random.default_rng([self.seed, round_, part, 2])
            paths = shard_paths(self.folder)
            chosen = [paths[i] for i in rng.choice(len(paths), self.mixed, replace=False)]
            self._shards = [(Shard.load(p), mask_codes(p, self.codec), rng.permutation(SHARD)) for p in chosen]
            self._round = round_, part
        rng = np.random.default_rng([self.seed, step, part, 3])
        alone = step % self.alone == self.alone - 1
        images, targets, sequences = [], [], []
        for shard, codes, order in self._shards:
            chosen_rows = order[place * share : (place + 1) * share]
            image, target = targets_of(shard, chosen_rows, np.zeros(share, bool), codes)
            images.append(image)
            targets.append(target)
            first = shard.first_object
            for i in chosen_rows:
                made = self._rows(shard.scene(i), codes[first[i] : first[i + 1]], rng, alone)
                sequences.extend([[row] for row in made] if alone else [made])
        for shard, codes, _ in self._shards:
            image, target = varied(shard, rng.integers(len(shard), size=self.extra * share), codes, rng)
            images.append(image)
            targets.append(target)
        batch = {name: torch.from_numpy(np.concatenate([t[name] for t in targets])) for name in targets[0]}
        batch["pixel_values"] = pixels(np.concatenate(images))
        talked_about = share * self.mixed
        batch["features"] = torch.tensor([talked_about, len(sequences) // talked_about])
        return batch | self._tensors(sequences, alone, rng)

    def _rows(
        self, scene: world.Scene, codes: np.ndarray, rng: np.random.Generator, alone: bool
    ) -> list[tuple[list[int], list[int]]]:
        """(prefix ids with <bos> and newline, suffix ids with <eos>) of rows drawn for this scene."""
        by_mask = {id(thing.mask): code for thing, code in zip(scene.objects, codes)}
        made: list[tuple[list[int], list[int]]] = []
        room, tries = PACKED_TOKENS, 0
        while tries < 60 and (len(made) < ROWS_ALONE if alone else room > 6):
            tries += 1
            task = self.tasks[int(np.searchsorted(np.cumsum(self.chances), rng.random()))]
            row = world_rows.sample_row(
                scene, task, rng, bin_step=BIN_STEP, encode_mask=lambda asked: [by_mask[id(mask)] for mask, _ in asked]
            )
            if row is None:
                continue
            prefix = [self.tokenizer.bos_token_id, *self.encode(row.prefix), self.tokenizer.newline_token_id]
            suffix = [*self.encode(row.suffix), self.tokenizer.eos_token_id]
            if len(prefix) + len(suffix) <= room:
                made.append((prefix, suffix))
                room -= 0 if alone else len(prefix) + len(suffix)
        while alone and len(made) < ROWS_ALONE:
            made.append(made[-1])
        return made

    def misread(self, suffix: list[int], rng: np.random.Generator) -> list[int]:
        """An answer as the model may read it while it writes it: in two of three some of the mask codes are replaced,
        half of these by alike ones; of a spelt answer a fifth of the letters."""
        first, codes = self.tokenizer.first_seg_id, len(self.alike)
        kinds = [0 <= token - first < codes for token in suffix]
        read = list(suffix)
        if any(kinds) and rng.random() < 2 / 3:
            share = rng.random()
            for i in (i for i, is_code in enumerate(kinds) if is_code and rng.random() < share):
                alike = rng.random() < 0.5
                read[i] = first + int(rng.choice(codes, p=self.alike[suffix[i] - first] if alike else None))
        elif all(token in self.letters for token in suffix[:-1]):
            for i in range(len(suffix) - 1):
                if rng.random() < 0.2:
                    read[i] = self.letters[int(rng.integers(len(self.letters)))]
        return read

    def _tensors(
        self, sequences: list[list[tuple[list[int], list[int]]]], alone: bool, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        P = world_patches()
        longest = max(sum(len(p) + len(s) for p, s in rows) for rows in sequences)
        B, S = len(sequences), P + longest
        ids = np.zeros((B, S), np.int64)
        row_of, places = np.full((B, S), -1, np.int64), np.zeros((B, S), np.int64)
        labels, weights, written = np.full((B, S), -100, np.int64), np.zeros((B, S), np.float32), np.zeros((B, S), bool)
        ids[:, :P], row_of[:, :P], places[:, :P] = self.tokenizer.image_token_id, 0, np.arange(P)
        for b, rows in enumerate(sequences):
            at = P
            for number, (prefix, suffix) in enumerate(rows, 1):
                middle, end = at + len(prefix), at + len(prefix) + len(suffix)
                ids[b, at:middle], ids[b, middle:end] = prefix, self.misread(suffix, rng)
                labels[b, middle:end], weights[b, middle:end] = suffix, len(suffix) ** -0.5
                written[b, middle:end] = True
                row_of[b, at:end], places[b, at:end] = number, P + np.arange(end - at)
                at = end
        arrays = {
            "input_ids": ids,
            "row": row_of,
            "place": places,
            "written": written,
            "labels": labels,
            "weights": weights,
        }
        batch = {name: torch.from_numpy(value) for name, value in arrays.items()}
        return batch | {"seen": packed_mask(batch["row"], batch["place"], batch["written"], alone)}


def world_patches() -> int:
    return 64


def packed_mask(row: Tensor, place: Tensor, written: Tensor, images_read: bool) -> Tensor:
    """The mask drawn above: bool [B, 1, S, S].

    row: int64 [B, S], 0 image, 1.. the rows, -1 padding; place: positions; written: bool, the answers. `images_read`:
    whether image tokens see the prompts too, which is the true mask where there is one row.
    """
    same_row = row[:, :, None] == row[:, None, :]
    in_order = place[:, None, :] <= place[:, :, None]
    own = same_row & (~written[:, None, :] | (written[:, :, None] & in_order))
    image_key = (row == 0)[:, None, :]
    seen = own | (image_key & (row >= 0)[:, :, None])
    if images_read:
        seen |= (row == 0)[:, :, None] & ((row > 0) & ~written)[:, None, :]
    return seen[:, None]


def smeared_cross_entropy(
    logits: Tensor, targets: Tensor, first_loc: int, sigma: float = 0.8, alike: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each token, [tokens, V] and [tokens] -> [tokens], with targets spread over what is nearly right.

    A location's target is a bell over the used bins around it, cut at three of them and at the ends of the axis.
    A mask code's is its row of `alike` [K, K], see `alike_codes`. The codes' tokens follow the 1,024 locations'.
    """
    logp = logits.float().log_softmax(-1)
    losses = -logp.gather(-1, targets[:, None])[:, 0]
    is_loc = (targets >= first_loc) & (targets < first_loc + 1024)
    reach = torch.arange(-3, 4)
    near = (targets[is_loc, None] - first_loc) // BIN_STEP + reach  # [locations, 7] in used bins
    share = torch.exp(-0.5 * (reach / sigma) ** 2) * ((near >= 0) & (near < 1024 // BIN_STEP))
    share = share / share.sum(-1, keepdim=True)
    near_ids = first_loc + BIN_STEP * near.clamp(0, 1024 // BIN_STEP - 1)
    losses = losses.masked_scatter(is_loc, -(share * logp[is_loc].gather(-1, near_ids)).sum(-1))
    if alike is None:
        return losses
    first_seg = first_loc + 1024
    is_seg = (targets >= first_seg) & (targets < first_seg + len(alike))
    seg_logp = logp[is_seg, first_seg : first_seg + len(alike)]
    return losses.masked_scatter(is_seg, -(alike[targets[is_seg] - first_seg] * seg_logp).sum(-1))


def talk_loss(first_loc: int, auxiliary: float = 0.3, sigma: float = 0.8) -> LossFunction:
    """The loss of `TalkBatches`' batches for a module with `.model` (PaliGemma) and `.heads` (PatchHeads)."""

    def loss(both: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float, dict[str, float]]:
        model = both.model
        patches = model.vision_tower(batch["pixel_values"])  # [n, P, vision width]
        talked_about, repeat = batch["features"].tolist()  # how many pictures have rows, and how many sequences each
        features = model.multi_modal_projector(patches[:talked_about])
        features = features.repeat_interleave(repeat, 0)
        x = model.embed(batch["input_ids"], features)
        offset = model.config.text_config.position_offset
        hidden = model.language_model.model(x, batch["place"] + offset, {None: batch["seen"]})  # [B, S, D]
        targets, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
        labelled = targets != -100
        targets, weights = targets[labelled], weights[labelled]
        logits = model.language_model.logits(hidden[:, :-1][labelled])  # [tokens, V]
        with torch.autocast("cpu", enabled=False):
            total = (smeared_cross_entropy(logits, targets, first_loc, sigma, both.heads.alike) * weights).sum()
            said, figures = both.heads.loss(patches.float(), batch)
        weight = float(weights.sum())
        with torch.no_grad():
            best = logits.argmax(-1)
            is_loc = (targets >= first_loc) & (targets < first_loc + 1024)
            is_seg = (targets >= first_loc + 1024) & (targets < first_loc + 1024 + len(both.heads.alike))
            off = (best[is_loc] - targets[is_loc]).abs().clamp(max=1024).float() / BIN_STEP
            here = {
                "talk": float(total.detach()) / weight,
                "words": float((best == targets)[~is_loc & ~is_seg].float().mean()),
                "seg": float((best == targets)[is_seg].float().mean()) if is_seg.any() else 0.0,
                "loc_bins": float(off.mean()) if is_loc.any() else 0.0,
                "talk_alone": float(total.detach()) / weight if repeat > 1 else 0.0,
                "alone": float(repeat > 1),
                "patch_class": figures["class"], "patch_box": figures["box_px"], "patch_letters": figures["letters"],
                "patch_codes": figures["codes"],
                "patch_order": figures["order"], "patch_total": figures["total"],
            }  # fmt: skip
        return total + auxiliary * weight * said, weight, {name: value * weight for name, value in here.items()}

    return loss
