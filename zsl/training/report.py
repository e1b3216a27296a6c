"""What `zsl-train` shows: text made of numbers. Knows no model and no trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the table of model parts."""

    name: str
    layers: str
    parameters: int
    trainable: int
    place: str


def parts_table(parts: Sequence[Part]) -> str:
    """Bottom, trunk and top with their layers and parameters."""
    lines = ["Model parts", f"  {'part':<7} {'layers':<22} {'parameters':>13}  where"]
    lines += [f"  {p.name:<7} {p.layers:<22} {p.parameters:>13,}  {p.place}" for p in parts]
    return "\n".join(lines)


def trainable_table(parts: Sequence[Part]) -> str:
    """What of the client's parts learns."""
    lines = ["Trainable parameters"]
    lines += [
        f"  {part.name:<7} {part.trainable:>13,} of {part.parameters:,} ({part.trainable / part.parameters:.2%})"
        for part in parts
        if part.place == "this process" and part.parameters
    ]
    return "\n".join(lines)


def layer_range(start: int, stop: int) -> str:
    """`layers 0-1`, `layer 4` or `no layers`."""
    if start >= stop:
        return "no layers"
    return f"layer {start}" if stop - start == 1 else f"layers {start}-{stop - 1}"


def epoch_summary(epoch: int, losses: Sequence[float]) -> str:
    """Average, lowest and highest loss of an epoch's steps."""
    average = sum(losses) / len(losses)
    return (
        f"Epoch {epoch}: {len(losses)} steps, loss average {average:.4f}, lowest {min(losses):.4f}, "
        f"highest {max(losses):.4f}"
    )


def validation_line(step: int, of_steps: int, loss: float, perplexity: float) -> str:
    """What a validation gave."""
    return f"  step {step}/{of_steps}: validation loss {loss:.4f}, perplexity {perplexity:.2f}"


def stopped_early(step: int, of_steps: int, patience: int) -> str:
    """That a training ended before its last step."""
    return f"  stopped at step {step} of {of_steps}: no lower validation loss in {patience} validations"


def final_summary(
    losses: Sequence[float],
    seconds: float,
    validations: Sequence[tuple[int, float]] = (),
    *,
    kept: int | None = None,
) -> str:
    """What became of the loss. `validations` are (step, loss); `kept` is the step whose adapters are saved, if it is
    not the last."""
    if not losses:
        return "Summary\n  no step was taken"
    fell = losses[-1] < losses[0]
    lines = [
        "Summary",
        f"  steps    {len(losses)} in {seconds:.1f} s",
        f"  first    {losses[0]:.4f}",
        f"  last     {losses[-1]:.4f}",
        f"  lowest   {min(losses):.4f}",
        f"  average  {sum(losses) / len(losses):.4f}",
        f"  The loss {'fell' if fell else 'did not fall'}"
        + (f" by {losses[0] - losses[-1]:.4f}." if fell else f": it rose by {losses[-1] - losses[0]:.4f}."),
    ]
    if validations:
        (first_step, first), (last_step, last) = validations[0], validations[-1]
        lines.append(f"  validation loss {first:.4f} at step {first_step}, {last:.4f} at step {last_step}")
    if kept is not None:
        lines.append(f"  The adapters are those of step {kept}, where the validation loss was lowest.")
    return "\n".join(lines)
