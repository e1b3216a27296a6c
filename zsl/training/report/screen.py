"""Format the tables, progress lines and summary that `zsl-train` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zsl.text.plural import counted
from zsl.training.report.step_measure import StepMeasure

# Number of parts of a step's time in a line, which must fit a terminal of 80 columns.
LARGEST_PARTS = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Row of the table of model parts."""

    name: str
    layers: str
    parameters: int
    trainable: int
    place: str


def parts_table(parts: Sequence[Part]) -> str:
    """Format bottom, trunk and top with their layers and parameters."""
    lines = ["Model parts", f"  {'part':<7} {'layers':<22} {'parameters':>13}  where"]
    lines += [f"  {p.name:<7} {p.layers:<22} {p.parameters:>13,}  {p.place}" for p in parts]
    return "\n".join(lines)


def trainable_table(parts: Sequence[Part]) -> str:
    """Format the trainable parameters of the client's parts, and of the trunk's if it has any."""
    lines = ["Trainable parameters"]
    lines += [
        f"  {part.name:<7} {part.trainable:>13,} of {part.parameters:,} ({part.trainable / part.parameters:.2%})"
        for part in parts
        if part.parameters and (part.trainable or part.place == "this process")
    ]
    return "\n".join(lines)


def layer_range(start: int, stop: int) -> str:
    """Format a range of layers: `layers 0-1`, `layer 4` or `no layers`."""
    if start >= stop:
        return "no layers"
    return f"layer {start}" if stop - start == 1 else f"layers {start}-{stop - 1}"


def epoch_summary(epoch: int, losses: Sequence[float]) -> str:
    """Format the average, lowest and highest loss of an epoch's steps."""
    average = sum(losses) / len(losses)
    return (
        f"Epoch {epoch}: {counted(len(losses), 'step')}, loss average {average:.4f}, lowest {min(losses):.4f}, "
        f"highest {max(losses):.4f}"
    )


def step_line(step: int, of_steps: int, loss: float, measure: StepMeasure, seconds_left: float) -> str:
    """Format the line of a logged step, with the parts that took most of its time."""
    largest = sorted(measure.part_seconds, key=lambda part: -measure.part_seconds[part])[:LARGEST_PARTS]
    parts = [
        f"{part} {seconds / measure.seconds:.0%}"
        for part, seconds in measure.part_seconds.items()
        if part in largest and measure.seconds
    ]
    shown = [f"{measure.tokens_per_second:,.0f} tok/s", " ".join(parts), f"{duration(seconds_left)} left"]
    return f"  step {step}/{of_steps}: loss {loss:.4f}, " + ", ".join(words for words in shown if words)


def byte_count(number: float) -> str:
    """Format bytes with a unit: `512 B`, `1.6 kB`, `23 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.3g} {unit}"


def duration(seconds: float) -> str:
    """Format seconds: `0:42`, `12:05`, `3:07:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def communication_table(
    *,
    bytes_up: float,
    bytes_down: float,
    adapter_bytes_up: float = 0.0,
    adapter_bytes_down: float = 0.0,
    adapter_bytes: int,
    gradient_bytes: int,
    tokens: float,
) -> str:
    """Format the measured bytes per step beside those of other methods of distributed training.

    `adapter_bytes_up` and `adapter_bytes_down` are the measured bytes of adapters on the trunk's layers and of their
    gradients; the rest are activations and theirs.
    Averaging adapters (federated LoRA) sends the adapter both ways once in a round of many steps; exchanging gradients
    sends the whole model's in each step.
    """
    activations_and_adapters = [
        ("  activations", bytes_up - adapter_bytes_up, bytes_down - adapter_bytes_down),
        ("  adapters on the trunk", adapter_bytes_up, adapter_bytes_down),
    ]
    rows = [
        ("this run, measured", bytes_up, bytes_down),
        *(activations_and_adapters if adapter_bytes_up else ()),
        ("the adapter, once a round", adapter_bytes, adapter_bytes),
        ("the whole model's gradient", gradient_bytes, gradient_bytes),
    ]
    lines = [f"Communication per step of {tokens:,.0f} tokens", f"  {'':<28} {'up':>9} {'down':>9}"]
    lines += [f"  {name:<28} {byte_count(up):>9} {byte_count(down):>9}" for name, up, down in rows]
    return "\n".join(lines)


def validation_line(step: int, of_steps: int, loss: float, perplexity: float) -> str:
    """Format the line of a validation."""
    return f"  step {step}/{of_steps}: validation loss {loss:.4f}, perplexity {perplexity:.2f}"


def sample_line(step: int, of_steps: int, prompt: str, text: str) -> str:
    """Format the line of a sample text."""
    return f"  step {step}/{of_steps}: {prompt}|{text}"


def stopped_early(
    step: int, of_steps: int, patience: int, best: float | None, *, threshold: float = 0.0, went_by: str = "loss"
) -> str:
    """Format the line about early stopping, with the best value of its metric."""
    lower = "lower" if best is None else f"lower than {best:.4f}"
    by = f" by more than {threshold:g}" if threshold else ""
    return (
        f"  stopped at step {step} of {of_steps}: no validation {went_by} {lower}{by} "
        f"in {counted(patience, 'validation')}"
    )


def final_summary(
    losses: Sequence[float],
    seconds: float,
    validations: Sequence[tuple[int, float]] = (),
    *,
    kept: int | None = None,
) -> str:
    """Format the summary of a run. `validations` are (step, loss); `kept` is the step of the best adapters, if kept.

    The conclusion is drawn from the validation loss if there is one: losses of two steps are of different rows.
    """
    if not losses:
        return "Summary\n  no step was taken"
    finite = [loss for loss in losses if math.isfinite(loss)]
    lines = [
        "Summary",
        f"  steps    {len(losses)} in {seconds:.1f} s",
        f"  first    {losses[0]:.4f}",
        f"  last     {losses[-1]:.4f}",
        f"  lowest   {min(finite, default=math.nan):.4f}",
        f"  average  {sum(losses) / len(losses):.4f}",
    ]
    if len(finite) < len(losses):
        step = next(step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss))
        lines.append(f"  The loss is not a finite number, first at step {step}: try a lower train.learning_rate.")
    elif len(validations) > 1:
        (first_step, first), (last_step, last) = validations[0], validations[-1]
        lines.append(f"  The validation loss was {first:.4f} at step {first_step}, {last:.4f} at step {last_step}.")
        lines.append(f"  {_change('validation loss', first, last)}")
    elif len(losses) > 1:
        lines.append(f"  {_change('loss', losses[0], losses[-1])}")
    if kept is not None and validations:
        lowest_step, lowest = min(validations, key=lambda validation: validation[1])
        if lowest < dict(validations).get(kept, lowest):
            lines.append(
                f"  The adapters are those of step {kept}, the best checkpoint; "
                f"at step {lowest_step} the validation loss was lower: {lowest:.4f}."
            )
        else:
            lines.append(f"  The adapters are those of step {kept}, where the validation loss was lowest.")
    return "\n".join(lines)


def _change(what: str, first: float, last: float) -> str:
    if round(last - first, 4) == 0:
        return f"The {what} did not change."
    if last < first:
        return f"The {what} fell by {first - last:.4f}."
    return f"The {what} did not fall: it rose by {last - first:.4f}."
