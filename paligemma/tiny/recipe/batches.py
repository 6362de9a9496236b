"""Training batches for the whole model: a dozen prompts share the tokens of one picture.

In PaliGemma image tokens attend to the prompt, so every prompt needs its own copy of the image tokens, and those are
nine tenths of an average row. Many training batches are therefore *packed*: several rows of one picture share its image
tokens, which then attend only to each other.

        i i p s p s        i image, p prompt, s answer; two rows
    i   1 1 0 0 0 0
    i   1 1 0 0 0 0
    p   1 1 1 0 0 0
    s   1 1 1 1 0 0
    p   1 1 0 0 1 0
    s   1 1 0 0 1 1

A row has the same positions as it would have by itself. Every second step is not packed: it has one row per sequence
and PaliGemma's own mask, because that is how the model will be used.

Answers have 1 to 60 tokens. A mean over tokens would neglect one-word answers, a mean over rows would neglect boxes, so
each token of an answer of n tokens has the weight n^-0.5. The target of a location token is spread over its neighbours
(sigma 0.8 bins), because being off by one bin is nearly right. The target of a mask code is spread over codes with
similar vectors.

Exposure bias: a model that reads only correct codes in training learns to trust them. When its own first codes are
wrong, the next ones continue them instead of describing the picture. So some input tokens are wrong (`corrupt`), while
the targets stay right.

Letters: B sequences, S length, V vocabulary, D width, P image patches.
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
from paligemma.tiny.recipe.codec import code_similarity, mask_codes
from paligemma.tiny.recipe.settings import FIRST
from paligemma.tiny.recipe.shards import SHARD, Shard, pages_of, pixels, some_shards
from paligemma.tiny.recipe.vision_pretraining import augmented_targets, stored_targets
from paligemma.tokenizer import Tokenizer
from paligemma.train.loss import LossFunction

PACKED_TOKENS = 208  # text tokens beside a picture
ROWS_UNPACKED = 3  # rows of a picture in a step that is not packed

# How often each task is sampled, where the scene allows it.
TASK_WEIGHTS = {
    "caption": 1.4,
    "what": 0.4,
    "largest": 0.6,
    "color": 2.0,
    "background": 0.1,
    "exists": 1.6,
    "count": 2.0,
    "count_all": 0.7,
    "left_right": 0.8,
    "left_of": 2.0,
    "detect_one": 1.8,
    "detect_all": 1.6,
    "detect_absent": 0.4,
    "segment": 4.0,
    "ocr": 2.4,
}


class PromptBatches:
    """Batches of pictures with prompts and answers, as a function of the step.

    size:            pictures in a step, from four shards at a time.
    unpacked_every:  every so many steps, one is not packed.
    extra_images:    pictures without prompts for each one with prompts. Only the patch heads learn from them, which is
                     cheap.
    pages:           whether half of these are pages, see pages.py.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        codec: MaskCodec,
        size: int,
        unpacked_every: int = 2,
        extra_images: int = 2,
        seed: int = 0,
        num_patches: int = FIRST.num_patches,
        bin_step: int = FIRST.bin_step,
        pages: bool = False,
    ):
        self.folder, self.tokenizer, self.codec, self.size, self.seed = folder, tokenizer, codec, size, seed
        self.unpacked_every, self.extra_images, self.num_patches = unpacked_every, extra_images, num_patches
        self.bin_step, self.pages = bin_step, pages
        self.mixed = 4
        self.encode = lru_cache(maxsize=4096)(tokenizer.encode)
        self.letters = [tokenizer.encode(character)[0] for character in world.CHARACTERS]
        similarity = code_similarity(codec).double().numpy()
        self.similarity = similarity / similarity.sum(1, keepdims=True)  # NumPy wants sums of 1 in float64
        self.tasks = list(TASK_WEIGHTS)
        weights = np.array(list(TASK_WEIGHTS.values()))
        self.chances = weights / weights.sum()
        self._round: tuple[int, int] | None = None
        self._shards: list[tuple[Shard, np.ndarray, np.ndarray]] = []  # shard, codes, order of its scenes
        self._pages: list[tuple[Shard, np.ndarray]] = []

    def __call__(self, step: int, part: int, parts: int) -> dict[str, Tensor]:
        share = self.size // parts // self.mixed
        round_, place = divmod(step, min(32, SHARD // share))
        if self._round != (round_, part):
            rng = np.random.default_rng([self.seed, round_, part, 2])
            chosen = some_shards(self.folder, self.mixed, rng)
            self._shards = [(Shard.load(p), mask_codes(p, self.codec), rng.permutation(SHARD)) for p in chosen]
            of_pages = some_shards(pages_of(self.folder), self.mixed // 2, rng) if self.pages else []
            self._pages = [(Shard.load(p), mask_codes(p, self.codec)) for p in of_pages]
            self._round = round_, part
        rng = np.random.default_rng([self.seed, step, part, 3])
        packed = step % self.unpacked_every != self.unpacked_every - 1
        images, targets, sequences = [], [], []
        for shard, codes, order in self._shards:
            chosen_rows = order[place * share : (place + 1) * share]
            image, target = stored_targets(shard, chosen_rows, np.zeros(share, bool), codes)
            images.append(image)
            targets.append(target)
            first = shard.first_object
            for i in chosen_rows:
                made = self._rows(shard.scene(i), codes[first[i] : first[i + 1]], rng, packed)
                sequences.extend([made] if packed else [[row] for row in made])
        extra = self.extra_images * share
        without_prompts = [(shard, codes, extra // 2 if self.pages else extra) for shard, codes, _ in self._shards]
        without_prompts += [(shard, codes, extra) for shard, codes in self._pages]  # half as many shards
        for shard, codes, count in without_prompts:
            image, target = augmented_targets(shard, rng.integers(len(shard), size=count), codes, rng)
            images.append(image)
            targets.append(target)
        batch = {name: torch.from_numpy(np.concatenate([t[name] for t in targets])) for name in targets[0]}
        batch["pixel_values"] = pixels(np.concatenate(images))
        with_prompts = share * self.mixed
        batch["counts"] = torch.tensor([with_prompts, len(sequences) // with_prompts])
        return batch | self._tensors(sequences, packed, rng)

    def _rows(
        self, scene: world.Scene, codes: np.ndarray, rng: np.random.Generator, packed: bool
    ) -> list[tuple[list[int], list[int]]]:
        """(prefix ids with <bos> and newline, suffix ids with <eos>) of randomly chosen rows about this scene."""
        by_mask = {id(thing.mask): code for thing, code in zip(scene.objects, codes)}
        made: list[tuple[list[int], list[int]]] = []
        room, tries = PACKED_TOKENS, 0
        while tries < 60 and (room > 6 if packed else len(made) < ROWS_UNPACKED):
            tries += 1
            task = self.tasks[int(np.searchsorted(np.cumsum(self.chances), rng.random()))]
            row = world_rows.sample_row(
                scene,
                task,
                rng,
                bin_step=self.bin_step,
                encode_mask=lambda asked: [by_mask[id(mask)] for mask, _ in asked],
            )
            if row is None:
                continue
            prefix = [self.tokenizer.bos_token_id, *self.encode(row.prefix), self.tokenizer.newline_token_id]
            suffix = [*self.encode(row.suffix), self.tokenizer.eos_token_id]
            if len(prefix) + len(suffix) <= room:
                made.append((prefix, suffix))
                room -= len(prefix) + len(suffix) if packed else 0
        while not packed and len(made) < ROWS_UNPACKED:
            made.append(made[-1])
        return made

    def corrupt(self, suffix: list[int], rng: np.random.Generator) -> list[int]:
        """The answer as input, with some wrong tokens: two answers of three that have mask codes get a random share of
        them replaced, half of these by similar ones; a spelt answer gets a fifth of its letters replaced."""
        first, codes = self.tokenizer.first_seg_id, len(self.similarity)
        is_code = [0 <= token - first < codes for token in suffix]
        read = list(suffix)
        if any(is_code) and rng.random() < 2 / 3:
            share = rng.random()
            for i in (i for i, code in enumerate(is_code) if code and rng.random() < share):
                similar = rng.random() < 0.5
                read[i] = first + int(rng.choice(codes, p=self.similarity[suffix[i] - first] if similar else None))
        elif all(token in self.letters for token in suffix[:-1]):
            for i in range(len(suffix) - 1):
                if rng.random() < 0.2:
                    read[i] = self.letters[int(rng.integers(len(self.letters)))]
        return read

    def _tensors(
        self, sequences: list[list[tuple[list[int], list[int]]]], packed: bool, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        P = self.num_patches
        longest = max(sum(len(p) + len(s) for p, s in rows) for rows in sequences)
        B, S = len(sequences), P + longest
        ids = np.zeros((B, S), np.int64)
        row_of, positions = np.full((B, S), -1, np.int64), np.zeros((B, S), np.int64)
        labels, weights, is_answer = (
            np.full((B, S), -100, np.int64),
            np.zeros((B, S), np.float32),
            np.zeros((B, S), bool),
        )
        ids[:, :P], row_of[:, :P], positions[:, :P] = self.tokenizer.image_token_id, 0, np.arange(P)
        for b, rows in enumerate(sequences):
            at = P
            for number, (prefix, suffix) in enumerate(rows, 1):
                middle, end = at + len(prefix), at + len(prefix) + len(suffix)
                ids[b, at:middle], ids[b, middle:end] = prefix, self.corrupt(suffix, rng)
                labels[b, middle:end], weights[b, middle:end] = suffix, len(suffix) ** -0.5
                is_answer[b, middle:end] = True
                row_of[b, at:end], positions[b, at:end] = number, P + np.arange(end - at)
                at = end
        arrays = {
            "input_ids": ids,
            "row": row_of,
            "position": positions,
            "is_answer": is_answer,
            "labels": labels,
            "weights": weights,
        }
        batch = {name: torch.from_numpy(value) for name, value in arrays.items()}
        return batch | {"attention": packed_mask(batch["row"], batch["position"], batch["is_answer"], not packed)}


def packed_mask(row: Tensor, position: Tensor, is_answer: Tensor, images_read: bool) -> Tensor:
    """The mask drawn above: bool [B, 1, S, S], True where a query may attend to a key.

    row: int64 [B, S], 0 image, 1.. the rows, -1 padding. position: int64 [B, S]. is_answer: bool [B, S].
    images_read: whether image tokens attend to the prompts too. With one row per sequence this is PaliGemma's mask.
    """
    same_row = row[:, :, None] == row[:, None, :]
    in_order = position[:, None, :] <= position[:, :, None]
    own = same_row & (~is_answer[:, None, :] | (is_answer[:, :, None] & in_order))
    image_key = (row == 0)[:, None, :]
    mask = own | (image_key & (row >= 0)[:, :, None])
    if images_read:
        mask |= (row == 0)[:, :, None] & ((row > 0) & ~is_answer)[:, None, :]
    return mask[:, None]


def soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    first_loc: int,
    sigma: float = 0.8,
    similarity: Tensor | None = None,
    bin_step: int = FIRST.bin_step,
) -> Tensor:
    """Cross-entropy of each token, [tokens, V] and [tokens] -> [tokens], with soft targets for locations and codes.

    The target of a location is a Gaussian over the used bins up to three away from it. The target of a mask code is its
    row of `similarity` [K, K], see `code_similarity`. The ids of the codes follow those of the 1,024 locations.
    """
    logp = logits.float().log_softmax(-1)
    losses = -logp.gather(-1, targets[:, None])[:, 0]
    is_loc = (targets >= first_loc) & (targets < first_loc + 1024)
    reach = torch.arange(-3, 4, device=logits.device)
    near = (targets[is_loc, None] - first_loc) // bin_step + reach  # [locations, 7] in used bins
    share = torch.exp(-0.5 * (reach / sigma) ** 2) * ((near >= 0) & (near < 1024 // bin_step))
    share = share / share.sum(-1, keepdim=True)
    near_ids = first_loc + bin_step * near.clamp(0, 1024 // bin_step - 1)
    losses = losses.masked_scatter(is_loc, -(share * logp[is_loc].gather(-1, near_ids)).sum(-1))
    if similarity is None:
        return losses
    first_seg = first_loc + 1024
    is_seg = (targets >= first_seg) & (targets < first_seg + len(similarity))
    seg_logp = logp[is_seg, first_seg : first_seg + len(similarity)]
    return losses.masked_scatter(is_seg, -(similarity[targets[is_seg] - first_seg] * seg_logp).sum(-1))


def joint_loss(
    first_loc: int, auxiliary: float = 0.3, sigma: float = 0.8, bin_step: int = FIRST.bin_step
) -> LossFunction:
    """The loss of a batch of `PromptBatches` for a `JointModel`: answers, plus `auxiliary` times the patch heads'."""

    def loss(joint: Any, batch: dict[str, Tensor]) -> tuple[Tensor, float, dict[str, float]]:
        model = joint.model
        patches = model.vision_tower(batch["pixel_values"])  # [n, P, vision width]
        with_prompts, repeat = batch["counts"].tolist()  # how many pictures have prompts, and how many sequences each
        features = model.multi_modal_projector(patches[:with_prompts])
        features = features.repeat_interleave(repeat, 0)
        x = model.embed(batch["input_ids"], features)
        offset = model.config.text_config.position_offset
        hidden = model.language_model.model(x, batch["position"] + offset, {None: batch["attention"]})  # [B, S, D]
        targets, weights = batch["labels"][:, 1:], batch["weights"][:, 1:]
        labelled = targets != -100
        targets, weights = targets[labelled], weights[labelled]
        logits = model.language_model.logits(hidden[:, :-1][labelled])  # [tokens, V]
        with torch.autocast(patches.device.type, enabled=False):
            total = (
                soft_cross_entropy(logits, targets, first_loc, sigma, joint.heads.similarity, bin_step) * weights
            ).sum()
            patch_loss, figures = joint.heads.loss(patches.float(), batch)
        weight = float(weights.sum())
        with torch.no_grad():
            best = logits.argmax(-1)
            is_loc = (targets >= first_loc) & (targets < first_loc + 1024)
            is_seg = (targets >= first_loc + 1024) & (targets < first_loc + 1024 + len(joint.heads.similarity))
            off = (best[is_loc] - targets[is_loc]).abs().clamp(max=1024).float() / bin_step
            here = {
                "answers": float(total.detach()) / weight,
                "words": float((best == targets)[~is_loc & ~is_seg].float().mean()),
                "seg": float((best == targets)[is_seg].float().mean()) if is_seg.any() else 0.0,
                "loc_bins": float(off.mean()) if is_loc.any() else 0.0,
                "answers_unpacked": float(total.detach()) / weight if repeat > 1 else 0.0,
                "unpacked": float(repeat > 1),
                "patch_class": figures["class"], "patch_box": figures["box_px"], "patch_letters": figures["letters"],
                "patch_codes": figures["codes"],
                "patch_order": figures["order"], "patch_total": figures["total"],
            }  # fmt: skip
        return total + auxiliary * weight * patch_loss, weight, {name: value * weight for name, value in here.items()}

    return loss
