"""Rows as the model will see them, drawn.

    show(open_rows("my.jsonl")[0], processor).save("row.png")
    show_rows(rows[:4], processor, codec)         # one under the other, padded to the same length, as in a batch

For every row: its picture resized to the square that the model gets, with the boxes and masks of the suffix on it; its
tokens, coloured by type, each over its label (what the model has to write *in this place*: labels are the row itself,
-100 where nothing is learned; the loss compares each with the prediction made one token earlier); and the prefix-LM
mask. The tokens, labels and the mask are those of training, made by the same functions; only runs of image and padding
tokens are drawn as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from paligemma.answers.drawing import draw, font_for, one_line
from paligemma.answers.parsing import parse
from paligemma.attention_mask import prefix_lm_mask
from paligemma.data.rows import Row
from paligemma.images import load_image
from paligemma.processing_paligemma import IGNORED, PaliGemmaProcessor

if TYPE_CHECKING:
    from paligemma.answers.mask_codec import MaskCodec

COLORS = {  # by type of token
    "image": (203, 213, 232),
    "prefix": (179, 226, 205),
    "suffix": (253, 205, 172),
    "eos": (244, 160, 160),
    "padding": (232, 232, 232),
}
INK, FAINT, PAPER = (20, 20, 20), (120, 120, 120), (255, 255, 255)
MARGIN = 12
PICTURE = 320  # pixels; a smaller square is enlarged to about this, so that labels can be read
MASK = 150
MOST = 500  # tokens drawn of a row
IMAGE_ROWS = 4  # the mask shows so many of the tokens of each picture


@dataclass(frozen=True)
class Chip:
    """A token, or a run of them, as it is drawn."""

    kind: str
    text: str
    label: str
    places: list[int]  # which positions of the row it stands for


def show(
    row: Row,
    processor: PaliGemmaProcessor,
    codec: MaskCodec | None = None,
    loc_scale: int = 1024,
    max_length: int | None = None,
    width: int = 1000,
    max_pixels: int | None = None,
) -> Image.Image:
    """One row as a picture of `width` pixels; max_length cuts it as training would. See `show_rows`."""
    return show_rows([row], processor, codec, loc_scale, max_length, width, max_pixels)


def show_rows(
    rows: Sequence[Row],
    processor: PaliGemmaProcessor,
    codec: MaskCodec | None = None,
    loc_scale: int = 1024,
    max_length: int | None = None,
    width: int = 1000,
    max_pixels: int | None = None,
) -> Image.Image:
    """Several rows one under the other, padded on the right to the longest, as in a training batch.

    codec: draws the masks of <seg> tokens; without one only their boxes are drawn. max_pixels: see `load_image`.
    Raises what the processor and `load_image` raise.
    """
    if not rows:
        raise ValueError("there are no rows to show")
    inputs = processor.lay_out(
        [row.prefix for row in rows],
        [len(row.pictures) for row in rows],
        [row.suffix for row in rows],
        padding_side="right",
        max_length=max_length,
    )
    allowed = prefix_lm_mask(inputs["token_type_ids"], inputs["attention_mask"].bool())[:, 0].numpy()  # [B, S, S]
    panels = []
    for i, row in enumerate(rows):
        ids, types, valid, labels = (
            inputs[name][i].tolist() for name in ("input_ids", "token_type_ids", "attention_mask", "labels")
        )
        chips = list(_chips(ids, types, valid, labels, processor))
        squares = [_resized(load_image(picture, max_pixels), processor.image_size) for picture in row.pictures]
        panels.append(_panel(row, squares, chips, allowed[i], codec, loc_scale, width))
    sheet = Image.new("RGB", (width, sum(panel.height for panel in panels)), PAPER)
    top = 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet


def _chips(
    ids: list[int], types: list[int], valid: list[int], labels: list[int], processor: PaliGemmaProcessor
) -> Iterator[Chip]:
    tokenizer = processor.tokenizer
    i = 0
    while i < len(ids):
        kind = "padding" if not valid[i] else "image" if ids[i] == tokenizer.image_token_id else "prefix"
        if valid[i] and types[i]:
            kind = "eos" if ids[i] == tokenizer.eos_token_id else "suffix"
        end = i + 1
        if kind in ("padding", "image"):
            # All padding is one chip; so is every picture.
            most = processor.num_image_tokens if kind == "image" else len(ids)
            while end < len(ids) and end - i < most and ids[end] == ids[i] and valid[end] == valid[i]:
                end += 1
        text = (tokenizer.backend.id_to_token(ids[i]) or "?").replace("▁", "·")
        if not text.isprintable():
            text = repr(text)[1:-1]  # as "\n" or "\u200d"
        if end - i > 1:
            text += f" x {end - i}"
        yield Chip(kind, text, "-" if labels[i] == IGNORED else str(labels[i]), list(range(i, end)))
        i = end


def _panel(
    row: Row,
    squares: list[Image.Image],
    chips: list[Chip],
    allowed: np.ndarray,
    codec: MaskCodec | None,
    loc_scale: int,
    width: int,
) -> Image.Image:
    """One row: its pictures on the left; on the right where it stands, the legend, its tokens and the mask."""
    pictures = _with_answer(squares, row, codec, loc_scale)
    tall = 40 * (MOST + 1) + PICTURE * (len(pictures) + 2) + 2 * MASK  # more than enough; cropped at the end
    canvas = Image.new("RGB", (width, tall), PAPER)
    pen = ImageDraw.Draw(canvas)
    left, bottom = _paste_pictures(canvas, pictures)
    _write_head(pen, row, left)
    _draw_legend(pen, left, MARGIN + 24)
    drawn = chips
    if len(chips) > MOST:
        drawn = [*chips[:MOST], Chip("padding", f"and {len(chips) - MOST} more", "", [])]
    y = _draw_chips(pen, drawn, left, MARGIN + 48, width - MARGIN) + MARGIN
    mask = _mask_picture(chips, allowed)
    canvas.paste(mask, (left, y))
    lines = [
        "attention mask: a line for each token that attends, a column for each token it may attend to",
        f"(of each picture {IMAGE_ROWS} tokens at most; colours as above, white: masked)",
        f"{len(allowed)} tokens, {sum(chip.label != '-' for chip in chips)} of them learned (number under the token)",
    ]
    for k, line in enumerate(lines):
        pen.text((left + mask.width + MARGIN, y + 16 * k), line, fill=FAINT, font=font_for("", 12))
    bottom = max(bottom, y + mask.height + MARGIN)
    pen.line((0, bottom, width, bottom), fill=COLORS["padding"])
    return canvas.crop((0, 0, width, bottom + 1))


def _with_answer(pictures: list[Image.Image], row: Row, codec: MaskCodec | None, loc_scale: int) -> list[Image.Image]:
    """The pictures of a row as the model gets them. Boxes are drawn on the only one, or on the first."""
    pictures = list(pictures)
    if pictures:
        parsed = parse(row.suffix, pictures[0].size, loc_scale, codec)
        pictures[0] = draw(pictures[0], [*parsed.detections, *parsed.segments])
    if len(pictures) > 1:  # two beside each other, smaller
        half = PICTURE // 2
        pictures = [picture.resize((half, half), Image.Resampling.BICUBIC) for picture in pictures]
    return pictures


def _paste_pictures(canvas: Image.Image, pictures: list[Image.Image]) -> tuple[int, int]:
    """Returns the right and lower border of what they take."""
    right, bottom = MARGIN, MARGIN
    for k, picture in enumerate(pictures):
        at = MARGIN + k % 2 * (picture.width + MARGIN), MARGIN + k // 2 * (picture.height + MARGIN)
        canvas.paste(picture, at)
        right, bottom = max(right, at[0] + picture.width + MARGIN), at[1] + picture.height + MARGIN
    return right, bottom


def _write_head(pen: ImageDraw.ImageDraw, row: Row, left: int) -> None:
    source = one_line(row.source)
    answers = len(set(row.suffixes))  # ten people may have given the same
    turn = f"   (one of {answers} answers, which are learned in turn)" if answers > 1 else ""
    pen.text((left, MARGIN), f"row {row.number}   {source}{turn}", fill=INK, font=font_for(source, 14))


def _draw_legend(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    names = {"prefix": "prefix (· is a space)", "eos": "end"}
    for kind, color in COLORS.items():
        name = names.get(kind, kind)
        pen.rectangle((x, y + 2, x + 11, y + 13), fill=color)
        pen.text((x + 16, y), name, fill=FAINT, font=font_for("", 12))
        x += 28 + round(font_for("", 12).getlength(name))


def _resized(picture: Image.Image, size: int) -> Image.Image:
    """Resized to the model's square, then each pixel enlarged if that is small."""
    square = picture.resize((size, size), Image.Resampling.BICUBIC)
    times = max(1, PICTURE // size)
    return square.resize((size * times, size * times), Image.Resampling.NEAREST)


def _draw_chips(pen: ImageDraw.ImageDraw, chips: list[Chip], left: int, top: int, right: int) -> int:
    """Tokens as coloured boxes with their label below, line by line. Returns where they end."""
    small = font_for("0", 10)
    x, y, height = left, top, 34
    for chip in chips:
        font = font_for(chip.text, 13)
        wide = round(max(font.getlength(chip.text), small.getlength(chip.label))) + 8
        if x + wide > right and x > left:
            x, y = left, y + height + 4
        pen.rectangle((x, y, x + wide - 1, y + 19), fill=COLORS[chip.kind])
        pen.text((x + wide / 2, y + 10), chip.text, fill=INK, font=font, anchor="mm")
        pen.text((x + wide / 2, y + 27), chip.label, fill=INK if chip.label != "-" else FAINT, font=small, anchor="mm")
        x += wide + 3
    return y + height


def _mask_picture(chips: list[Chip], allowed: np.ndarray) -> Image.Image:
    """allowed: bool [S, S]. A cell where attention is allowed has the colour of the token that is attended to."""
    places = [
        (place, chip.kind) for chip in chips for place in chip.places[: IMAGE_ROWS if len(chip.places) > 1 else 1]
    ]
    places = places[:: -(-len(places) // (2 * MASK))]  # a long row is thinned out
    index = [place for place, _ in places]
    colors = np.array([COLORS[kind] for _, kind in places], np.float64) * 0.8
    cells = np.where(allowed[np.ix_(index, index)][:, :, None], colors[None], 255).astype(np.uint8)  # [n, n, 3]
    times = max(1, MASK // len(index))
    image = Image.fromarray(cells).resize((len(index) * times, len(index) * times), Image.Resampling.NEAREST)
    framed = Image.new("RGB", (image.width + 2, image.height + 2), FAINT)
    framed.paste(image, (1, 1))
    return framed
