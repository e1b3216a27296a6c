"""Silence warnings and progress bars of transformers, PEFT and bitsandbytes in commands."""

from __future__ import annotations

import logging
import os
import warnings

from zsl.text.printable import printable


def quiet_libraries(*, debug: bool) -> None:
    """Restrict transformers, PEFT and bitsandbytes to errors, without progress bars; with `debug`, only hide the bars.

    Warnings of zsl itself are shown in one line. Call this before the libraries are imported: some warn then.
    """
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"zsl\.")
        warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    if not debug:
        set_verbosity_error()
