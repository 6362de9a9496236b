"""Images and text -> tensors; text <- tokens.

One row, as the model sees it (N tokens per image; the linear layer puts one projected patch in place of each):

                   <image> x N  <bos>  caption  en  "\\n"     a   cat  <eos>
                   `------------- prefix -------------´     `-- suffix --´
    token_type_ids    0 0 0 0     0       0      0    0       1    1     1
    labels             -100      -100   -100   -100  -100     a   cat  <eos>

The prefix is read (everybody in it sees everybody), the suffix is written (causal); `attention_mask.py` draws that.
What is unusual:

- `<bos>` comes *after* the images. It opens the text, not the row.
- The newline is the separator: its last position predicts the first token of the answer. It belongs to the prefix and
  is not trained, the `<eos>` is.
- Prefix + newline and suffix are tokenised apart, and the suffix gets no space in front: "a cat", not " a cat".
- The newline is appended to the *string*, as transformers does. Gemma's vocabulary has tokens for runs of newlines, so
  a prompt that already ends in one gives the token of "\\n\\n" (109 in the official vocabulary). big_vision tokenises
  the separator apart and always gets 108. No other token of the vocabulary holds a newline and something else, so for
  every other prompt the two agree.
- A prompt may bring its own `<image>`s, one for each of its images. Then they stay where they are and `<bos>` is put
  after the last of them; nothing is stripped, so in "<image> caption en" the space makes another token of the word.
- Padding has token type 0 on either side and attention 0. The default is the left, where generation wants it.

Every id, type and label equals that of transformers' `PaliGemmaProcessor`, every pixel that of its PIL path.
Source: big_vision `models/proj/paligemma`, transformers `models/paligemma/processing_paligemma.py`.

Letters: B rows, S length of a row, N tokens per image.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE = "<image>"
LOCATIONS = [f"<loc{i:04d}>" for i in range(1024)]
SEGMENTS = [f"<seg{i:03d}>" for i in range(128)]
IGNORED = -100  # a label that the loss skips

# ---------------------------------------------------------------------------------------------------------- images


def load_image(source: Any) -> Image.Image:
    """Any picture as 8-bit RGB, upright.

    `source`: a path, a `PIL.Image`, uint8 [H, W, 3] (also [H, W], and [H, W, C] with C = 1 grey, 2 grey + alpha, 4 RGB
    + alpha), the bytes of a picture file, or an open binary file (such as `sys.stdin.buffer`). Of a file with several
    pictures (GIF, TIFF) the first.

    The EXIF orientation is applied, alpha is composited on white, palettes are expanded, 16 bits are scaled to 8 and
    CMYK is converted.

    Raises FileNotFoundError, IsADirectoryError, OSError for a damaged or truncated file, and ValueError for what is
    not a picture, has no pixels, has too many (`PIL.Image.MAX_IMAGE_PIXELS`: Pillow warns above it, and what is beyond
    twice that, 179 million, is an error here as it is there), or has values whose range nobody knows (floats).
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture")
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "the array")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.exists():
            scheme = re.match(r"([A-Za-z][\w+.-]+):/", str(source))  # of two letters or more: C:/ is a disk
            if scheme:
                way_out = "leave out 'file://'" if scheme[1].lower() == "file" else "download it first"
                raise FileNotFoundError(f"{source} is a URL, and pictures are read from files: {way_out}")
            raise FileNotFoundError(f"{path}: no such file")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, expected a picture")
        with path.open("rb") as file:
            return _open(file, str(path))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(source), "the data")
    if hasattr(source, "read"):
        data = source.read()  # whole, since a pipe cannot seek
        if not isinstance(data, bytes):
            raise TypeError("the file is open in text mode; open it with 'rb' (for stdin: sys.stdin.buffer)")
        return _open(io.BytesIO(data), str(getattr(source, "name", "the data")))
    raise TypeError(
        f"expected a picture (a path, a PIL.Image, uint8 [H, W, 3], bytes or an open file), got {type(source).__name__}"
    )


def _open(file: IO[bytes], name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in any format that Pillow reads") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large: {str(error).rstrip('.')}. Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if "
            "you trust it"
        ) from None
    except (MemoryError, Warning):
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, EOFError, struct.error, ...
        raise OSError(f"{name} is damaged or truncated: {error}") from None
    return _to_rgb(image, name)


def _from_array(array: np.ndarray) -> Image.Image:
    """uint8 [H, W] or [H, W, 1..4] -> PIL.Image"""
    shape = "x".join(map(str, array.shape))
    if array.dtype != np.uint8:
        raise ValueError(f"expected a uint8 array [H, W, 3] with values 0..255, got {array.dtype} {shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (2, 3, 4)):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise ValueError(
            f"expected a uint8 array [H, W, 3], got {shape}"
            + (": channels come last here, try array.transpose(1, 2, 0)" if first else "")
        )
    if 0 in array.shape:
        raise ValueError(f"the array has no pixels: {shape}")
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: {image.width} x {image.height}")
    try:
        image.load()  # so far only the header has been read
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise OSError(f"{name} is damaged or truncated: {error}") from None
    with contextlib.suppress(Exception):  # a broken EXIF block is no reason to refuse the picture
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _to_8_bits(image, name).convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point pixels, whose range nobody knows: scale it to 8 bits first")
    if image.mode == "La":  # premultiplied; Pillow takes this one step at a time
        image = image.convert("LA")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has the mode {image.mode}, which cannot be made RGB: {error}") from None


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """16 bits of grey, scaled: Pillow would clip them at 255. A strip at a time, so that it takes little memory.

    Mode "I" is what Pillow makes of some 16-bit files (PGM, TIFF); more bits than 16 have no agreed range.
    """
    width, height = image.size
    grey = Image.new("L", image.size)
    lowest, highest = math.inf, -math.inf
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        values = np.asarray(image.crop((0, top, width, min(top + rows, height)))).astype(np.int64)
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
        strip = (values + 128) // 257
        if (transparent := image.info.get("transparency")) is not None:  # one grey level, in PNG files
            strip[values == transparent] = 255
        grey.paste(Image.fromarray(strip.astype(np.uint8)), (0, top))
    if lowest < 0 or highest > 65535:
        raise ValueError(f"{name} has values from {lowest} to {highest}, beyond 16 bits: scale it first")
    return grey


# A pixel has 256 values, so the arithmetic on it is done once. Each step rounds as in the reference: the product in
# float64, then float32.
_NORMALIZED = ((np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


def preprocess(image: Image.Image, image_size: int) -> torch.Tensor:
    """RGB picture -> float32 [3, image_size, image_size] in [-1, 1].

    Squashed to a square without keeping the aspect (which is why boxes are relative to the picture), antialiased
    bicubic, then (x / 255 - 0.5) / 0.5. Bit-equal to transformers' PIL path. big_vision resizes bilinearly.
    """
    pixels = np.asarray(image.resize((image_size, image_size), Image.Resampling.BICUBIC))  # [H, W, 3] uint8
    return torch.from_numpy(_NORMALIZED[pixels].transpose(2, 0, 1).copy())  # [3, H, W]


# ------------------------------------------------------------------------------------------------------- tokenizer

# The ids of the published vocabulary. All of it is Gemma's, but for 1,024 + 128 + 1 tokens at the end.
OFFICIAL_SIZE = 257153
OFFICIAL_IDS = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "\n": 108,
    "<loc0000>": 256000,
    "<seg000>": 257024,
    IMAGE: 257152,
}


class Tokenizer:
    """Text <-> ids, for a vocabulary of Gemma's kind: BPE with byte fallback, a space is a U+2581, nothing is added.

    `backend` is a `tokenizers.Tokenizer`; it is checked, not copied. `load_tokenizer` reads one from a folder.
    Raises ValueError when a token that PaliGemma needs is missing or out of place.
    """

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    image_token_id: int
    newline_token_id: int
    first_loc_id: int  # <loc0000>; the 1024 follow each other
    first_seg_id: int  # <seg000>; the 128 follow each other

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        # In some files <loc> and <seg> are in the vocabulary without being marked as whole tokens, and would be spelt
        # out letter by letter. Marking them adds no ids.
        answer_tokens = LOCATIONS + SEGMENTS
        known = [backend.token_to_id(token) for token in answer_tokens]
        if None not in known and self.encode("".join(answer_tokens)) != known:
            backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in answer_tokens])

        problems = self._problems()
        if problems:
            raise ValueError(_does_not_fit(problems))

        ids: dict[str, Any] = {token: backend.token_to_id(token) for token in OFFICIAL_IDS}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = ids["<bos>"], ids["<eos>"], ids["<pad>"]
        self.image_token_id, self.newline_token_id = ids[IMAGE], ids["\n"]
        self.first_loc_id, self.first_seg_id = ids["<loc0000>"], ids["<seg000>"]

        # What decoding leaves out: all that is marked special, and never the answer's own tokens.
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        special |= {self.bos_token_id, self.eos_token_id, self.pad_token_id, self.image_token_id}
        self._dropped = frozenset(special.difference(known))
        self._bytes = frozenset(backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))

    def encode(self, text: str) -> list[int]:
        """The ids of `text` and nothing else: no `<bos>`, no `<eos>`. What looks like a token ("<loc0001>", but also
        "<bos>" typed by a user) becomes that token, as in transformers."""
        self.backend.no_truncation()  # a transformers tokenizer shares its backend with us and leaves these on
        self.backend.no_padding()
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"expected text in Unicode, got {text!r}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (a list, an array or a tensor of one row). `<locNNNN>` and `<segNNN>` are kept as text;
        `<bos>`, `<eos>`, `<pad>`, `<image>` and ids outside the vocabulary are dropped. Bytes that are not UTF-8 give
        one U+FFFD each."""
        return self.backend.decode(self._kept(ids), skip_special_tokens=False)

    def decode_stable(self, ids: Iterable[int]) -> str:
        """The part of `decode(ids)` that no later token can change: for streaming, since text that was shown cannot be
        taken back. A character outside the vocabulary is several byte tokens, and whether these are a character is
        known when the run of them ends. So a run at the end is held back."""
        kept = self._kept(ids)
        while kept and kept[-1] in self._bytes:
            kept.pop()
        return self.backend.decode(kept, skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        """The id of one entry of the vocabulary, written as it stands there ("▁cat"); None if there is none."""
        return self.backend.token_to_id(token)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` with which transformers loads it unchanged."""
        _write_whole(Path(folder), self._files())

    def __len__(self) -> int:
        """How many tokens there are. The model's embedding has more rows (a multiple of 64); those were never
        trained."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def _kept(self, ids: Iterable[int]) -> list[int]:
        return [i for i in map(int, ids) if i >= 0 and i not in self._dropped]

    def _files(self) -> dict[str, str]:
        self.backend.no_truncation()
        self.backend.no_padding()
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
            "processor_class": "PaliGemmaProcessor",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            **({"unk_token": "<unk>"} if self.token_to_id("<unk>") is not None else {}),
            "extra_special_tokens": {"image_token": IMAGE},
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "model_max_length": 10**30,
        }
        return {
            "tokenizer.json": self.backend.to_str(pretty=False),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    def _problems(self) -> list[str]:
        """What stands between this vocabulary and PaliGemma, in words."""
        expected = OFFICIAL_IDS if len(self) >= OFFICIAL_SIZE - 1 else {}
        problems = []
        for token in OFFICIAL_IDS:
            found = self.token_to_id(token)
            if found is None:
                problems.append(f"{token!r} is missing")
            elif found != expected.get(token, found):
                problems.append(f"{token!r} has id {found}, expected {expected[token]}")
            elif self.encode(token) != [found]:
                problems.append(f"{token!r} is split into {len(self.encode(token))} tokens")
            elif found >= len(self):
                problems.append(f"{token!r} has id {found}, beyond the {len(self)} tokens of the vocabulary")
        for family in (LOCATIONS, SEGMENTS):
            first = self.token_to_id(family[0])
            if first is None:
                continue  # said above
            for i, token in enumerate(family):
                found = self.token_to_id(token)
                if found != first + i:
                    was = "is missing" if found is None else f"has id {found}"
                    problems.append(f"{token!r} {was}, expected {first + i} ({len(family)} in a row from {family[0]})")
                    break
        return problems


def _does_not_fit(problems: list[str]) -> str:
    hint = "Use the tokenizer of the checkpoint itself."
    if any("<loc0000>" in problem and "missing" not in problem for problem in problems):
        hint = (
            "This is what becomes of a plain Gemma tokenizer when <image> is added before <loc> and <seg>. "
            "Use the tokenizer of the checkpoint itself."
        )
    elif any("<loc0000>" in problem for problem in problems):
        hint = "A plain Gemma tokenizer lacks what PaliGemma answers with. Use the tokenizer of the checkpoint itself."
    return f"the tokenizer does not fit PaliGemma: {'; '.join(problems)}. {hint}"


def check_tokenizer(tokenizer: Tokenizer, config: Any) -> None:
    """Raise one ValueError that names every token whose id is not what the model was trained with.

    `config` is a `PaliGemmaConfig`. (Whether the tokens are there, contiguous, and at the official ids in a vocabulary
    of the official size has been checked when the tokenizer was made.)
    """
    problems = []
    for token, found, expected in (
        (IMAGE, tokenizer.image_token_id, config.image_token_index),
        ("<pad>", tokenizer.pad_token_id, config.pad_token_id),
        ("<bos>", tokenizer.bos_token_id, config.bos_token_id),
        ("<eos>", tokenizer.eos_token_id, config.eos_token_id),
    ):
        if expected is not None and found != expected:
            problems.append(f"{token!r} has id {found}, expected {expected}")
    rows = config.text_config.vocab_size
    # <image> itself is never looked up, so a table that ends just before it (big_vision's) is whole.
    image_is_last = tokenizer.image_token_id == len(tokenizer) - 1
    if len(tokenizer) - image_is_last > rows:
        problems.append(f"it has {len(tokenizer)} tokens, the model's embedding only {rows} rows")
    if problems:
        raise ValueError(_does_not_fit(problems))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in `folder` (or the file itself): `tokenizer.json`, else `tokenizer.model` (sentencepiece).

    A sentencepiece model is read into the same `Tokenizer`. PaliGemma's own holds `<loc>` and `<seg>`, and `<image>`
    is added behind them; Gemma's own, which big_vision extends at run time, holds none of them, and all are added in
    big_vision's order: loc, seg, image. Any other mixture is an error.

    Raises FileNotFoundError, ValueError (unreadable, or not PaliGemma's: see `Tokenizer`), and ImportError when
    sentencepiece is needed and missing.
    """
    path = Path(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has no tokenizer: expected tokenizer.json or tokenizer.model")
        path = found[0]
    if path.suffix == ".model":
        backend = _read_sentencepiece(path)
    else:
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer.json that can be read: {error}") from None
    try:
        return Tokenizer(backend)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """A sentencepiece BPE model of Gemma's kind, rebuilt with `tokenizers`.

    Sentencepiece keeps a score for every piece and joins the neighbours whose union scores best; `tokenizers` wants
    that as a ranked list of pairs. So every piece is cut at every place, and the pairs are ranked by the piece's score.
    """
    try:
        import sentencepiece
    except ImportError:
        raise ImportError(
            f"reading {path.name} needs sentencepiece: pip install 'paligemma[bigvision]' (tokenizer.json does not)"
        ) from None
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # RuntimeError, OSError or TypeError, by version
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from None

    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    answer_tokens = {*LOCATIONS, *SEGMENTS, IMAGE}
    score: dict[str, float] = {}  # of what BPE may build
    whole: list[str] = []  # "user defined": matched in the text before BPE begins
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i):
            continue
        # The Python binding does not tell the type. User-defined pieces score +0.0, the first learned one -0.0.
        user_defined = model.get_score(i) == 0 and math.copysign(1, model.get_score(i)) > 0
        if user_defined or piece in answer_tokens:
            whole.append(piece)
        else:
            score[piece] = model.get_score(i)
    if "\t" not in pieces and "<0x09>" in pieces:
        # Gemma's model knows runs of tabs, but one tab only as a byte; pairs need it under its name.
        pieces[pieces.index("<0x09>")] = "\t"
        score["\t"] = 0.0
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in score
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    pairs.sort(key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0])))

    vocab = {piece: i for i, piece in enumerate(pieces)}
    unknown = pieces[model.unk_id()]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=True) for piece in whole])

    probe = "answer en how  many dogs?\n\n\t12 Ünï 象 🦒 <loc> ; " + " ".join(list(score)[-200:])
    if backend.encode(probe, add_special_tokens=False).ids != model.encode(probe):
        raise ValueError(f"{path} splits text in another way than Gemma's tokenizers do (BPE, no dummy space in front)")

    special = [piece for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    backend.add_special_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in special])
    if not any(token in vocab for token in ("<loc0000>", "<seg000>", IMAGE)):
        backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in LOCATIONS + SEGMENTS])
    if IMAGE not in vocab:
        backend.add_special_tokens([tokenizers.AddedToken(IMAGE, normalized=False)])
    return backend


# ------------------------------------------------------------------------------------------------------- processor


class PaliGemmaProcessor:
    """Prompts, pictures and (for training) answers -> what the model takes.

    `tokenizer`: a `Tokenizer`, or a fast transformers tokenizer of a PaliGemma checkpoint.
    `num_image_tokens`: N, patches per image: 256, 1024, 4096 at 224, 448, 896 pixels.
    `image_size`: side of the square the pictures are brought to, in pixels.
    """

    def __init__(self, tokenizer: Any, num_image_tokens: int, image_size: int) -> None:
        if not isinstance(tokenizer, Tokenizer):
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise TypeError(
                    "expected a tokenizer of load_tokenizer(folder) or a fast one of transformers, "
                    f"got {type(tokenizer).__name__}"
                )
            tokenizer = Tokenizer(backend)
        for name, value in (("num_image_tokens", num_image_tokens), ("image_size", image_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive whole number")
        self.tokenizer: Tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.image_size = image_size

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any,
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
        (or the `processor_config.json` that newer transformers write), else `config.json`."""
        folder = Path(folder)
        return cls(load_tokenizer(folder), *_image_settings(folder))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`, `tokenizer.json` and `tokenizer_config.json`, which `from_pretrained` and
        transformers' `AutoProcessor` read. Existing files are replaced only when all new ones are complete."""
        config = {
            "processor_class": "PaliGemmaProcessor",
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": self.num_image_tokens,
            "size": {"height": self.image_size, "width": self.image_size},
            "do_convert_rgb": True,
            **_IMAGE_SETTINGS,
        }
        files = self.tokenizer._files()
        _write_whole(Path(folder), {**files, "preprocessor_config.json": json.dumps(config, indent=2) + "\n"})


def _rows_of_images(images: Any, prompts: int) -> list[list[Any]]:
    """A list of images for every prompt."""
    if images is None:
        return [[] for _ in range(prompts)]
    rows = images if isinstance(images, list) else [images]
    if len(rows) != prompts:
        raise ValueError(
            f"{prompts} prompts and images for {len(rows)} rows: give one for each prompt "
            "(a tuple of images is one row that sees all of them)"
        )
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in rows]
    for index, row in enumerate(rows):
        if not row or any(image is None for image in row):
            raise ValueError(f"row {index} has no image; images=None makes a batch without any")
    return rows


def _suffixes(suffix: str | Sequence[str] | None, prompts: int) -> list[str] | None:
    if suffix is None:
        return None
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
_IMAGE_SETTINGS: dict[str, Any] = {
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _image_settings(folder: Path) -> tuple[int, int]:
    """(tokens per image, side in pixels) out of the files of a checkpoint."""
    config: dict[str, Any] = _read_json(folder / "config.json") or {}
    settings = _read_json(folder / "preprocessor_config.json")
    if settings is None:
        settings = (_read_json(folder / "processor_config.json") or {}).get("image_processor")
    if settings is None and "vision_config" not in config:
        raise FileNotFoundError(f"{folder} has neither preprocessor_config.json nor a config.json with vision_config")
    settings = settings or {}
    for key, expected in _IMAGE_SETTINGS.items():
        found = settings.get(key)
        if found not in (None, expected) and not (key == "rescale_factor" and abs(found - expected) < 1e-9):
            raise ValueError(f"{folder}: the preprocessor's {key} is {found!r}; PaliGemma's images have {expected!r}")

    vision = config.get("vision_config") or {}
    size = settings.get("size", vision.get("image_size", 224))  # published 224 configurations leave image_size out
    if isinstance(size, dict):
        size = size.get("height") if size.get("height") == size.get("width") else size
    if type(size) is not int:
        raise ValueError(f"{folder}: the preprocessor's size is {size!r}, expected equal height and width")
    return settings.get("image_seq_length", (size // vision.get("patch_size", 14)) ** 2), size


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are the former
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _write_whole(folder: Path, files: dict[str, str]) -> None:
    """Write all files beside their final names, then rename them: a full disk leaves the old ones as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for path, temporary in beside.items():
            temporary.write_text(files[path.name], encoding="utf-8")
        for path, temporary in beside.items():
            os.replace(temporary, path)
    finally:
        for temporary in beside.values():
            temporary.unlink(missing_ok=True)
