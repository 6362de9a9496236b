"""Draws the curves of a run from its log, with Pillow only.

python -m paligemma.tiny.recipe.plot runs/tiny/joint-01/log.jsonl --values words loc_bins --out curve.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 360, 240  # of a panel
COLORS = ((36, 104, 228), (222, 60, 40), (46, 140, 62), (150, 70, 180), (230, 140, 20), (90, 90, 90))
Series = dict[str, list[tuple[float, float]]]  # name -> (minutes, value)


def read_curves(logs: Sequence[Path], names: Sequence[str]) -> Series:
    """Values of several `log.jsonl`, one run after the other, over minutes of training."""
    curves: Series = {name: [] for name in names}
    minutes = 0.0
    for line in (line for log in logs for line in log.read_text().splitlines()):
        entry = json.loads(line)
        minutes += entry.get("seconds", 0.0) / 60
        for name in names:
            if name in entry:
                curves[name].append((minutes, entry[name]))
    return curves


def draw_curves(panels: Sequence[Series]) -> Image.Image:
    """Panels side by side, each with axes from 0, one line per series and the names in the lines' colours above."""
    picture = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for i, series in enumerate(panels):
        left, top, right, bottom = i * WIDTH + 44, 30, (i + 1) * WIDTH - 14, HEIGHT - 34
        points = [point for line in series.values() for point in line]
        if not points:
            continue
        x_most, y_most = max(x for x, _ in points) or 1.0, max(y for _, y in points) or 1.0
        draw.line((left, top, left, bottom, right, bottom), (120, 120, 120))
        for share in (0.0, 0.5, 1.0):
            y = bottom - share * (bottom - top)
            draw.text((left - 6, y), f"{share * y_most:.3g}", (90, 90, 90), font, anchor="rm")
            x = left + share * (right - left)
            draw.text((x, bottom + 4), f"{share * x_most:.0f}", (90, 90, 90), font, anchor="ma")
            draw.line((left, y, right, y), (230, 230, 230))
        draw.text(((left + right) / 2, HEIGHT - 14), "minutes", (90, 90, 90), font, anchor="ma")
        place_of_name = float(left)
        for k, (name, line) in enumerate(series.items()):
            color = COLORS[k % len(COLORS)]
            place = [
                (left + x / x_most * (right - left), bottom - min(y / y_most, 1.0) * (bottom - top)) for x, y in line
            ]
            draw.line(place, color, 2)
            draw.text((place_of_name, 8), name, color, font)
            place_of_name += draw.textlength(name + "   ", font)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curve of a run.")
    parser.add_argument("logs", type=Path, nargs="+", help="log.jsonl of one run after the other")
    parser.add_argument("--values", nargs="+", default=["answers", "words"], help="one panel each; a+b share a panel")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    panels = [read_curves(args.logs, value.split("+")) for value in args.values]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(panels).save(args.out)


if __name__ == "__main__":
    main()
