"""Whether the Hugging Face hub can be asked. Where it cannot, this process works offline, from what is cached.

Without that, every look-up of the hub's libraries waits and tries again for tens of seconds.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import cache

from huggingface_hub import constants, get_session, is_offline_mode

CONNECT_SECONDS = 3.0


@cache
def why_offline() -> str | None:
    """Why the hub is not asked, or None where it answers. Takes a few seconds at most, and only the first time."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    reason = why_no_answer()
    if reason is not None:
        _go_offline()
    return reason


def _go_offline() -> None:
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` reads it when it is imported
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def why_no_answer() -> str | None:
    """Why the hub does not answer now, or None where it does. Takes a few seconds at most, and changes nothing.

    Asks as the hub's libraries do: through the same proxy, with the same certificates.
    """
    reasons = [f"{constants.ENDPOINT} did not answer within {2 * CONNECT_SECONDS:g} seconds"]

    def ask() -> None:
        try:
            answer = get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS, follow_redirects=False)
        except Exception as error:  # whatever stands in the way: it is the reason
            reasons.append(f"{constants.ENDPOINT} cannot be reached: {str(error) or type(error).__name__}")
        else:
            unwell = answer.status_code >= 500
            reasons.append(f"{constants.ENDPOINT} answers {answer.status_code}" if unwell else "")

    # In a thread, because no time limit holds for the look-up of a host's address.
    thread = threading.Thread(target=ask, name="zsl-hub", daemon=True)
    thread.start()
    thread.join(2 * CONNECT_SECONDS)
    return reasons[-1] or None
