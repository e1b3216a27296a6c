"""Log-probabilities of the tokens of a text: while it is sampled, and in the forward of a training on it."""

from __future__ import annotations

from typing import Any

import torch


def sampled_and_trained(
    model: Any, prompt: torch.Tensor, tokens: int, *, use_cache: bool, prefixes: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `tokens` behind a prompt `[rows, tokens]`. Return the log-probabilities of both `[rows, tokens]`.

    `prefixes`: those of the training are of a forward for each token, on the text before it, as that of the sampling
    without a cache is; else of one forward on the whole.
    """
    torch.manual_seed(3)
    made = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        top_k=0,
        pad_token_id=0,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    length, ids = prompt.shape[1], made.sequences
    if prefixes:
        ends = range(length, length + tokens)
        logits = torch.cat([_forward(model, ids[:, :end], logits_to_keep=1) for end in ends], 1)
    else:
        logits = _forward(model, ids)[:, length - 1 : -1]
    return _of(torch.stack(made.logits, 1), ids[:, length:]), _of(logits, ids[:, length:])


def _forward(model: Any, ids: torch.Tensor, **how: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **how).logits
    assert logits.requires_grad, "a training"
    return logits.detach()


def _of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
