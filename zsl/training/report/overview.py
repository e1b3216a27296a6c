"""Describe the model's parts, the connection and the communication per step, as text."""

from __future__ import annotations

from peft import PeftModel

from zsl.adapters.save import adapter_parameters
from zsl.client.remote import RemoteTrunk
from zsl.models.reference import ModelReference
from zsl.split.sides import Side, Sides, numbers_in
from zsl.split.stack import layer_count
from zsl.training.report.screen import Part, communication_table, layer_range, parts_table, trainable_table
from zsl.training.report.step_measure import StepMeasure

SIDES: tuple[Side, Side] = ("bottom", "top")


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
    # A gradient has one float per parameter, also for quantized weights.
    numbers = sum(map(numbers_in, frozen)) + trunk.client.welcome.trunk_parameters
    return communication_table(
        bytes_up=measured.traffic.bytes_up / measured.steps,
        bytes_down=measured.traffic.bytes_down / measured.steps,
        adapter_bytes=trainable,
        gradient_bytes=numbers * item_size,
        tokens=measured.tokens / measured.steps,
    )


def _parts(
    model: PeftModel, sides: Sides, reference: ModelReference, trunk: RemoteTrunk, trunk_place: str
) -> list[Part]:
    welcome = trunk.client.welcome
    cut, layers = welcome.cut, layer_count(reference.config)
    ends = {"bottom": f"embeddings, {layer_range(0, cut.start)}", "top": f"{layer_range(cut.stop, layers)}, head"}
    bottom, top = (
        Part(side, ends[side], sides.parameter_count(side), adapter_parameters(model, sides, side), "this process")
        for side in SIDES
    )
    middle = Part("trunk", f"{layer_range(cut.start, cut.stop)}", welcome.trunk_parameters, 0, trunk_place)
    return [bottom, middle, top]
