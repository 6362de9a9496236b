"""One row as a picture: the truth on the left, the model's answer on the right, prompt and texts below."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

from paligemma.answers.drawing import draw, font_for, one_line
from paligemma.evaluate.examples import Example, Prediction
from paligemma.images import load_image

SIDE = 400  # pixels of the longer side of each picture
MARGIN = 12
FONT_SIZE = 15
LINE = FONT_SIZE + 5


def compare(example: Example, prediction: Prediction) -> Image.Image:
    """An RGB picture. Boxes and masks are drawn on the row's first picture: the true ones left, those of the answer
    right. A row without any shows all its pictures, and one without a picture only its texts."""
    images = [load_image(one) for one in example.images]
    if images and (example.regions or prediction.regions):
        shown = {"truth": (images[0], example.regions), "answer": (images[0], prediction.regions)}
    else:
        names = [f"picture {k}" for k in range(1, len(images) + 1)] if len(images) > 1 else [""]
        shown = {name: (image, ()) for name, image in zip(names, images)}
    sides = {
        name: draw(image, list(regions), scale=SIDE / max(image.size))  # type: ignore[arg-type]
        for name, (image, regions) in shown.items()
    }
    width = max(SIDE + 2 * MARGIN, sum(side.width for side in sides.values()) + MARGIN * (len(sides) + 1))
    lines = [f"prompt: {example.prompt}"]
    if example.answers:
        lines.append("right: " + " | ".join(answer or "(nothing)" for answer in dict.fromkeys(example.answers)))
    lines.append(f"answer: {prediction.text or '(nothing)'}  (score {prediction.score:.2f})")
    lines += [f"invalid: {reason}" for reason in prediction.invalid]
    lines = [one_line(line.replace("\n", "\\n")) for line in lines]
    font = font_for("".join(lines), FONT_SIZE)
    wrapped = [part for line in lines for part in _wrap(line, width - 2 * MARGIN, font)[:6]]
    top = MARGIN + (LINE if any(sides) else 0)  # the names stand above the pictures
    bottom = top + max((side.height for side in sides.values()), default=0) + MARGIN
    canvas = Image.new("RGB", (width, bottom + len(wrapped) * LINE + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    x = MARGIN
    for name, side in sides.items():
        pen.text((x, MARGIN - 4), name, fill="gray", font=font_for(name, FONT_SIZE))
        canvas.paste(side, (x, top))
        x += side.width + MARGIN
    for k, line in enumerate(wrapped):
        pen.text((MARGIN, bottom + k * LINE), line, fill="black", font=font)
    return canvas


def _wrap(line: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks a line into parts of about `width` pixels, using the mean width of its characters."""
    return textwrap.wrap(line, max(10, int(0.95 * width * len(line) / max(font.getlength(line), 1))))
