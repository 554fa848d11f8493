"""A person's mistake is one line and an exit code, on every command line."""

import errno
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edge.commands import Commands
from edge.errors import LookoutError


def group_that_raises(error: BaseException) -> Commands:
    @click.group(cls=Commands)
    def main() -> None:
        """A command line with one subcommand."""

    @main.command()
    @click.option("--count", type=int)
    def work(count: int | None) -> None:
        raise error

    return main


LOOKOUT_ERRORS = [kind("what\nis wrong", expected=1, got=2) for kind in LookoutError.__subclasses__()]


@pytest.mark.parametrize("error", LOOKOUT_ERRORS, ids=lambda error: type(error).__name__)
def test_a_lookout_error_is_one_line_and_its_own_code(error):
    result = CliRunner().invoke(group_that_raises(error), ["work"])
    assert result.output == "error: what is wrong: expected 1, got 2\n"
    assert result.exit_code == error.exit_code


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.db"), 74, "error: a.db: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a.db"), 74, "error: a.db: Permission denied\n"),
        (OSError(errno.EIO, "Input/output error"), 74, "error: Input/output error\n"),
        (OSError("two\nlines"), 74, "error: two lines\n"),
        (TimeoutError(), 74, "error: TimeoutError\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
    ids=repr,
)
def test_the_systems_errors_are_one_line(error, code, output):
    result = CliRunner().invoke(group_that_raises(error), ["work"])
    assert (result.exit_code, result.output) == (code, output)


@pytest.mark.parametrize("error", [LOOKOUT_ERRORS[0], OSError("disk"), KeyboardInterrupt()], ids=repr)
def test_debug_shows_the_traceback_and_changes_nothing_else(error):
    plain = CliRunner().invoke(group_that_raises(error), ["work"])
    debug = CliRunner().invoke(group_that_raises(error), ["--debug", "work"])
    assert debug.output.startswith("Traceback")
    assert debug.output.endswith(plain.output)
    assert debug.exit_code == plain.exit_code


def test_a_fault_of_the_program_is_not_hidden():
    fault = ZeroDivisionError("a fault")
    assert CliRunner().invoke(group_that_raises(fault), ["work"]).exception is fault


@pytest.mark.parametrize("words", [["work", "--count", "many"], ["work", "--wrong"], ["play"], ["--wrong"]])
def test_a_misspelt_command_line_is_exit_2(words):
    assert CliRunner().invoke(group_that_raises(ValueError()), words).exit_code == 2


def test_version():
    result = CliRunner().invoke(group_that_raises(ValueError()), ["--version"], prog_name="edge")
    assert result.output == f"edge, version {version('lookout')}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    program = """if True:
        import click, edge.commands
        main = edge.commands.Commands("main")
        main.command("work")(lambda: click.echo("x" * 100_000) or print("y", end=""))
        main()"""
    with open("/dev/full", "w") as full:  # noqa: PTH123
        result = subprocess.run(
            [sys.executable, "-c", program, "work"], stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert result.stderr.decode() == "error: No space left on device\n"
    assert result.returncode == 74
