"""Model that the benchmarks train: LoRA on its outer layers, AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from turns import StepSeconds

from zsl.split.stack import find_stack


@dataclass(frozen=True)
class Trainee:
    """A model with LoRA on its outer layers, and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, ids: torch.Tensor) -> tuple[float, StepSeconds]:
        """The loss of one step on the tokens `[rows, tokens]`, and the time that it took."""
        began = perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        forwarded = perf_counter()
        loss.backward()
        went_back = perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), StepSeconds(forwarded - began, went_back - forwarded, perf_counter() - began)


def trainee(model: PreTrainedModel, layers: Sequence[int], seed: int = 0) -> Trainee:
    """LoRA of rank 8 on all linear modules of `layers`, seeded."""
    stack = find_stack(model)
    model.config.use_cache = False
    targets = sorted(
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and any(name.startswith(f"{stack.name}.{layer}.") for layer in layers)
    )
    torch.manual_seed(seed)
    config = LoraConfig(r=8, target_modules=targets, fan_in_fan_out=model.config.model_type == "gpt2")
    peft_model = get_peft_model(model, config).train()
    for module in peft_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a trunk has none, and the losses are compared
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    return Trainee(peft_model, torch.optim.AdamW(trainable, lr=1e-4))
