"""What happens without it: patches replaced, attention edges cut. This measures importance, which attention does not.

A change is made in the middle of the real model, and the rest of it runs as always. Two traps:
- One patch alone is not enough. The vision tower has mixed every patch with its neighbours, so the patches beside it
  still tell what was there: replace a window of 3 x 3.
- Replace by what the model knows. Grey pixels are no absence but a grey thing, and zeros are nothing it has ever seen.
  The features of background patches say "nothing here" (`fill="background"`).

Letters: S tokens, A answer tokens, n images, P patches of an image, D hidden, g grid, R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paligemma.answers.parsing import NUM_LOC
from paligemma.answers.results import Answer
from paligemma.engine import generate
from paligemma.explore.watching import ROWS_AT_ONCE, Look, evaluating, logprobs_of_answer, numbers_of, run
from paligemma.images import preprocess
from paligemma.tasks import budget_of

FILLS = ("background", "mean", "zero")

# ---------------------------------------------------------------------------------------------- patches


@dataclass(repr=False)
class KnockOut:
    """drop: [n * P, A] in nats, how much log-probability each answer token loses without the window around a patch;
    positive is lost. base: [A], with the whole picture. filled_with: int64, all background patches: with
    fill="background" each patch takes the nearest of them that is not gone itself."""

    drop: Tensor
    base: Tensor
    filled_with: Tensor

    def __repr__(self) -> str:
        return f"KnockOut({len(self.drop)} patches, {len(self.base)} answer tokens)"


def knock_out(
    look: Look,
    window: int = 3,
    fill: str = "background",
    progress: Callable[[int, int], object] | None = None,
    grid: int | None = None,
) -> KnockOut:
    """Which patches each word of the answer needs: one pass for every patch, without the window around it.

    window: odd; windows are cut off at the edge of the picture. fill: see `_filled`. progress: called with (passes
    done, all). grid: a coarser answer in grid * grid passes for each image: its patches are cut into grid x grid
    blocks, each is replaced as a whole, as wide around it as a window is around a patch, and all patches of a block get
    the same numbers. Raises ValueError for an even window, an unknown fill, or a grid finer than the patches.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}, expected an odd number: it lies around a patch")
    P, g, n = look.grid**2, look.grid, look.images
    side = g if grid is None else grid
    if not 1 <= side <= g:
        raise ValueError(f"grid is {grid}, expected 1 to {g}: the picture has {g} x {g} patches")
    numbers, backgrounds = torch.arange(n * P), background_patches(look)
    # The block of each patch [n * P], numbered over all images. Without a grid every patch is one by itself.
    blocks = numbers // P * side**2 + numbers % P // g * side // g * side + numbers % g * side // g
    passes, drops = n * side**2, []
    for start in range(0, passes, ROWS_AT_ONCE):
        some = torch.arange(start, min(start + ROWS_AT_ONCE, passes))
        own = (blocks == some[:, None]).float().unflatten(1, (n, g, g))  # [R, n, g, g]
        gone = F.max_pool2d(own, window, stride=1, padding=window // 2).flatten(1).bool()  # [R, n * P]
        changed = torch.stack([_filled(look, row.nonzero()[:, 0], fill, backgrounds) for row in gone])
        hidden = run(look, len(changed), features=changed)
        drops.append(look.logprobs - logprobs_of_answer(look, hidden))
        if progress is not None:
            progress(int(some[-1]) + 1, passes)
    return KnockOut(torch.cat(drops)[blocks], look.logprobs, backgrounds)


@torch.no_grad()
def without(look: Look, patches: Sequence[int], fill: str = "background", where: str = "features") -> Answer:
    """The answer, written anew without some patches.

    patches: numbers over all images. where: "features" replaces what the projector returns for them; "pixels" replaces
    the pixels, so that the vision tower does not see them either. Raises ValueError for unknown names and numbers.
    """
    if where not in ("features", "pixels"):
        raise ValueError(f"where is {where!r}, expected 'features' or 'pixels'")
    P = look.grid**2
    gone = torch.tensor(numbers_of(patches, look.images * P, "patches has"), dtype=torch.int64)
    model, tokenizer = look.pg.model, look.pg.processor.tokenizer
    with evaluating(model):
        if where == "features":
            changed = _filled(look, gone, fill, background_patches(look)).unflatten(0, (look.images, P))
        else:
            changed = model.encode_image(_filled_pixels(look, gone, fill).to(model.device))
        # Not by `pg.generate`: a picture that the row shows twice is encoded once there, and here the two may differ.
        inputs = look.pg.processor.lay_out([look.prompt], [look.images])
        inputs["image_features"] = changed.to(model.device, model.dtype)  # [n, P, D]
        (written,) = generate(
            model,
            inputs,
            budget_of(look.prompt),
            constraint=look.pg.grammar(look.prompt),
            watch=(tokenizer.first_loc_id, NUM_LOC),
            num_tokens=len(tokenizer),
        )
    return look.pg.to_answer(written, look.pictures[0].size, look.picture, look.pg.loaded_codec)


def background_patches(look: Look) -> Tensor:
    """int64: the eighth of each image's patches whose pixels differ least from each other, numbered over all images.

    Sky, wall, paper. It is a rule about pixels and knows nothing of objects: of a picture without any even part it
    takes what is evenest.
    """
    return torch.cat([
        image * look.grid**2 + spread.argsort(stable=True)[: max(1, look.grid**2 // 8)].sort().values
        for image, spread in enumerate(_patches(look).std(-1).mean(-1))
    ])  # fmt: skip


def _pixels(look: Look) -> Tensor:
    return torch.stack([preprocess(one, look.pg.processor.image_size) for one in look.pictures])  # [n, 3, side, side]


def _patches(look: Look) -> Tensor:
    """[n, P, 3, pixels of a patch]"""
    size = look.pg.model.config.vision_config.patch_size
    cut_up = _pixels(look).unfold(2, size, size).unfold(3, size, size)  # [n, 3, g, g, size, size]
    return cut_up.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(3)


def nearest_background(look: Look, gone: Tensor, backgrounds: Tensor) -> Tensor:
    """int64: for each patch of `gone` the nearest of `backgrounds` in its image that is not gone itself.

    Where all of them are gone, the nearest of all background patches of the image.
    """
    P, g = look.grid**2, look.grid
    found = []
    for patch in gone.tolist():
        of_image = backgrounds[backgrounds // P == patch // P]
        left = of_image[~torch.isin(of_image, gone)]
        candidates = left if len(left) else of_image
        rows, columns = candidates % P // g - patch % P // g, candidates % g - patch % g
        found.append(int(candidates[(rows**2 + columns**2).argmin()]))
    return torch.tensor(found, dtype=torch.int64)


def _filled(look: Look, gone: Tensor, fill: str, backgrounds: Tensor) -> Tensor:
    """The image features [n * P, D] with those of the patches `gone` replaced. fill:

    "background": each by the features of the nearest background patch; "mean": by the mean of the image; "zero".
    """
    features, P = look.features.flatten(0, 1).clone(), look.grid**2
    if fill == "background":
        features[gone] = features[nearest_background(look, gone, backgrounds)]
    elif fill == "mean":
        features[gone] = look.features.mean(1)[gone // P]
    elif fill == "zero":
        features[gone] = 0
    else:
        raise ValueError(f"fill is {fill!r}, expected one of {', '.join(FILLS)}")
    return features


def _filled_pixels(look: Look, gone: Tensor, fill: str) -> Tensor:
    pixels, size, P, g = _pixels(look), look.pg.model.config.vision_config.patch_size, look.grid**2, look.grid
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}, expected one of {', '.join(FILLS)}")
    whole = pixels.clone()

    def square(patch: int) -> tuple[Any, ...]:
        row, column = patch % P // g * size, patch % g * size
        return patch // P, slice(None), slice(row, row + size), slice(column, column + size)

    if fill == "background":
        sources = nearest_background(look, gone, background_patches(look))
        for patch, source in zip(gone.tolist(), sources.tolist()):
            pixels[square(patch)] = whole[square(source)]
        return pixels
    for patch in gone.tolist():
        mean = whole[patch // P].mean((1, 2))[:, None, None]
        pixels[square(patch)] = mean if fill == "mean" else 0.0
    return pixels


# ---------------------------------------------------------------------------------------------- attention


@dataclass(repr=False)
class Cut:
    """logprobs, drop: [A], the log-probability of each answer token with the edges cut, and how much it lost (nats)."""

    logprobs: Tensor
    drop: Tensor

    def __repr__(self) -> str:
        return f"Cut(drop={[round(value, 3) for value in self.drop.tolist()]})"


def cut(look: Look, queries: Sequence[int], keys: Sequence[int], layers: Sequence[int]) -> Cut:
    """The pass again, where in some layers no query of `queries` may look at any key of `keys`, in all heads.

    queries, keys: columns. The edges are masked before the softmax, so the rest of each query's weights still sums to
    1. An empty list cuts nothing. Raises ValueError for columns and layers that do not exist, and where a query would
    be left without any key.
    """
    S, L = len(look.input_ids), look.num_layers
    queries, keys = numbers_of(queries, S, "queries has"), numbers_of(keys, S, "keys has")
    change = cutting(edges_between(look, queries, keys))
    hidden = run(look, layers=dict.fromkeys(numbers_of(layers, L, "layers has"), change))
    logprobs = logprobs_of_answer(look, hidden)[0]
    return Cut(logprobs, look.logprobs - logprobs)


def edges_between(look: Look, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
    """bool [S, S], True for every pair of a query (row) and a key (column)."""
    S = len(look.input_ids)
    edges = torch.zeros(S, S, dtype=torch.bool)
    for query in queries:
        edges[query, list(keys)] = True
    return edges


def cutting(edges: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A change of a layer, for `run`: the edges (bool [S, S], or [R, S, S] for each row) are taken out of its mask."""

    def change(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mask = mask & ~edges.to(mask.device).view(-1, 1, *edges.shape[-2:])
        if not bool((left := mask.any(-1)).all()):
            query = int((~left).nonzero()[0, -1])
            raise ValueError(f"the query at column {query} would be left without any key: leave it one")
        return x, mask

    return change
