"""Command `zsl export`: write the adapters of a training run as one adapter of the whole model."""

from __future__ import annotations

from pathlib import Path

import click

from zsl import __version__
from zsl.cli.errors import one_line_errors, say, stop_on_sigterm
from zsl.cli.model_of_adapters import model_of
from zsl.cli.model_options import adapters_argument, out_option
from zsl.cli.quiet import quiet_libraries


@click.command(short_help="Write one PEFT adapter of a training run.")
@adapters_argument
@out_option("the adapter")
@click.option(
    "--model",
    metavar="REF",
    help="The model that was trained, as zsl-train takes it: its configuration is read, not its weights.  "
    "[default: as named by the run or the adapter]",
)
@click.option(
    "--base-model",
    metavar="ID",
    help="Hub id of the base model, for the adapter's configuration.  [default: that of the model, if it has one]",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def export(adapters: tuple[Path, ...], out: Path, model: str | None, base_model: str | None, debug: bool) -> None:
    """Write the adapters of a run as one PEFT adapter of the whole model.

    Accepts the directory of a zsl-train run, one of its checkpoints, bottom_lora, trunk_lora and top_lora, or an
    adapter that PEFT's own save_pretrained wrote for a split model. PEFT loads the result on the whole model, and
    every tensor is compared, before it is moved to DIR.

    \b
      zsl export runs/synthetic --out adapter
      zsl export runs/smollm2/bottom_lora runs/smollm2/top_lora --out adapter \\
          --base-model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    with one_line_errors("zsl export", debug=debug):
        from zsl.training.directory.trained import find_trained

        trained = find_trained(adapters)
        stop_on_sigterm()  # as Ctrl-C: removes temporary files
        quiet_libraries(debug=debug)

        from zsl.adapters.export import export as export_adapters

        reference = model_of(trained, model)
        facts = {**trained.facts, "zsl": __version__}
        made = export_adapters(trained.adapters, reference, out, base_model=base_model, facts=facts)
        say(f"Exported {', '.join(map(str, trained.adapters))} as an adapter of the whole {reference.text}:")
        for name, value in made.rows().items():
            say(f"  {name:<11} {value}")
        say(f"  {'base model':<11} {made.base_model or 'none named; --base-model ID lets others find it'}")
        say(f"PEFT loads it, every tensor as it was trained. It is in {out}")
