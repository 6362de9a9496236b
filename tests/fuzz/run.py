"""Throws broken inputs at every entrance: `python tests/fuzz/run.py [--seconds 60 | --inputs 100000] [--kind NAME]`.

Each must end well or in an error of ours: no traceback, no signal, no more than 10 s of CPU time, and less than 2 GB of
memory. The inputs follow from --seed and their number, so any of them can be made again:

    python tests/fuzz/run.py --kind jsonl --only 1234      # that one input, in this process, with its traceback

Each kind of input runs in a process forked from this one; when that dies, another goes on behind the input that killed
it. For Linux and macOS.
"""

import argparse
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
os.environ["OMP_WAIT_POLICY"] = "passive"  # a thread that waits for another sleeps: spinning would count as a hang
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from kinds import KINDS, OUR_ERRORS, Kind, build  # noqa: E402

CPU_SECONDS = 10  # of one input; more is a hang
WALL_SECONDS = 300  # without any sign of life: it waits for something that never comes
MEMORY = 2 * 2**30


@dataclass
class Result:
    """What became of the inputs of one kind."""

    inputs: int = 0
    errors: int = 0  # of ours: refused as it should be
    tracebacks: int = 0
    signals: int = 0
    hangs: int = 0
    memory: int = 0  # at most, in bytes
    found: Counter[str] = field(default_factory=Counter)  # what went wrong, by its last line
    first: dict[str, int] = field(default_factory=dict)  # and the first input of each

    def add(self, what: str, number: int) -> None:
        self.found[what] += 1
        self.first.setdefault(what, number)

    @property
    def bad(self) -> int:
        return self.tracebacks + self.signals + self.hangs + (self.memory > MEMORY)


def fuzz(kind: Kind, valid: Path, seed: int, inputs: int | None, seconds: float | None) -> Result:
    """Inputs 0, 1, ... of a kind, until so many are done or the time is over."""
    result = Result()
    end = None if seconds is None else time.monotonic() + seconds
    while (inputs is None or result.inputs < inputs) and (end is None or time.monotonic() < end):
        _one_process(kind, valid, seed, inputs, end, result)
    return result


def _one_process(kind: Kind, valid: Path, seed: int, inputs: int | None, end: float | None, result: Result) -> None:
    """Forks a process that goes on behind the last input, and notes what it reports until it ends or dies."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        try:
            _work(kind, valid, seed, range(result.inputs, 2**62 if inputs is None else inputs), end, writing)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    os.close(writing)
    text, hung = b"", False
    number = result.inputs
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], WALL_SECONDS)[0]:
                hung = True
                os.kill(process, signal.SIGKILL)
            chunk = pipe.read(65536)
            if not chunk:
                break
            *lines, text = (text + chunk).split(b"\n")
            for line in lines:
                number, outcome, what, memory = json.loads(line)
                if outcome == "began":
                    continue
                result.inputs = number + 1
                result.errors += outcome == "error"
                result.tracebacks += outcome == "traceback"
                result.memory = max(result.memory, memory)
                if outcome == "traceback":
                    result.add(what, number)
                if memory > MEMORY:
                    result.add(f"{memory >> 20} MB of memory", number)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == 99:
        raise RuntimeError(f"the fuzzing of {kind.name} itself failed")
    if status:  # it died of the input that it began last
        result.inputs = number + 1
        if hung or status == -signal.SIGPROF:
            result.hangs += 1
            result.add("hang", number)
        else:
            result.signals += 1
            result.add(f"died: {signal.Signals(-status).name if status < 0 else f'exit {status}'}", number)


def _work(kind: Kind, valid: Path, seed: int, numbers: range, end: float | None, writing: int) -> None:
    """In the forked process: input after input, each announced before and reported after."""

    def report(*values: object) -> None:
        os.write(writing, json.dumps(values).encode() + b"\n")

    warnings.simplefilter("ignore")
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    with (scratch / "stacks").open("w") as stacks, open(os.devnull, "w") as silent:
        os.dup2(silent.fileno(), 2)
        faulthandler.enable(stacks)
        try:
            for number in numbers:
                if end is not None and time.monotonic() > end:
                    break
                report(number, "began", "", 0)
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process, even inside C
                outcome, what = "well", ""
                try:
                    kind.one(seed, number, valid, scratch / "input")
                except OUR_ERRORS:
                    outcome = "error"
                except BaseException as error:
                    outcome, what = "traceback", _last_lines(error)
                signal.setitimer(signal.ITIMER_PROF, 0)
                used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                report(number, outcome, what, used)
                if used > MEMORY:
                    break  # the peak of a process never falls: a fresh one goes on
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _last_lines(error: BaseException) -> str:
    """The place in our code and the message, which stand for all errors of the same cause."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    ours = [frame for frame in frames if "paligemma" in Path(frame.filename).parts] or list(frames)
    place = f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:160]}"


def table(results: dict[str, Result]) -> str:
    lines = ["| kind | inputs | errors | tracebacks | signals | hangs | peak memory |", "|---|---|---|---|---|---|---|"]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r.inputs:,} | {r.errors:,} | {r.tracebacks} | {r.signals} | {r.hangs} | {r.memory >> 20} MB |"
        )
    everything = list(results.values())
    columns = ("inputs", "errors", "tracebacks", "signals", "hangs")
    total = [sum(getattr(r, name) for r in everything) for name in columns]
    lines.append(f"| all | {' | '.join(f'{n:,}' for n in total)} | {max(r.memory for r in everything) >> 20} MB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="for all kinds together; the default is 60")
    parser.add_argument("--inputs", type=int, help="of all kinds together, in place of a time")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input of --kind, by its number, in this process")
    options = parser.parse_args()
    if options.only is not None and options.kind is None:
        parser.error("--only needs --kind")
    chosen = [kind for kind in KINDS if options.kind in (None, kind.name)]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        valid = Path(folder) / "valid"
        valid.mkdir()
        build(valid)
        chosen = [kind for kind in chosen if (valid / kind.folder).is_dir()]  # parquet and arrow need pyarrow
        if options.only is not None:
            chosen[0].one(options.seed, options.only, valid, Path(folder) / "input")
            return
        results = {}
        for kind in chosen:
            inputs = options.inputs and -(-options.inputs // len(chosen))
            seconds = None if inputs else (options.seconds or 60.0) / len(chosen)
            results[kind.name] = result = fuzz(kind, valid, options.seed, inputs, seconds)
            print(f"{kind.name}: {result.inputs:,} inputs, {result.bad} bad {dict(result.found)}", file=sys.stderr)
    print(table(results))
    for name, result in results.items():
        for what, count in result.found.most_common():
            print(
                f"{name}: {count} x {what} (first: --kind {name!r} --seed {options.seed} --only {result.first[what]})"
            )
    sys.exit(any(result.bad for result in results.values()))


if __name__ == "__main__":
    main()
