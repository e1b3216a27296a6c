"""Check that the Hugging Face hub answers, and set this process offline if it does not.

Otherwise every look-up of the hub's libraries waits and retries for tens of seconds.
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
    """Return the reason for being offline, or None if the hub answers. The first call may take a few seconds."""
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
    """Return the reason why the hub does not answer, or None if it does. Takes a few seconds at most.

    Sends the request as the hub's libraries do: through the same proxy, with the same certificates. Changes nothing.
    """
    reasons = [f"{constants.ENDPOINT} did not answer within {2 * CONNECT_SECONDS:g} seconds"]

    def ask() -> None:
        try:
            answer = get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS, follow_redirects=False)
        except Exception as error:  # any exception is the reason
            reasons.append(f"{constants.ENDPOINT} cannot be reached: {str(error) or type(error).__name__}")
        else:
            failed = answer.status_code >= 500
            reasons.append(f"{constants.ENDPOINT} answers {answer.status_code}" if failed else "")

    # In a thread, because the look-up of a host's address has no time limit.
    thread = threading.Thread(target=ask, name="zsl-hub", daemon=True)
    thread.start()
    thread.join(2 * CONNECT_SECONDS)
    return reasons[-1] or None
