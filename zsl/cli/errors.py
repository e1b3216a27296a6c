"""Output and errors of commands: one line on stderr, an exit code, a traceback with `--debug` only."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import Any, NoReturn

import click

from zsl.cli.broken_output import to_nowhere
from zsl.errors import EXIT_RUN_FAILED, RunFailed, StartupError, ZslError
from zsl.text.printable import PrintableFormatter, printable, printable_lines

_LONGEST_FOREIGN_TEXT = 300  # characters: some libraries list everything in one error


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM."""


def stop_on_sigterm() -> None:
    """Make SIGTERM end this process as Ctrl-C does."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def log_lines(command: str, *, level: int = logging.WARNING) -> None:
    """Show what is logged, from this level on, as lines of a command on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(f"{command}: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def check_installed(*packages: str) -> None:
    """Raise `StartupError` if a package is missing, which only this command needs."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise StartupError(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}")


def say(text: str, *, nl: bool = True) -> None:
    """Write to standard output. Raises `RunFailed` if that fails; exits if the reader has closed the pipe."""
    with _output_errors():
        click.echo(printable_lines(text), nl=nl)


@contextmanager
def _output_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        to_nowhere(sys.stdout)
        if error.errno == errno.EPIPE:
            sys.exit(128 + signal.SIGPIPE)  # as a process that SIGPIPE ends: the reader, `head`, has closed the pipe
        raise RunFailed(f"standard output cannot be written: {error.strerror}") from error


def tell(text: str) -> None:
    """Write to standard error. If that fails, the exit code alone reports how a command ended."""
    try:
        click.echo(text, err=True)
    except OSError:
        to_nowhere(sys.stderr)


class Command(click.Command):
    """Command that shows help and version as `say` does, without a traceback if standard output cannot be written."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with one_line_errors(str(info_name), debug=False), _output_errors():
            return super().make_context(info_name, args, parent, **extra)


class Group(Command, click.Group):
    """Group that does the same for the help of its commands, which are parsed when the group is invoked."""

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors(str(ctx.info_name), debug=False), _output_errors():
            return super().invoke(ctx)


@contextmanager
def one_line_errors(command: str, *, debug: bool) -> Iterator[None]:
    """Turn an exception into one line on stderr and its exit code; that of a signal is 128 plus its number."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt as error:
        tell(f"{command}: interrupted")
        sys.exit(_code_of_signal(error))
    except Exception as error:
        if debug:
            tell(printable_lines("".join(traceback.format_exception(error))))
        if isinstance(error, ZslError):
            text, code = str(error), error.exit_code
            if isinstance(error.__cause__, KeyboardInterrupt):
                code = _code_of_signal(error.__cause__)
        else:
            text, code = f"{type(error).__name__}: {_begin(str(error))} (--debug shows where)", EXIT_RUN_FAILED
        tell(printable(f"{command}: {' '.join(text.split())}"))
        sys.exit(code)


def _begin(text: str) -> str:
    """Return the first line of a text, which may be empty, cut at `_LONGEST_FOREIGN_TEXT`."""
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= _LONGEST_FOREIGN_TEXT else f"{line[:_LONGEST_FOREIGN_TEXT]}…"


def _code_of_signal(error: KeyboardInterrupt) -> int:
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
