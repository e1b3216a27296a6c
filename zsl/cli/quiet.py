"""What the libraries below have to say to each other is not for whoever types a command."""

from __future__ import annotations

import logging
import os
import warnings

from zsl.text.printable import printable


def quiet_libraries(*, debug: bool) -> None:
    """Let transformers, PEFT and bitsandbytes speak of errors only, and draw no bars; with `debug`, just no bars.
    What zsl itself warns of is shown, in a line.

    To be called before they are loaded: some speak while they are.
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
