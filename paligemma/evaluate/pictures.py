"""A row that went wrong, to look at: the truth on the left, the answer on the right, the words below."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

from paligemma.draw import draw
from paligemma.evaluate.rows import Example, Prediction
from paligemma.processing_paligemma import load_image

SIDE = 400  # pixels of the longer side of each half
MARGIN = 12
FONT_SIZE = 15


def compare(example: Example, prediction: Prediction) -> Image.Image:
    """RGB. Of a row with several pictures the first one is shown."""
    image = load_image(example.image[0] if isinstance(example.image, tuple) else example.image)
    scale = SIDE / max(image.size)
    sides = [draw(image, list(items), scale=scale) for items in (example.regions, prediction.regions)]  # type: ignore[arg-type]
    if not example.regions and not prediction.regions:
        sides = sides[:1]
    width = sum(side.width for side in sides) + MARGIN * (len(sides) + 1)
    font = ImageFont.load_default(FONT_SIZE)
    lines = [f"prompt: {example.prompt}"]
    if example.answers:
        lines.append("right: " + " | ".join(answer or "(nothing)" for answer in dict.fromkeys(example.answers)))
    lines.append(f"answer: {prediction.text or '(nothing)'}  (score {prediction.score:.2f})")
    lines += [f"invalid: {reason}" for reason in prediction.invalid]
    wrapped = [part for line in lines for part in _wrap(line, width - 2 * MARGIN, font)[:6]]
    height = max(side.height for side in sides) + 2 * MARGIN + len(wrapped) * (FONT_SIZE + 5) + MARGIN
    canvas = Image.new("RGB", (width, height), "white")
    x = MARGIN
    for side in sides:
        canvas.paste(side, (x, MARGIN))
        x += side.width + MARGIN
    pen = ImageDraw.Draw(canvas)
    y = max(side.height for side in sides) + 2 * MARGIN
    for line in wrapped:
        pen.text((MARGIN, y), line, fill="black", font=font)
        y += FONT_SIZE + 5
    return canvas


def _wrap(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """In parts of about `width` pixels, going by the line's mean width of a character."""
    return textwrap.wrap(line, max(10, int(0.95 * width * len(line) / max(font.getlength(line), 1))))
