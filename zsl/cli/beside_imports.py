"""Begin a command that computes: its own trunk, if it needs one, loads beside the slow imports of this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from zsl.cli.quiet import quiet_libraries
from zsl.trunk.openmp import limit_spinning

if TYPE_CHECKING:
    from zsl.training.config.config import TrunkTable
    from zsl.trunk.daemon.embedded import EmbeddedTrunk


@contextmanager
def beside_imports(table: TrunkTable, model: str | None, dtype: str, *, debug: bool) -> Iterator[EmbeddedTrunk | None]:
    """Start the embedded trunk of a model that is named, if no daemon is, and import transformers quietly."""
    from zsl.training.run.embedded_trunk import embedded_trunk

    limit_spinning(os.environ)
    with ExitStack() as stack:
        embedded = None
        if model is not None and table.endpoint is None:
            embedded = stack.enter_context(embedded_trunk(table, model, dtype))
        quiet_libraries(debug=debug)
        yield embedded
