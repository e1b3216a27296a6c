"""`zsl`: what is needed beside a daemon and a training. A file for each command, beside this one."""

from __future__ import annotations

import click

from zsl import __version__
from zsl.cli.keygen import keygen


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="zsl")
def zsl() -> None:
    """Split learning of language models. Beside this: zsl-trunkd serves a trunk, zsl-train trains through it."""


for command in (keygen,):
    zsl.add_command(command)
