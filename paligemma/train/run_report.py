"""report.html: a run in one page that needs nothing else: figures, curves, examples, settings.

Curves are drawn as SVG, pictures are inside the page. Everything that a model or a data set wrote is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from paligemma.answers.drawing import draw
from paligemma.evaluate.examples import Example, Prediction
from paligemma.evaluate.report import Figure, rounded
from paligemma.evaluate.text import exact_match
from paligemma.files import write_text
from paligemma.images import load_image

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 520, 240  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 34
MOST_POINTS = 400
COLORS = ("#2563a8", "#c2571a", "#2f7d4f", "#8b3fa0", "#a08019", "#b03060")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1120px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.sub { color: #59636e; margin: .2rem 0 1.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { color: #59636e; font-weight: 500; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr > * { border-top: 1px solid #e4e8ec; }
.charts { display: flex; flex-wrap: wrap; gap: 1.2rem; } figure { margin: 0; }
figcaption { font-size: .9rem; color: #59636e; margin-bottom: .2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1rem; }
.card { border: 1px solid #d8dee4; border-radius: 8px; padding: .7rem; font-size: .88rem; overflow-wrap: anywhere; }
.card .pictures { display: flex; gap: .4rem; } .card figure { flex: 1; min-width: 0; }
.card img { width: 100%; border-radius: 4px; display: block; } .card figcaption { font-size: .75rem; margin: 0; }
.card p { margin: .4rem 0 0; } .card b { color: #59636e; font-weight: 500; }
.same { color: #1f6f43; } .other { color: #a3320b; } code { font-size: .88em; overflow-wrap: anywhere; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .8em; }
"""


def write_report(
    path: Path,
    title: str,
    summary: Mapping[str, str],
    log: Sequence[Mapping[str, Any]],
    figures: Sequence[Figure],
    examples: Sequence[tuple[Example, Prediction]],
    settings: Mapping[str, Any],
    note: str = "",
) -> None:
    """The page. log: the entries of log.jsonl. figures: of the finished model. examples: with their pictures. note: on
    what rows the figures and examples are."""
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(note)}</p>', rows_of(summary)]
    if figures:
        parts += ["<h2>Final figures</h2>", table_of(figures)]
    parts += ["<h2>Curves</h2>", '<div class="charts">', *charts(log), "</div>"]
    if examples:
        parts += ["<h2>Examples</h2>", '<div class="cards">', *(card(*pair) for pair in examples), "</div>"]
    skipped = [entry for entry in log if "skipped" in entry]
    if skipped:
        listed = {str(entry["skipped"]): str(entry["error"]) for entry in skipped[:20]}
        parts += [f"<h2>Skipped rows: {len(skipped):,}</h2>", rows_of(listed)]
    shown = {key: "" if value is None else str(value) for key, value in settings.items()}
    parts += ["<h2>Settings</h2>", rows_of(shown, code=True)]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    write_text(path, page)


def escape(text: Any) -> str:
    return html.escape(str(text))


def rows_of(values: Mapping[str, str], code: bool = False) -> str:
    cell = "<code>{}</code>" if code else "{}"
    lines = (f"<tr><th>{escape(key)}</th><td>{cell.format(escape(value))}</td></tr>" for key, value in values.items())
    return f"<table>{''.join(lines)}</table>"


def table_of(figures: Sequence[Figure]) -> str:
    several = len({figure.task for figure in figures}) > 1
    lines = ["<tr><th>figure</th><th>value</th><th>95% interval</th><th>commonest answer</th><th>rows</th></tr>"]
    for figure in figures:
        name = f"{figure.task}: {figure.name}" if several else figure.name
        interval = "" if figure.low is None else f"{rounded(figure.low)} … {rounded(figure.high)}"
        baseline = "" if figure.baseline is None else rounded(figure.baseline)
        cells = "".join(f'<td class="n">{escape(cell)}</td>' for cell in (rounded(figure.value), interval, baseline))
        lines.append(f'<tr><td>{escape(name)}</td>{cells}<td class="n">{figure.rows:,}</td></tr>')
    return f"<table>{''.join(lines)}</table>"


# --- curves ---------------------------------------------------------------------------------------


def charts(log: Sequence[Mapping[str, Any]]) -> list[str]:
    def points(name: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[name]) for entry in log if isinstance(entry.get(name), (int, float))]

    drawn = []
    if loss := points("loss"):
        drawn.append(chart("loss per answer token", {"each step": loss, "smoothed": smooth(loss)}, faint="each step"))
    measured: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        for name, value in (entry.get("validation") or {}).items():
            if isinstance(value, (int, float)):
                measured.setdefault(name, []).append((entry["step"], value))
    together = {name: line for name, line in measured.items() if all(0 <= y <= 1 for _, y in line)}
    names = list(together)
    for start in range(0, len(names), len(COLORS)):
        some = {name: together[name] for name in names[start : start + len(COLORS)]}
        drawn.append(chart("validation, on answers the model wrote", some, bounds=(0.0, 1.0)))
    drawn += [chart(f"validation: {name}", {name: line}) for name, line in measured.items() if name not in together]
    if accuracy := points("accuracy"):
        drawn.append(chart("share of answer tokens predicted right", {"training": smooth(accuracy)}, bounds=(0.0, 1.0)))
    if gradient := points("gradient"):
        drawn.append(chart("norm of the gradient before clipping", {"norm": smooth(gradient)}))
    if rate := points("lr"):
        drawn.append(chart("learning rate, as a share of its peak", {"rate": rate}))
    return drawn


def smooth(points: Points) -> list[tuple[float, float]]:
    """A running mean over the last 2% of all points."""
    keep = 1 - 1 / max(1.0, 0.02 * len(points))
    value, weight, line = 0.0, 0.0, []
    for x, y in points:
        value, weight = keep * value + (1 - keep) * y, keep * weight + (1 - keep)
        line.append((x, value / weight))
    return line


def thin(points: Points) -> list[tuple[float, float]]:
    """At most about MOST_POINTS, the last among them."""
    stride = max(1, len(points) // MOST_POINTS)
    return [*points[::-1][::stride]][::-1]


def chart(
    title: str, lines: Mapping[str, Points], bounds: tuple[float, float] | None = None, faint: str | None = None
) -> str:
    """A line chart as SVG. faint: the line that is only a background."""
    lines = {name: thin(points) for name, points in lines.items()}
    xs = [x for points in lines.values() for x, _ in points]
    ys = sorted(y for points in lines.values() for _, y in points if math.isfinite(y))
    low, high = bounds or (min(0.0, ys[0]), ys[min(len(ys) - 1, int(0.995 * len(ys)))])  # a spike may leave the chart
    ticks = nice_ticks(low, high if high > low else low + 1)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = 0.0, max(max(xs), 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        up = (min(max(y, low), high) - low) / (high - low)
        return across, HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for tick in ticks:
        _, y = place(first, tick)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e8ec"/>')
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in nice_ticks(first, last):
        if first <= tick <= last:
            x, _ = place(tick, low)
            drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,g}</text>')
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">steps</text>')
    keys = []
    colors = iter(COLORS)
    for name, points in lines.items():
        color = "#b9c6d6" if name == faint else next(colors)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points if math.isfinite(point[1])))
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{1 if name == faint else 2}"/>'
        )
        if len(points) <= 30 and name != faint:
            drawn += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in (place(*p) for p in points)
            ]
        keys.append(f'<span class="key" style="background:{color}"></span>{escape(name)}')
    legend = "".join(keys) if len(lines) > 1 else ""
    title = escape(title)
    return (
        f"<figure><figcaption>{title}{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{title}" '
        f'font-size="12" fill="#59636e" style="max-width:100%;height:auto">{"".join(drawn)}</svg></figure>'
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers, from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / 5))
    step *= next((factor for factor in (1, 2, 5) if span / (step * factor) <= 5 + 1e-6), 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


# --- examples -------------------------------------------------------------------------------------


def card(example: Example, prediction: Prediction, side: int = 360) -> str:
    """Prompt, truth and answer under the pictures; with boxes or masks the first one twice."""
    images = [load_image(one) for one in example.images]
    shown: list[tuple[str, Image.Image, Sequence[Any]]] = [("", image, ()) for image in images]
    if images and (example.regions or prediction.regions):
        shown = [("truth", images[0], example.regions), ("answer", images[0], prediction.regions)]
    pictures = ""
    for name, image, regions in shown:
        drawn = draw(image, list(regions), scale=side / max(image.size))
        pictures += (
            f'<figure><img alt="{name or "picture"}" src="{inline(drawn)}"><figcaption>{name}</figcaption></figure>'
        )
    truth = " | ".join(dict.fromkeys(example.answers)) or ", ".join(region.label for region in example.regions)
    same = "same" if exact_match(prediction.text, example.answers) else "other"
    lines = [
        f"<p><b>prompt</b> {escape(example.prompt)}</p>",
        f"<p><b>truth</b> {escape(truth or '(nothing)')}</p>",
        f'<p><b>answer</b> <span class="{same if example.answers else ""}">{escape(prediction.text or "(nothing)")}'
        f"</span> ({prediction.score:.2f})</p>",
        *(f'<p class="other">invalid: {escape(reason)}</p>' for reason in prediction.invalid),
    ]
    return f'<div class="card"><div class="pictures">{pictures}</div>{"".join(lines)}</div>'


def inline(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
