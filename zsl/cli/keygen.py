"""Command `zsl keygen`: make a CURVE key pair for encrypted connections."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import click

from zsl.cli.errors import one_line_errors, say

SERVER = "server"  # the name of the pair that `zsl-trunkd --keys DIR` loads

FILES = """\
Made a key pair:
  {secret}  secret: {keep_it}
  {public}  public: {give_it}
"""
FOR_A_SERVER = """\
Its public key is {key}

Start the daemon with it, with your model, and with a list of the clients that it accepts:
  zsl-trunkd --model MODEL --host 0.0.0.0 --keys {directory} --tenants tenants.toml

Each client makes its own pair with `zsl keygen NAME`, which shows the lines that belong in tenants.toml.
"""
FOR_A_CLIENT = """\
In the daemon's tenants.toml (send the daemon SIGHUP, and it reads that again):

[tenants.{name}]
public_key = "{key}"

The client needs its secret file, and the daemon's public one beside it:
  zsl-train CONFIG.toml --server HOST:PORT \\
      {settings}
  zsl.RemoteTrunk("HOST:PORT", {arguments})
"""


@click.command(short_help="Make a key pair for a daemon or a client.")
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    default="keys",
    show_default=True,
    help="Directory for the two files.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def keygen(name: str, out: Path, debug: bool) -> None:
    """Make the key pair NAME: `server` for a daemon, any other name for a client.

    Nothing is sent anywhere. NAME.key is public; NAME.key_secret never leaves its owner.
    """
    with one_line_errors("zsl keygen", debug=debug):
        from zsl.transport.curve_keys import read_public_key, write_key_pair

        public, secret = write_key_pair(out, name)
        is_server = name == SERVER
        both = {"server_key": out / f"{SERVER}.key", "client_key": secret}
        facts = {
            "name": name,
            "key": read_public_key(str(public)).decode(),
            "directory": quote(str(out)),
            "public": str(public).ljust(len(str(secret))),
            "secret": secret,
            "settings": " ".join(f"--{key.replace('_', '-')} {quote(str(file))}" for key, file in both.items()),
            "arguments": ", ".join(f'{key}="{file}"' for key, file in both.items()),
            "keep_it": "stays on the daemon's machine" if is_server else "stays with the client",
            "give_it": "for every client" if is_server else "for whoever runs the daemon",
        }
        say(FILES.format(**facts))
        say((FOR_A_SERVER if is_server else FOR_A_CLIENT).format(**facts), nl=False)
