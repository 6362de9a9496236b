"""A record as people read it: a table for the terminal, one for a document, and lines on how the cost grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

FIGURES = {
    "weights": "weights, GB",
    "load_s": "load, s",
    "first_answer_s": "first token after that, s",
    "peak": "peak memory, GB",
    "peak_of_weights": "  times the weights",
    "vision_s": "vision, s",
    "prefill_s": "prefill, s",
    "first_token_s": "image to first token, s",
    "share_of_multiplying": "  of the GEMM limit",
    "first_token_ratio": "  times transformers",
    "decode_tokens_s": "decode, tokens/s",
    "share_of_reading": "  of the reading limit",
    "decode_ratio": "  times transformers",
}
SPREAD = ("first_token_s", "decode_tokens_s")  # only these are shown with minimum and maximum


def cells(record: dict[str, Any], between: str = " ") -> list[list[str]]:
    """The table: a heading with the models, then one line for each figure. between: what separates the median and
    (minimum - maximum)."""
    contestants = record["summary"]["contestants"]
    lines = [["", *contestants]]
    for key, name in FIGURES.items():
        lines.append([name, *(_cell(figures, key, between) for figures in contestants.values())])
    return lines


def _cell(figures: dict[str, Any], key: str, between: str) -> str:
    if key == "peak":
        peak = figures["peak_bytes"]
        return f"{peak['median'] / 1e9:.2f}" if peak else "-"
    if key == "weights":
        return f"{figures['weight_bytes'] / 1e9:.2f}"
    value = figures.get(key)
    if value is None:
        return "-"
    if key.startswith("share"):
        return f"{value:.0%}"
    if isinstance(value, float):
        return f"{value:.2f}"
    if key in SPREAD:
        return f"{value['median']:.3g}{between}({value['min']:.3g} - {value['max']:.3g})"
    return f"{value['median']:.3g}"


def table(record: dict[str, Any]) -> Table:
    """For a terminal."""
    from rich.table import Table
    from rich.text import Text

    heading, *lines = cells(record, between="\n")
    drawn = Table(title=Text(title(record), "table.title"), caption=footer(record))
    for name in heading:
        drawn.add_column(name, justify="right" if name else "left")
    for line in lines:
        drawn.add_row(*line)
    return drawn


def markdown(record: dict[str, Any]) -> str:
    """For a document."""
    heading, *lines = cells(record)
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in [heading, rule, *lines])


def title(record: dict[str, Any]) -> str:
    return f"{record['model']}: {record['device']}, {record['threads']} threads, {record['date'][:10]}"


def footer(record: dict[str, Any]) -> str:
    names = {"read_gb_s": "reads {:.1f} GB/s", "bf16_gflop_s": "bf16 {:.0f} GFLOP/s", "int8_gop_s": "int8 {:.0f} GOP/s"}
    limits = record["summary"]["limits"]
    parts = [text.format(limits[name]["median"]) for name, text in names.items() if limits.get(name)]
    return f"medians (min - max), {len(record['rounds'])} round(s); the machine: {', '.join(parts)}"


def growth_lines(record: dict[str, Any]) -> list[str]:
    """How the cost grows, one line for each experiment."""
    lines = []
    for name, figures in record["summary"]["grow"].items():
        if name == "length":
            lines.append(
                f"a token takes {figures['first_ms']:.1f} ms at the beginning and {figures['last_ms']:.1f} ms at the "
                f"end of {figures['tokens']} ({figures['growth']:+.0%})"
            )
        elif name == "batch":
            for count, one in figures.items():
                lines.append(
                    f"{count} question{'s' * (str(count) != '1')} about one image: first tokens after "
                    f"{one['first_tokens_s']:.2f} s, then {one['decode_tokens_s']:.1f} tokens/s in all "
                    f"({one['times_one']:.1f} x)"
                )
        else:
            for model, one in figures.items():
                rate = one["decode_tokens_s"]
                lines.append(
                    f"{name}, {model}: vision {one['vision_s']['median']:.2f} s, first token "
                    f"{one['first_token_s']['median']:.2f} s, {rate['median'] if rate else 0:.1f} tokens/s"
                )
    return lines
