"""What waiting threads cost beside another program, by how long they spin before they sleep.

    python benchmarks/busy_machine.py                    # writes a dated record; about ten minutes on two cores

A matrix product is shared by the threads of OpenMP, and each waits for the slowest. GCC's libgomp lets it spin for some
milliseconds before it sleeps (GOMP_SPINCOUNT, 300,000 turns). If another program has one of the cores, the last thread
waits for a core that the spinning ones keep. The command `paligemma` lets them spin for a thirtieth of that.

Measured: captions of the embedded model, and steps of its training, with the cores free and with one of them taken by
a program that computes without end. Every figure is the median of several calls or steps of one process; the ratios
are of the processes of one round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paligemma.__main__ import SPINS
from paligemma.bench.machine import describe_machine
from paligemma.files import write_text

SCENE = Path(__file__).parent.parent / "examples" / "scene.png"
WAITS = {"libgomp": "300000", "paligemma": SPINS}
CAPTIONS = """
import sys, time, paligemma
pg = paligemma.load("tiny", device="cpu")
for _ in range(8):
    started = time.perf_counter()
    pg.caption(sys.argv[1])
    print(time.perf_counter() - started)
"""


@contextmanager
def another_program(there: bool) -> Iterator[None]:
    """A program that takes one core. In a session of its own, so that the system shares the cores fairly."""
    command = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(command, start_new_session=True) if there else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def captions(environment: dict[str, str]) -> float:
    """Seconds of a caption."""
    done = subprocess.run(
        [sys.executable, "-c", CAPTIONS, str(SCENE)], env=environment, check=True, capture_output=True, text=True
    )
    return statistics.median(map(float, done.stdout.split()[2:]))


def training(environment: dict[str, str]) -> float:
    """Seconds of a step of all weights on 24 rows."""
    with tempfile.TemporaryDirectory() as folder:
        row = {"image": str(SCENE), "prefix": "caption en", "suffix": "a house and a book on a blue background"}
        rows = Path(folder) / "rows.jsonl"
        rows.write_text(24 * (json.dumps(row) + "\n"))
        command = "train --model tiny --batch 24 --steps 6 --device cpu".split()
        subprocess.run(
            [sys.executable, "-m", "paligemma", *command, "--data", str(rows), "--out", f"{folder}/run"],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip
        steps = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
        return statistics.median(json.loads(step)["seconds"] for step in steps[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    measured: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for task in (captions, training):
            for busy in (False, True):
                of_task = measured.setdefault(f"{task.__name__}, {'one core taken' if busy else 'cores free'}", {})
                with another_program(busy):
                    for name, spins in WAITS.items():
                        seconds = task({**os.environ, "GOMP_SPINCOUNT": spins})
                        of_task.setdefault(name, []).append(seconds)
                        print(task.__name__, "one core taken" if busy else "cores free", name, seconds, flush=True)
    record = {
        "what": "seconds, by how long waiting threads spin, and the ratios of each round: libgomp's over paligemma's",
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
        "command": " ".join(["python", "benchmarks/busy_machine.py", *sys.argv[1:]]),
        **describe_machine(),
        "spins": WAITS,
        "seconds": measured,
        "ratios": {
            task: {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}
            for task, of_task in measured.items()
            for ratios in [[a / b for a, b in zip(of_task["libgomp"], of_task["paligemma"], strict=True)]]
        },
    }
    path = options.out / f"busy-machine-{datetime.date.today().isoformat()}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["ratios"], indent=1))
    print(path)


if __name__ == "__main__":
    main()
