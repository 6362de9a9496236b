"""The command `paligemma`, also as `python -m paligemma`. Ctrl-C ends it without a traceback, from the first moment."""

import os
import signal
import sys
from types import FrameType

# How many turns a thread of OpenMP spins while it waits for the others, before it sleeps: some tenths of a millisecond.
# GCC's libgomp takes thirty times as many. On a machine that is busy with other programs too, the thread that all wait
# for then gets no core, and every matrix product takes milliseconds longer: see benchmarks/busy_machine.py.
SPINS = "10000"


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C raises KeyboardInterrupt, which the commands handle, except while a module is being imported.

    An exception in the middle of an import becomes another error, or is lost in a C extension. The commands import
    before they begin to work, so the process may end at once.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def wait_briefly() -> None:
    """Sets the number of turns, unless the user has chosen. libgomp reads it when torch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def main() -> None:
    wait_briefly()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored, as under nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        from paligemma.cli.main import main as command

        command()
    except KeyboardInterrupt as stop:
        sys.exit(getattr(stop, "exit_code", 130))  # `train` has a kind of its own for SIGTERM


if __name__ == "__main__":
    main()
