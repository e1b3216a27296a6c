"""Command `zsl split`: write the client's part and the trunk's part of a model."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import click

from zsl.cli.errors import one_line_errors, say, stop_on_sigterm
from zsl.cli.model_options import out_option
from zsl.cli.quiet import quiet_libraries
from zsl.models.dtypes import DTYPES

NEXT = """\
Serve the trunk's part on its machine, and train with the client's:
  zsl-trunkd --model {trunk}
  zsl-train --model {client} --server HOST:PORT
"""


@click.command(short_help="Write a model as two parts, for a daemon and its clients.")
@click.argument("model")
@click.argument("cut", metavar="START:STOP")
@out_option("the directories client and trunk")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Convert the weights to it; both parts are then of that other model.  [default: unchanged]",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def split(model: str, cut: str, out: Path, dtype: str | None, debug: bool) -> None:
    """Write MODEL as two parts: the layers START to STOP-1 for a daemon, all else for its clients.

    Neither side then needs the other's weights. A part records the identity of its model, which the handshake checks:
    it works with the other part, and with the whole model. MODEL is a hub id, a checkpoint directory, a .gguf file,
    package:<name>, or random:<model_type>.

    \b
      zsl split HuggingFaceTB/SmolLM2-135M 4:26 --out smollm2
      zsl split checkpoint 2:10 --out parts --dtype bfloat16
    """
    with one_line_errors("zsl split", debug=debug):
        from zsl.split.cut import parse_cut
        from zsl.training.report.screen import byte_count, layer_range

        parsed = parse_cut(cut)
        stop_on_sigterm()  # as Ctrl-C: removes temporary files
        quiet_libraries(debug=debug)

        import torch

        from zsl.files.new_directory import size_bytes
        from zsl.models.divide import divide
        from zsl.models.reference import resolve

        made = divide(resolve(model), parsed, out, dtype=getattr(torch, dtype) if dtype else None)
        layers = made.model.layers
        tokenizer = "tokenizer" if made.has_tokenizer else "no tokenizer, as the model has none"
        outside = f"{layer_range(0, parsed.start)}, {layer_range(parsed.stop, layers)}"
        what = {
            "client": f"embeddings, {outside}, head, {tokenizer}",
            "trunk": layer_range(parsed.start, parsed.stop),
        }
        identity = f"{made.model.model_type}, {layers} layers, weights {made.model.weights_digest[:12]}"
        say(f"Split {model} ({identity}) at {parsed}:")
        for part, holds in what.items():
            say(f"  {out / part}  {byte_count(size_bytes(out / part))}: {holds}")
            for file in sorted((out / part).iterdir()):
                say(f"    {file.name}  {byte_count(file.stat().st_size)}")
        say("\n" + NEXT.format(client=quote(str(out / "client")), trunk=quote(str(out / "trunk"))), nl=False)
