"""The command `paligemma`. stdout carries the answer alone; progress and notes go to stderr.

Each command imports what it needs when it runs, so that `--help` answers at once. Exit codes: 0 done, 1 failed,
2 wrong usage, 130 and 143 interrupted (Ctrl-C, SIGTERM).
"""

from __future__ import annotations

import io
import shlex
import signal
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from paligemma.cli import batch, bench, data, evaluate, explore, export, run, serve, tiny, train, weights
from paligemma.cli.output import print_error
from paligemma.terminal import printable

UsageError: Any = typer.BadParameter.__bases__[0]  # typer has no public name for it


class Commands(TyperGroup):
    """`train` takes options, and `train compare` is a command too: names of two words are looked up first."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (name := " ".join(args[:2])) in self.commands:
            args = [name, *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="paligemma",
    cls=Commands,
    help="PaliGemma 1 and 2: captions, answers, boxes and masks for your pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tiny_app = typer.Typer(
    help="The embedded model and the small world it knows.", no_args_is_help=True, rich_markup_mode=None
)
data_app = typer.Typer(help="Check and show your data before training.", no_args_is_help=True, rich_markup_mode=None)

app.command()(run.run)
app.command()(batch.batch)
app.command("batch status")(batch.status)
app.command("batch export")(batch.export)
app.command()(explore.explore)
app.command()(serve.serve)
app.command()(evaluate.evaluate)
app.command()(bench.bench)
app.command("train", cls=train.WithHeadings)(train.finetune)
app.command("train compare")(train.compare)
app.command()(weights.info)
app.command()(weights.convert)
app.command()(weights.merge)
app.command()(weights.quantize)
app.command()(weights.download)
app.command()(export.export)
app.add_typer(data_app, name="data")
data_app.command("check")(data.data_check)
data_app.command("show")(data.data_show)
app.add_typer(tiny_app, name="tiny")
tiny_app.command()(tiny.scenes)
tiny_app.command()(tiny.train)
tiny_app.command()(tiny.evaluate)


def version(show: bool) -> None:
    if show:
        from paligemma import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass  # `main` has taken --debug out of the arguments already: it may stand anywhere


def main() -> None:
    """Runs the command line. Errors are a line on stderr; with --debug, a traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # wherever it stands
    debug = len(arguments) < len(sys.argv) - 1
    # Pillow warns of pictures from half the size on at which it refuses them. The refusal alone is of use.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter still shows the rest
    # Ended as by Ctrl-C: what is half written is removed. (`train` has handlers of its own while it trains.)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = app(arguments, standalone_mode=False)
    except UsageError as error:
        error.message = printable(error.message)  # it may quote the name of a file
        error.show()
        sys.exit(error.exit_code)
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError, ArithmeticError) as error:
        if debug:
            raise
        print_error(error, doing=shlex.join(["paligemma", *arguments])[:200])
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
