"""What rounding costs in the exported files: the embedded model through onnxruntime, over the rows of `evaluate`.

python benchmarks/exported_accuracy.py --scenes 10        # a try
python benchmarks/exported_accuracy.py                    # 200 scenes; writes a dated record
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

import paligemma
from paligemma.bench.machine import describe_machine
from paligemma.evaluate import evaluate
from paligemma.export.exporting import export
from paligemma.export.runtime import load_exported
from paligemma.files import write_text
from paligemma.tiny.evaluation import METRICS, tiny_examples

WEIGHTS = ["fp32", "fp16", "q8", "q4"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    given = parser.parse_args()
    weights = given.weights.split(",")
    pg = paligemma.load("tiny", device="cpu", dtype="float32")
    record = {
        "what": "figures of `evaluate` on the small world, by how the weights are stored; pytorch: float32",
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": " ".join(["python", "benchmarks/exported_accuracy.py", *sys.argv[1:]]),
        **describe_machine(),
        "scenes": given.scenes,
        "figures": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        export("tiny", Path(folder) / "out", weights, say=print)
        for name in ["pytorch", *weights]:
            model = pg if name == "pytorch" else load_exported(Path(folder) / "out", name)
            report = evaluate(model, tiny_examples(given.scenes), METRICS, progress=False)
            record["figures"][name] = {f"{one.task}/{one.name}": round(one.value, 4) for one in report.figures}
            print(name, record["figures"][name], flush=True)
    path = given.out / f"exported-accuracy-{datetime.date.today().isoformat()}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
