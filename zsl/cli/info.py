"""Command `zsl info`: show the model and the load of daemons."""

from __future__ import annotations

import json

import click

from zsl.cli.errors import one_line_errors, say
from zsl.errors import LoadingError, StartupError, ZslError
from zsl.text.printable import printable


@click.command(short_help="Show the model that a daemon serves, and its load.")
@click.argument("endpoint", metavar="HOST:PORT[,…]")
@click.option("--server-key", metavar="KEY", help="The daemon's .key file, or the key itself.")
@click.option("--client-key", metavar="FILE", help="Your own .key_secret file.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list with whole digests, for programs.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def info(endpoint: str, server_key: str | None, client_key: str | None, as_json: bool, debug: bool) -> None:
    """Show the model that the daemon at HOST:PORT serves, its load, and its latency.

    Several are separated by commas. Exit code 3 if none serves: none answers, or those that do are still loading.

    \b
      zsl info 127.0.0.1:5555
      zsl info trunk.example:5555 \\
          --server-key keys/server.key --client-key keys/alice.key_secret
      zsl info a.example:5555,b.example:5555 --json
    """
    with one_line_errors("zsl info", debug=debug):
        from zsl.client.info_lines import Serving, ask
        from zsl.link.endpoints import parse_endpoints
        from zsl.link.keys import read_client_keys

        keys = read_client_keys(server_key, client_key)
        found: dict[str, Serving | ZslError] = {}
        for one in parse_endpoints(endpoint):
            try:
                found[one] = ask(one, keys)
            except ZslError as error:
                found[one] = error
        errors = [answer for answer in found.values() if isinstance(answer, ZslError)]
        if as_json:
            entries = [
                {"endpoint": one, "loading": isinstance(answer, LoadingError), "error": str(answer)}
                if isinstance(answer, ZslError)
                else answer.as_json()
                for one, answer in found.items()
            ]
            say(json.dumps(entries, indent=2))
        elif len(found) > 1 or not errors:
            blocks = [
                [("endpoint", one), ("state", _why_not(answer))] if isinstance(answer, ZslError) else answer.rows()
                for one, answer in found.items()
            ]
            say("\n\n".join("\n".join(f"{key:<13}  {printable(value)}" for key, value in rows) for rows in blocks))
        if len(errors) == len(found):
            raise StartupError(str(errors[0]) if len(errors) == 1 else "none of them answers") from errors[0]


def _why_not(error: ZslError) -> str:
    """Return the state of a daemon that did not answer with its model."""
    return f"loading: {error}" if isinstance(error, LoadingError) else f"does not answer: {error}"
