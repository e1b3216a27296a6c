"""Fixtures: checkpoints of tiny models, and daemons that serve them. Loaded where there is torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from .daemon import Daemon
from .embedded import InsteadOfAProcess
from .models import CUT, write_checkpoint

# Two cores are shared with the daemons: more threads only wait for each other.
torch.set_num_threads(2)
disable_progress_bar()
set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def embedded_trunks_in_threads() -> Iterator[None]:
    """Commands that a test calls in its own process start no daemon: dozens would take minutes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("zsl.training.run.embedded_trunk.EmbeddedTrunk", InsteadOfAProcess)
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoints("llama", seed=1)` is the directory of a tiny checkpoint of that family."""
    directory = tmp_path_factory.mktemp("checkpoints")
    return lambda family, **how: write_checkpoint(directory, family, **how)


@pytest.fixture(scope="module")
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `datasets` caches to one file of tests, and its progress bars off the screen."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def serve(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Daemon]]:
    """`serve("llama")` is a daemon in another process that serves the family's checkpoint; started once."""
    directory = tmp_path_factory.mktemp("daemons")
    running: dict[tuple[str, ...], Daemon] = {}
    with ExitStack() as stack:

        def served(family: str, *options: str) -> Daemon:
            key = (family, *options)
            if key not in running:
                log = directory / f"{len(running)}.log"
                # Batch sizes by hand: what a probe of so small a model finds is chance.
                batches = ["--max-batch-tokens", "512", "--merge-below-tokens", "64"]
                arguments = ["--model", str(checkpoints(family)), "--cut", CUT, "--threads", "2", *batches, *options]
                running[key] = stack.enter_context(Daemon(*arguments, log=log))
            return running[key]

        yield served
