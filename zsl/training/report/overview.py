"""Describe the model's parts, the connection and the communication per step, as text."""

from __future__ import annotations

from peft import PeftModel

from zsl.adapters.save import adapter_parameters
from zsl.client.remote import RemoteTrunk
from zsl.models.reference import ModelReference
from zsl.split.ghosts import GhostWeight
from zsl.split.sides import Side, Sides, numbers_in
from zsl.split.stack import layer_count
from zsl.training.report.screen import Part, communication_table, layer_range, parts_table, trainable_table
from zsl.training.report.step_measure import StepMeasure

SIDES: tuple[Side, Side, Side] = ("bottom", "trunk", "top")


def overview(model: PeftModel, sides: Sides, reference: ModelReference, trunk: RemoteTrunk, trunk_place: str) -> str:
    """Return the model's parts, trainable parameters and connection as text."""
    welcome = trunk.client.welcome
    parts = _parts(model, sides, reference, trunk, trunk_place)
    bits = "" if welcome.quantization is None else f" ({welcome.quantization})"
    connection = (
        f"Connection\n  {trunk.endpoint}\n  {welcome.model.model_type} "
        f"({welcome.model.layers} layers, weights {welcome.model.weights_digest[:12]}), cut {welcome.cut}, "
        f"{welcome.dtype}{bits}, mode {trunk.effective_mode}"
    )
    return f"{parts_table(parts)}\n\n{trainable_table(parts)}\n\n{connection}"


def communication(measured: StepMeasure, model: PeftModel, trunk: RemoteTrunk) -> str:
    """Compare the bytes sent per step with the sizes of the adapter and of the whole model's gradient, as text."""
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    item_size = max((p.element_size() for p in frozen if p.is_floating_point()), default=4)
    held = (p for p in frozen if not isinstance(p, GhostWeight))
    # A gradient has one float per parameter, also for quantized weights.
    numbers = sum(map(numbers_in, held)) + trunk.client.welcome.trunk_parameters
    return communication_table(
        bytes_up=measured.traffic.bytes_up / measured.steps,
        bytes_down=measured.traffic.bytes_down / measured.steps,
        adapter_bytes_up=measured.traffic.adapter_bytes_up / measured.steps,
        adapter_bytes_down=measured.traffic.adapter_bytes_down / measured.steps,
        adapter_bytes=trainable,
        gradient_bytes=numbers * item_size,
        tokens=measured.tokens / measured.steps,
    )


def _parts(
    model: PeftModel, sides: Sides, reference: ModelReference, trunk: RemoteTrunk, trunk_place: str
) -> list[Part]:
    welcome = trunk.client.welcome
    cut, layers = welcome.cut, layer_count(reference.config)
    layers_of: dict[Side, str] = {
        "bottom": f"embeddings, {layer_range(0, cut.start)}",
        "trunk": layer_range(cut.start, cut.stop),
        "top": f"{layer_range(cut.stop, layers)}, head",
    }
    parts = []
    for side in SIDES:
        in_trunk = side == "trunk"
        parameters = welcome.trunk_parameters if in_trunk else sides.parameter_count(side)
        place = trunk_place if in_trunk else "this process"
        parts.append(Part(side, layers_of[side], parameters, adapter_parameters(model, sides, side), place))
    return parts
