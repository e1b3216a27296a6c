"""Command group `zsl`, with a file for each command in this package."""

from __future__ import annotations

import click

from zsl import __version__
from zsl.cli.chat import chat
from zsl.cli.doctor import doctor
from zsl.cli.errors import Group
from zsl.cli.eval import evaluate
from zsl.cli.export import export
from zsl.cli.generate import generate
from zsl.cli.info import info
from zsl.cli.keygen import keygen
from zsl.cli.merge import merge
from zsl.cli.serve import serve
from zsl.cli.split import split


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="zsl")
def zsl() -> None:
    """Split learning of language models. See also zsl-trunkd, which serves a trunk, and zsl-train, which trains."""


for command in (keygen, split, export, merge, info, doctor, generate, chat, evaluate, serve):
    zsl.add_command(command)
