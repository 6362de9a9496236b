"""Images and text -> tensors; text <- tokens.

One row, as the model sees it (P tokens per image; the linear layer puts one projected patch in place of each):

                   <image> x P  <bos>  caption  en  "\\n"     a   cat  <eos>
                   `------------- prefix -------------´     `-- suffix --´
    token_type_ids    0 0 0 0     0       0      0    0       1    1     1
    labels             -100      -100   -100   -100  -100     a   cat  <eos>

Within the prefix every token attends to every other; the suffix is causal (`attention_mask.py` draws that).
What is unusual:

- `<bos>` comes *after* the images. It opens the text, not the row.
- The newline is the separator: the first token of the answer is predicted from it. It belongs to the prefix, so no
  loss falls on it; on the `<eos>` it does.
- Prefix + newline and suffix are tokenised apart, and the suffix gets no space in front: "a cat", not " a cat".
- The newline is appended to the *string*, as transformers does. Gemma's vocabulary has tokens for runs of newlines, so
  a prompt that already ends in one gives the token of "\\n\\n" (109 in the official vocabulary). big_vision tokenises
  the separator apart and always gets 108. No other token of the vocabulary holds a newline and something else, so for
  every other prompt the two agree.
- A prompt may bring its own `<image>`s, one for each of its images. Then they stay where they are and `<bos>` is put
  after the last of them; nothing is stripped, so in "<image> caption en" the space makes another token of the word.
- `<bos>` or `<eos>` in a prompt becomes that token and is not removed: a prompt that brings its own `<bos>` has two.
- Padding has token type 0 on either side and attention 0. The default is the left, where generation wants it.

Every id, type and label equals that of transformers' `PaliGemmaProcessor`, every pixel that of its PIL path.
Source: big_vision `models/proj/paligemma`, transformers `models/paligemma/processing_paligemma.py`.

Letters: B rows, S length of a row, P tokens per image.
"""

from __future__ import annotations

import json
import os
import reprlib
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import tokenizers
import torch
from PIL import Image

from paligemma.arguments import is_whole
from paligemma.files import read_json, write_texts, written_whole
from paligemma.images import ImageInput, ImageT, Picture, load_image, preprocess
from paligemma.tokenizer import IMAGE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import MaskCodec
    from paligemma.answers.scores import Calibration
    from paligemma.modeling_gemma import PaliGemmaConfig

IGNORED = -100  # a label that the loss skips


class FastTokenizer(Protocol):
    """A fast tokenizer of transformers: all that is used here."""

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer: ...


class PaliGemmaProcessor:
    """Prompts, pictures and (for training) answers -> what the model takes.

    `tokenizer`: a `Tokenizer`, or a fast transformers tokenizer of a PaliGemma checkpoint.
    `num_image_tokens`: P, patches per image: 256, 1024, 4096 at 224, 448, 896 pixels.
    `image_size`: side of the square the pictures are brought to, in pixels.
    """

    def __init__(self, tokenizer: Tokenizer | FastTokenizer, num_image_tokens: int, image_size: int) -> None:
        if not isinstance(tokenizer, Tokenizer):
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if not isinstance(backend, tokenizers.Tokenizer):
                raise TypeError(
                    "expected a tokenizer of load_tokenizer(folder) or a fast one of transformers, "
                    f"got {type(tokenizer).__name__}"
                )
            tokenizer = Tokenizer(backend)
        for name, value in (("num_image_tokens", num_image_tokens), ("image_size", image_size)):
            if not _is_count(value):
                raise ValueError(f"{name} is {reprlib.repr(value)}, expected a positive whole number")
        self.tokenizer: Tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.image_size = image_size
        # What else a checkpoint may have of its own. They are here because they are saved with the rest.
        self.calibration: Calibration | None = None  # of scores
        self.mask_codec: MaskCodec | None = None  # None: the official one, which all official checkpoints share

    @classmethod
    def for_config(cls, tokenizer: Tokenizer | FastTokenizer, config: PaliGemmaConfig) -> PaliGemmaProcessor:
        """The processor of a model with this configuration."""
        return cls(tokenizer, config.vision_config.num_patches, config.vision_config.image_size)

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageInput | list[ImageT] | list[list[ImageT]] | None,
        suffix: str | Sequence[str] | None = None,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """One row per prompt.

        `text`: a prompt or a list of B prompts, without `<image>`, `<bos>` and newline (what happens if they are there
        stands at the top of this file).
        `images`: for every prompt an image in any form `load_image` takes, or a tuple (or list) of images that the row
        sees together; a single image or a tuple for a single prompt. None: no row has images, and the result no
        `pixel_values`. One image for many prompts is not repeated here: `inference.py` encodes it once instead.
        `suffix`: the answers to train on, one per prompt.
        `padding_side`: "left" or "right".
        `max_length`: cut longer rows, images included, at the end of the suffix, its `<eos>` first. A warning says how
        much was cut. The prefix is never cut: a row without room for one token of its suffix is an error.

        Returns `input_ids`, `attention_mask`, `token_type_ids`: int64 [B, S]; `pixel_values`: float32 [images, 3,
        image_size, image_size] in row order; with a suffix `labels`: int64 [B, S], -100 except on suffix and `<eos>`.

        Raises ValueError for unequal numbers, for text that has `<image>` without an image to go with it, and what
        `load_image` raises.
        """
        if not isinstance(text, Iterable):
            raise TypeError(f"text is {type(text).__name__}, expected a prompt or a list of prompts")
        prompts = [text] if isinstance(text, str) else list(text)
        rows_of_images = _rows_of_images(images, len(prompts))
        inputs = self.lay_out(prompts, [len(row) for row in rows_of_images], suffix, padding_side, max_length)
        if images is not None:
            pictures = [load_image(image) for images_of_row in rows_of_images for image in images_of_row]
            inputs["pixel_values"] = torch.stack([preprocess(picture, self.image_size) for picture in pictures])
        return inputs

    def lay_out(
        self,
        prompts: Sequence[str],
        images_per_row: Sequence[int],
        suffix: str | Sequence[str] | None = None,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The text half of a call: everything but `pixel_values`, for rows of so many images each.

        For images that are already encoded, or not worth opening (counting tokens). The other arguments, the result
        and the errors are those of a call.
        """
        if not prompts:
            raise ValueError("there is no prompt: text is an empty list")
        suffixes = _suffixes(suffix, len(prompts))
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}, expected 'left' or 'right'")

        rows: list[list[int]] = []
        prefix_lengths: list[int] = []
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"the prompt of row {row} is {type(prompt).__name__}, expected a string")
            prefix = self._prefix_ids(prompt, images_per_row[row], row)
            # "<eos>" goes through the tokenizer as text, as in transformers.
            rows.append(prefix + ([] if suffixes is None else self.tokenizer.encode(suffixes[row] + "<eos>")))
            prefix_lengths.append(len(prefix))
        if max_length is not None:
            if not is_whole(max_length, least=1):
                raise ValueError(f"max_length is {max_length!r}, expected a whole number of at least 1, or None")
            rows = _cut(rows, prefix_lengths, max_length)

        batch, length = len(rows), max(map(len, rows))
        input_ids = torch.full((batch, length), self.tokenizer.pad_token_id)  # [B, S]
        attention_mask = torch.zeros_like(input_ids)
        token_type_ids = torch.zeros_like(input_ids)
        for row, (ids, prefix_length) in enumerate(zip(rows, prefix_lengths)):
            start = length - len(ids) if padding_side == "left" else 0
            end = start + len(ids)
            input_ids[row, start:end] = torch.tensor(ids)
            attention_mask[row, start:end] = 1
            token_type_ids[row, start + prefix_length : end] = 1

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if suffixes is not None:
            inputs["labels"] = input_ids.masked_fill(token_type_ids == 0, IGNORED)
        return inputs

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one row of ids; see `Tokenizer.decode`."""
        return self.tokenizer.decode(ids)

    def __repr__(self) -> str:
        return f"PaliGemmaProcessor(num_image_tokens={self.num_image_tokens}, image_size={self.image_size})"

    def _prefix_ids(self, prompt: str, images: int, row: int) -> list[int]:
        """Images, `<bos>`, prompt and newline."""
        encode = self.tokenizer.encode
        placed = prompt.count(IMAGE)
        if placed not in (0, images):
            raise ValueError(
                f"the prompt of row {row} has {IMAGE} {placed} times and comes with {images} images: "
                f"leave {IMAGE} out (it is added here), or write it once for each"
            )
        before, last = [""] * images, prompt  # the text in front of every image, and behind the last
        if placed:
            *before, last = prompt.split(IMAGE)
        ids: list[int] = []
        for piece in before:
            ids += encode(piece) + [self.tokenizer.image_token_id] * self.num_image_tokens
        return [*ids, self.tokenizer.bos_token_id, *encode(last + "\n")]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> PaliGemmaProcessor:
        """Tokenizer, image size and number of image tokens from the files of a checkpoint: `preprocessor_config.json`
        (or the `processor_config.json` that newer transformers write), else `config.json`. (`inference.load` reads a
        calibration and a mask codec.)"""
        folder = Path(folder)
        return cls(load_tokenizer(folder), *image_settings(folder))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`, `tokenizer.json` and `tokenizer_config.json`, which `from_pretrained` and
        transformers' `AutoProcessor` read, and the calibration of scores and the mask codec, if it has its own.
        Existing files are replaced only when all new ones are complete."""
        config = {
            "processor_class": "PaliGemmaProcessor",
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": self.num_image_tokens,
            "size": {"height": self.image_size, "width": self.image_size},
            "do_convert_rgb": True,
            **_IMAGE_SETTINGS,
        }
        files = {**self.tokenizer.files(), "preprocessor_config.json": json.dumps(config, indent=2) + "\n"}
        if self.calibration is not None:
            files["calibration.json"] = json.dumps(self.calibration.to_dict(), indent=2) + "\n"
        with ExitStack() as stack:
            if self.mask_codec is not None:
                self.mask_codec.save(stack.enter_context(written_whole(Path(folder) / "mask_codec.npz")))
            write_texts(Path(folder), files)


def _rows_of_images(images: ImageInput | list[ImageT] | list[list[ImageT]] | None, prompts: int) -> list[list[Picture]]:
    """A list of images for every prompt."""
    if images is None:
        return [[] for _ in range(prompts)]
    given: list[Any] = images if isinstance(images, list) else [images]
    if len(given) != prompts:
        raise ValueError(
            f"{prompts} prompts and images for {len(given)} rows: give one for each prompt "
            "(a tuple of images is one row that sees all of them)"
        )
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in given]
    for index, row in enumerate(rows):
        if not row or any(image is None for image in row):
            raise ValueError(f"row {index} has no image; images=None makes a batch without any")
    return rows


def _suffixes(suffix: str | Sequence[str] | None, prompts: int) -> list[str] | None:
    if suffix is None:
        return None
    if not isinstance(suffix, Iterable):
        raise TypeError(f"suffix is {type(suffix).__name__}, expected an answer for each prompt")
    suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
    if len(suffixes) != prompts:
        raise ValueError(f"{prompts} prompts and {len(suffixes)} suffixes: give one for each prompt")
    for row, answer in enumerate(suffixes):
        if not isinstance(answer, str):
            raise ValueError(f"the suffix of row {row} is {answer!r}, expected a string (all rows have one, or none)")
        if IMAGE in answer:
            raise ValueError(f"the suffix of row {row} contains {IMAGE}, which stands for a picture, not for text")
    return suffixes


def _cut(rows: list[list[int]], prefix_lengths: list[int], max_length: int) -> list[list[int]]:
    for row, prefix_length in enumerate(prefix_lengths):
        if len(rows[row]) > max_length and prefix_length >= max_length:
            raise ValueError(
                f"row {row} has {prefix_length} tokens of images and prompt, which are never cut, and max_length is "
                f"{max_length}: shorten the prompt or raise max_length"
            )
    cut = {row: len(ids) - max_length for row, ids in enumerate(rows) if len(ids) > max_length}
    if cut:
        most = max(cut, key=lambda row: cut[row])
        warnings.warn(
            f"{len(cut)} of {len(rows)} suffixes were cut to max_length={max_length}, their <eos> included; "
            f"row {most} lost most, {cut[most]} tokens",
            stacklevel=4,
        )
    return [ids[:max_length] for ids in rows]


# ----------------------------------------------------------------------------------------------------------- files


# What `preprocess` does, in the words of preprocessor_config.json.
_IMAGE_SETTINGS: dict[str, object] = {
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def image_settings(folder: Path) -> tuple[int, int]:
    """(tokens per image, side in pixels) out of the files of a checkpoint. ValueError that names a file and its key."""
    vision = _object_in(folder / "config.json", "vision_config")
    path = folder / "preprocessor_config.json"
    settings = _object_in(path)
    if settings is None:
        path = folder / "processor_config.json"
        settings = _object_in(path, "image_processor")
    if settings is None and vision is None:
        raise FileNotFoundError(f"{folder} has neither preprocessor_config.json nor a config.json with vision_config")
    settings, vision = settings or {}, vision or {}
    for key, expected in _IMAGE_SETTINGS.items():
        found = settings.get(key)
        if found not in (None, expected) and not (key == "rescale_factor" and _nearly(found, expected)):
            raise ValueError(f"{path}: {key} is {reprlib.repr(found)}; PaliGemma's images have {expected!r}")

    size = settings.get("size")
    if size is None:
        size = vision.get("image_size", 224)  # published 224 configurations leave image_size out
    elif isinstance(size, dict) and size.get("height") == size.get("width"):
        size = size.get("height")
    if not _is_count(size):
        raise ValueError(f"{folder}: the size of the images is {reprlib.repr(size)}, expected equal height and width")
    patch = vision.get("patch_size", 14)
    if not _is_count(patch):
        raise ValueError(f"{folder / 'config.json'}: patch_size is {reprlib.repr(patch)}, expected a whole number")
    patches, tokens = (size // patch) ** 2, settings.get("image_seq_length")
    if tokens is None:
        tokens = patches
    # Only config.json says how large a patch is. Without it, the number of tokens is taken as it is.
    if not _is_count(tokens) or ("patch_size" in vision and tokens != patches):
        expected = f"the number of patches: {patches} at {size} pixels, in patches of {patch}"
        raise ValueError(f"{path}: image_seq_length is {reprlib.repr(tokens)}, expected {expected}")
    return tokens, size


def _object_in(path: Path, key: str | None = None) -> dict[str, Any] | None:
    """The object in a JSON file, or the one under a key of it; None if there is no such file or key."""
    content = read_json(path) if path.is_file() else None
    if content is None or key is None:
        return content
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: {key} is {reprlib.repr(value)}, expected an object")
    return value


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 1 <= value < 2**31  # `type`, since True is an int too


def _nearly(found: object, expected: object) -> bool:
    return isinstance(found, float) and isinstance(expected, float) and abs(found - expected) < 1e-9
