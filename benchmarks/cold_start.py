"""The time from the command to the first token of the embedded model, compared with `import torch` alone.

    python benchmarks/cold_start.py            # writes benchmarks/cold-start-DATE.json

    paligemma run "caption en" examples/scene.png        timed until its first letter is there

Python, `import torch` and the command run in turn. stdout is a pseudo-terminal, so that every piece of the answer is
printed at once. Wall time is what a person waits for; processor time does not depend on other programs. Afterwards a
fresh process measures each stage, and `-X importtime` the slowest imports.

`--against FOLDER` also runs another copy of the package in turn, to measure the effect of a change.

    git archive COMMIT paligemma | tar -x -C /tmp/old && python benchmarks/cold_start.py --against /tmp/old
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pty
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from paligemma.bench.machine import describe_machine

ROOT = Path(__file__).parent.parent
RUN = ["-m", "paligemma", "run", "caption en", str(ROOT / "examples" / "scene.png")]
CASES = {"python": ["-c", "print(1)"], "import torch": ["-c", "import torch; print(1)"], "first token": RUN}

STAGES = """
import json, time
marks = [("", time.perf_counter())]
def mark(name): marks.append((name, time.perf_counter()))
import paligemma.cli.main; mark("import of the command line")
import torch; mark("import of torch")
from paligemma.inference import load; mark("import of all else")
pg = load("tiny"); mark("load: tokenizer, weights, mask codec")
pg.generate(SCENE, "caption en", max_new_tokens=1); mark("picture and prompt to first token")
pg.generate(SCENE, "caption en", max_new_tokens=1); mark("the same again")
print(json.dumps({name: round(t - before, 4) for (_, before), (name, t) in zip(marks, marks[1:])}))
"""


def time_to_first_letter(arguments: list[str], package: Path | None = None) -> dict[str, float]:
    """Seconds until the first byte on stdout, and processor seconds until the end."""
    reader, writer = pty.openpty()
    begun = time.perf_counter()
    environment = os.environ if package is None else {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL, env=environment, cwd=package)
    os.close(writer)
    os.read(reader, 1)
    wall = time.perf_counter() - begun
    try:
        while os.read(reader, 4096):
            pass
    except OSError:
        pass  # on Linux: the other side of the terminal is closed
    os.close(reader)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with exit code {process.returncode}")
    return {"wall_s": wall, "processor_s": usage.ru_utime + usage.ru_stime}


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def slowest_imports(count: int = 12) -> dict[str, float]:
    """Seconds of the packages that cost most by themselves, modules below them included."""
    done = subprocess.run([sys.executable, "-X", "importtime", *RUN], capture_output=True, text=True, check=True)
    seconds: dict[str, float] = {}
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr):
        package = module.split(".")[0]
        seconds[package] = seconds.get(package, 0) + int(own) / 1e6
    first = sorted(seconds, key=lambda package: -seconds[package])[:count]
    return {package: round(seconds[package], 3) for package in first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--against", type=Path, help="a folder with another copy of the package")
    options = parser.parse_args()

    cases: dict[str, tuple[list[str], Path | None]] = {name: (arguments, None) for name, arguments in CASES.items()}
    if options.against is not None:
        cases["first token, other copy"] = RUN, options.against.resolve()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    stages: list[dict[str, float]] = []
    for case in cases.values():
        time_to_first_letter(*case)  # from now on the files are in the page cache
    for _ in range(options.rounds):
        for name, case in cases.items():
            times[name].append(time_to_first_letter(*case))
        code = STAGES.replace("SCENE", repr(RUN[-1]))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        stages.append(json.loads(done.stdout))

    date = datetime.date.today().isoformat()
    record = {
        "what": "seconds; wall: until the first letter; processor: user and system, of the whole command",
        "date": date,
        "command": f"python {' '.join(sys.argv)}",
        **describe_machine(),
        "rounds": options.rounds,
        "cases": {
            name: {kind: spread(one[kind] for one in found) for kind in ("wall_s", "processor_s")}
            for name, found in times.items()
        },
        "first token beyond import torch": {
            kind: spread(run[kind] - torch[kind] for run, torch in zip(times["first token"], times["import torch"]))
            for kind in ("wall_s", "processor_s")
        },
        "stages": {name: spread(one[name] for one in stages) for name in stages[0]},
        "imports": slowest_imports(),
    }
    print(json.dumps(record, indent=1))
    (options.out / f"cold-start-{date}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
