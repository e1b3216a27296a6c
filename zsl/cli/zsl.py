"""`zsl`: what is needed beside a daemon and a training. A file for each command, beside this one."""

from __future__ import annotations

import click

from zsl import __version__
from zsl.cli.doctor import doctor
from zsl.cli.errors import Group
from zsl.cli.export import export
from zsl.cli.info import info
from zsl.cli.keygen import keygen
from zsl.cli.merge import merge
from zsl.cli.split import split


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="zsl")
def zsl() -> None:
    """Split learning of language models. Beside this: zsl-trunkd serves a trunk, zsl-train trains through it."""


for command in (keygen, split, export, merge, info, doctor):
    zsl.add_command(command)
