"""A record as a picture: how close every model comes to the machine's limits. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paligemma.bench.tables import title
from paligemma.files import written_whole

OURS, THEIRS, LIMIT = "#3b6fb6", "#9a9a9a", "#c8452d"


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes a PNG. Raises ImportError where matplotlib is missing, ValueError where nothing was measured."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        raise ImportError("the picture needs matplotlib: pip install matplotlib") from None

    summary = record["summary"]
    models = summary["contestants"]
    if not models:
        raise ValueError("the record holds no finished run: there is nothing to draw")
    names = list(models)
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(names)), layout="constrained")
    figure.suptitle(title(record), fontsize=10)
    first, decode = figure.subplots(1, 2)

    for axes, key, heading in (
        (first, "first_token_s", "image to first token, seconds (shorter is better)"),
        (decode, "decode_tokens_s", "tokens per second (longer is better)"),
    ):
        for place, name in enumerate(names):
            figures = models[name][key]
            if figures is None:
                continue
            value = figures["median"]
            whisker = [[value - figures["min"]], [figures["max"] - value]]
            colour = THEIRS if name == "transformers" else OURS
            axes.barh(place, value, xerr=whisker, height=0.62, color=colour, ecolor="#444", capsize=2)
            limit = models[name].get("decode_limit_tokens_s" if key == "decode_tokens_s" else "first_token_limit_s")
            if limit is None:
                continue
            axes.plot([limit, limit], [place - 0.4, place + 0.4], color=LIMIT, linewidth=2)
        axes.plot([], [], color=LIMIT, linewidth=2, label="the machine's limit, measured in the same run")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(heading, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*decode.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=150)
