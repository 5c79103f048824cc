"""The command line: one module a command. Answers and facts asked for go to stdout, all else to stderr.

Exit codes: 0 done, 2 the input can't be used (one line on stderr says why), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from kvik.cli import (
    bench,
    compare,
    doctor,
    eval,
    fuzz,
    heads,
    plan,
    run,
    serve,
    trace,
    train,
    train_lm,
    transcribe,
    translate,
    tune,
)  # fmt: skip
from kvik.cli.common import INTERRUPTED, app
from kvik.errors import KvikError

__all__ = [
    "app", "bench", "compare", "doctor", "eval", "fuzz", "heads", "main", "plan", "run", "serve", "trace", "train",
    "train_lm", "transcribe", "translate", "tune",
]  # fmt: skip

OURS = {"GOMP_SPINCOUNT": "3000"}  # set before torch loads: idle OpenMP threads soon stop burning a core


def _show_version(wanted: bool) -> None:
    if wanted:
        from kvik import __version__

        print(f"kvik {__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `kvik` itself."""


def main() -> None:
    """The `kvik` command."""
    ours = [name for name in OURS if name not in os.environ]
    os.environ.update((name, OURS[name]) for name in ours)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character still shows the rest
    command = typer.main.get_command(app)
    try:
        code = command.main(standalone_mode=False, prog_name="kvik", obj=ours)
    except KvikError as error:
        code = _complain(str(error))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)  # not every kind of wrong option has one
        where = "kvik" if context is None else context.command_path
        if context is not None and error.format_message() == context.get_help():  # a group by itself
            print(context.get_help(), file=sys.stderr)
            code = 2
        else:
            code = _complain(f"{error.format_message().rstrip('.')}; see '{where} --help'")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (OSError, UnicodeError, MemoryError) as error:
        code = _complain(f"{type(error).__name__}: {error}")
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "allocate memory")):  # torch's, of any device
            raise
        why = str(error).strip().splitlines()[0][:200]
        code = _complain(f"memory ran out ({why}); use a smaller model, batch or length, or fewer bits")
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> int:
    line = " ".join(message.split())
    print(f"kvik: {line}", file=sys.stderr)
    return 2
