"""One style for all figures of the course, and the few ways in which they draw."""

from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")  # draws into files, whatever screen there is

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

# Colours that people with any colour vision tell apart (Okabe and Ito), and one scale from white to dark.
INK, GREY, PALE = "#222222", "#767676", "#dddddd"
ORANGE, BLUE, GREEN = "#d55e00", "#0072b2", "#009e73"
SCALE = LinearSegmentedColormap.from_list("scale", ["#ffffff", "#fbd3b0", "#f08c3c", "#d55e00", "#5a2400"])
OPPOSED = LinearSegmentedColormap.from_list("opposed", ["#0072b2", "#ffffff", "#d55e00"])
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY,
    "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "white", "legend.frameon": False,
}  # fmt: skip


def percent(value: float) -> str:
    return f"{value:.0%}"


def show_picture(axes: Axes, image: np.ndarray, grid: int, dim: float = 1.0) -> None:
    """A picture in units of patches, so that patch (row, column) is the square from there to one further. image: uint8
    [H, W, 3]. dim: below 1 for a paler one."""
    shown = 255 - (255 - image.astype(float)) * dim
    axes.imshow(shown.astype(np.uint8), extent=(0, grid, grid, 0), interpolation="antialiased")
    bare(axes)


def bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(PALE)


def lines(axes: Axes, grid: int) -> None:
    for place in range(1, grid):
        axes.axhline(place, color=PALE, linewidth=0.6)
        axes.axvline(place, color=PALE, linewidth=0.6)


def framed(axes: Axes, patch: int, grid: int, color: str = ORANGE) -> None:
    axes.add_patch(Rectangle((patch % grid, patch // grid), 1, 1, fill=False, edgecolor=color, linewidth=2))


def heat(
    axes: Axes, values: np.ndarray, top: float = 1.0, texts: Callable[[float], str] | None = None, font: float = 7.5
) -> None:
    """A map or table on a scale from 0 to `top`, with a text in each cell if wanted."""
    axes.imshow(values, cmap=SCALE, vmin=0, vmax=top, extent=(0, values.shape[1], values.shape[0], 0), aspect="auto")
    for row, column in np.ndindex(*values.shape) if texts is not None else ():
        dark = values[row, column] > 0.55 * top
        axes.text(column + 0.5, row + 0.5, texts(values[row, column]), ha="center", va="center", fontsize=font,
                  color="white" if dark else INK)  # fmt: skip
    bare(axes)
