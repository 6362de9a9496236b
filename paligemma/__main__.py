"""The command `paligemma`, also as `python -m paligemma`. Ctrl-C ends it without a traceback, from the first moment."""

import os
import signal
import sys
from types import FrameType


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


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored, as under nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        from paligemma.cli.main import main as command

        command()
    except KeyboardInterrupt as stop:
        sys.exit(getattr(stop, "exit_code", 130))  # `train` has a kind of its own for SIGTERM


if __name__ == "__main__":
    main()
