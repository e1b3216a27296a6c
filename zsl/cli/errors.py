"""How a command ends: one line on stderr and the right exit code, a traceback only with `--debug`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from zsl.errors import EXIT_RUN_FAILED, ZslError


@contextmanager
def one_line_errors(command: str, *, debug: bool) -> Iterator[None]:
    """Turn an exception into `command: what happened` and its exit code."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        click.echo(f"{command}: interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, ZslError):
            text, code = str(error), error.exit_code
        else:
            text, code = f"{type(error).__name__}: {error} (--debug shows where)", EXIT_RUN_FAILED
        click.echo(f"{command}: {' '.join(text.split())}", err=True)
        sys.exit(code)
