"""Puts the figures of a record of `paligemma bench` into docs/speed.md, between the two markers.

python benchmarks/speed_table.py [RECORD]        # default: the newest of paligemma-3b-pt-224
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from paligemma.bench.tables import footer, growth_lines, markdown, title
from paligemma.files import write_text

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"
BEGIN, END = "<!-- figures: written by benchmarks/speed_table.py -->", "<!-- end of figures -->"


def section(record: dict, path: Path) -> str:
    lines = [
        f"**{title(record)}** ([record](../benchmarks/{path.name}))",
        "",
        markdown(record),
        "",
        f"{footer(record)}.",
    ]
    if path.with_suffix(".png").exists():
        lines += ["", f"![share of the machine's limits](../benchmarks/{path.stem}.png)"]
    if growth := growth_lines(record):
        lines += ["", *(f"- {line}" for line in growth)]
    if record["failed"]:
        lines += ["", *(f"- failed: {one['what']}: {one['why']}" for one in record["failed"])]
    return "\n".join(lines)


def plain_records(folder: Path) -> list[Path]:
    """Records of paligemma-3b-pt-224, the newest last. The date follows the name: others have "cuda" or "compiled"."""
    return sorted(folder.glob("speed-paligemma-3b-pt-224-[0-9]*.json"))


def main() -> None:
    records = [Path(name) for name in sys.argv[1:]] or plain_records(HERE)
    if not records:
        sys.exit("no record of paligemma-3b-pt-224 in benchmarks/: run `paligemma bench` first")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    figures = section(json.loads(records[-1].read_text()), records[-1])
    write_text(PAGE, f"{before}{BEGIN}\n{figures}\n{END}{after}")
    print(f"{PAGE} has the figures of {records[-1].name}")


if __name__ == "__main__":
    main()
