"""Command `zsl merge`: write a checkpoint of the whole model with adapters merged into its weights."""

from __future__ import annotations

from pathlib import Path

import click

from zsl.cli.errors import one_line_errors, say, stop_on_sigterm
from zsl.cli.model_of_adapters import model_of
from zsl.cli.model_options import adapters_argument, out_option
from zsl.cli.quiet import quiet_libraries
from zsl.models.dtypes import DTYPES


@click.command(short_help="Write the whole model with an adapter merged into it.")
@adapters_argument
@out_option("the checkpoint")
@click.option(
    "--model",
    metavar="REF",
    help="The whole model to merge into, as zsl-train takes it.  [default: as named by the run or the adapter]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the checkpoint; bfloat16 rounds small changes away.  "
    "[default: the model's own; float32 for a .gguf file]",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def merge(adapters: tuple[Path, ...], out: Path, model: str | None, dtype: str | None, debug: bool) -> None:
    """Write a checkpoint of the whole model with an adapter merged into it.

    Accepts the inputs of `zsl export`, and its output. Loads the whole model twice, because the checkpoint is read
    again and compared before it is moved to DIR. The checkpoint needs neither zsl nor PEFT.

    \b
      zsl merge runs/smollm2 --out merged
      zsl merge adapter --model HuggingFaceTB/SmolLM2-135M-Instruct \\
          --out merged --dtype float32
    """
    with one_line_errors("zsl merge", debug=debug):
        from zsl.training.directory.trained import find_trained
        from zsl.training.report.screen import byte_count

        trained = find_trained(adapters)
        stop_on_sigterm()  # as Ctrl-C: removes temporary files
        quiet_libraries(debug=debug)

        import torch

        from zsl.adapters.merge import merge as merge_adapters
        from zsl.files.new_directory import size_bytes
        from zsl.text.plural import counted

        reference = model_of(trained, model)
        made = merge_adapters(trained.adapters, reference, out, dtype=getattr(torch, dtype) if dtype else None)
        if trained.weights_digest not in (None, made.weights_digest):
            click.echo(f"zsl merge: {reference.text} has other weights than the model that was trained", err=True)
        if made.rows is not None:
            click.echo(
                f"zsl merge: the adapter's embeddings are of {made.rows} tokens, and so is the checkpoint; "
                "a tokenizer with the new ones is not in it: save yours there",
                err=True,
            )
        if made.converted and dtype is None:
            click.echo(
                f"zsl merge: {counted(made.converted, 'tensor')} of another dtype became "
                f"{str(made.dtype).removeprefix('torch.')}; choose one that holds all with --dtype",
                err=True,
            )
        say(
            f"Merged {', '.join(map(str, trained.adapters))} ({made.method}) into {reference.text}: {out}, "
            f"{str(made.dtype).removeprefix('torch.')}, {byte_count(size_bytes(out))}, "
            f"{'with its tokenizer' if made.has_tokenizer else 'no tokenizer, as the model has none'}"
        )
