"""What is printed before a training: the parts of the model, and the connection."""

from __future__ import annotations

from peft import PeftModel

from zsl.client.remote import RemoteTrunk
from zsl.split.adapter import adapter_parameters
from zsl.split.reference import ModelReference
from zsl.split.sides import Side, Sides
from zsl.split.stack import layer_count
from zsl.training.report import Part, layer_range, parts_table, trainable_table

SIDES: tuple[Side, Side] = ("bottom", "top")


def overview(model: PeftModel, sides: Sides, reference: ModelReference, trunk: RemoteTrunk, trunk_place: str) -> str:
    """Parts, trainable parameters and connection, as text."""
    welcome = trunk.client.welcome
    parts = _parts(model, sides, reference, trunk, trunk_place)
    connection = (
        f"Connection\n  {trunk.endpoint}, {welcome.model.model_type} "
        f"({welcome.model.layers} layers, weights {welcome.model.weights_digest[:12]}), cut {welcome.cut}, "
        f"{welcome.dtype}, mode {trunk.mode}"
    )
    return f"{parts_table(parts)}\n\n{trainable_table(parts)}\n\n{connection}"


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
