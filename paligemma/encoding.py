"""Pictures -> image features: opened ahead of the model in threads, and encoded once for all rows that show them.

    for encoded in encode_ahead(model, side, [[a, b], [b, c]]): ...   # [(features, (W, H)), ...] of each group

While the model works on one group, threads open the pictures of the next one (decoding and resizing in Pillow hold no
lock of Python's). Equal pictures are known by their content, the SHA-256 of the pixels that the model gets: it does not
matter whether they come as one object, as two arrays or as two files.

Letters: P image patches, D hidden, n pictures.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from paligemma.devices import cpu_count
from paligemma.images import Picture, load_image, preprocess

if TYPE_CHECKING:
    from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration

Encoded: TypeAlias = tuple[Tensor, tuple[int, int]]  # image features [P, D], and (W, H) of the picture
Opened: TypeAlias = tuple[bytes, Tensor, tuple[int, int]]  # digest, pixels [3, side, side], (W, H)

MOST_KEPT = 32  # features kept for later groups; those of an official model take a megabyte each
MOST_THREADS = 4


def encode_ahead(
    model: PaliGemmaForConditionalGeneration, side: int, groups: Sequence[Sequence[Picture]]
) -> Iterator[list[Encoded]]:
    """For each group, the features and the size of its pictures, in order. New ones are encoded together.

    side: the model's, in pixels. Raises what `load_image` raises, when the group of that picture is asked for.
    """
    kept: OrderedDict[bytes, Tensor] = OrderedDict()
    opened: dict[int, Future[Opened]] = {}  # by identity: one object is opened once, also for many rows
    pool = ThreadPoolExecutor(min(MOST_THREADS, cpu_count()))
    several = len({id(picture) for group in groups for picture in group}) > 1
    submit = pool.submit if several else _done_at_once  # for one picture a thread would only be in the way
    try:
        for group, following in pairwise([*groups, ()]):
            needed = {id(picture): picture for picture in (*group, *following)}
            opened = {key: opened.get(key) or submit(_open, picture, side) for key, picture in needed.items()}
            results = [opened[id(picture)].result() for picture in group]
            new = {digest: pixels for digest, pixels, _ in results if digest not in kept}
            if new:
                with torch.inference_mode():
                    features = model.encode_image(torch.stack([*new.values()]).to(model.device))  # [n, P, D]
                kept.update(zip(new, features))
            for digest, _, _ in results:
                kept.move_to_end(digest)
            encoded = [(kept[digest], size) for digest, _, size in results]
            while len(kept) > MOST_KEPT:
                kept.popitem(last=False)
            yield encoded
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _open(picture: Picture, side: int) -> Opened:
    image = load_image(picture)
    pixels = preprocess(image, side)
    return hashlib.sha256(pixels.numpy().tobytes()).digest(), pixels, image.size


def _done_at_once(function: Callable[..., Opened], *arguments: object) -> Future[Opened]:
    """`ThreadPoolExecutor.submit` without a thread."""
    future: Future[Opened] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:
        future.set_exception(error)
    return future
