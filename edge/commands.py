"""What the three command lines share: a mistake is one line and an exit code; `--debug` shows more."""

from __future__ import annotations

import io
import sys
import traceback
from typing import Any

import click

from edge.errors import LookoutError

IO_ERROR = 74  # EX_IOERR of BSD's sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports


class Commands(click.Group):
    """A group of subcommands whose errors are for people: `@click.group(cls=Commands)`.

    Exit codes: a LookoutError's own, 74 for an OSError, 130 for Ctrl-C, 2 for a misspelt command line. Whatever else
    is raised is a fault of the program and keeps its traceback.
    """

    def __init__(self, *args: Any, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        click.version_option(package_name="lookout")(self)
        click.option("--debug", is_flag=True, help="Show the traceback of an error.")(self)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; see the class for what becomes of its errors."""
        debug = ctx.params.pop("debug")
        for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to stop
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here a full disk is still an error; at the interpreter's exit it is only noise
            return result
        except BrokenPipeError:
            raise  # the reader has seen enough (`| head`): click ends quietly
        except (LookoutError, OSError, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            code, line = _code_and_line(error)
            click.echo(line, err=True)
            raise click.exceptions.Exit(code) from error


def _code_and_line(error: LookoutError | OSError | KeyboardInterrupt) -> tuple[int, str]:
    """The exit code and what stderr says."""
    if isinstance(error, LookoutError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        return IO_ERROR, f"error: {place}{error.strerror or ' '.join(str(error).split()) or type(error).__name__}"
    return INTERRUPTED, "interrupted"
