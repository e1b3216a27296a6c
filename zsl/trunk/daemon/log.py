"""Logging of the daemon: text or JSON lines, rate-limited by place in the code.

Never logs tensors, keys or text of a client. A repeated line (one for each of a million bad messages) is written a few
times, then counted.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from zsl.text.plural import counted
from zsl.text.printable import PrintableFormatter

logger = logging.getLogger(__name__)

LogFormat = Literal["text", "json"]

ALIKE_LINES = 10
ALIKE_SECONDS = 10.0


@dataclass(slots=True)
class _Alike:
    since: float
    written: int = 0
    left_out: int = 0


class FewAlike(logging.Filter):
    """Rate limit: at most `ALIKE_LINES` lines per place in the code in `ALIKE_SECONDS`. The next line then states how
    many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._forms: dict[tuple[str, int], _Alike] = {}  # by place in the code

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        form = self._forms.setdefault((record.pathname, record.lineno), _Alike(now))
        if now - form.since >= ALIKE_SECONDS:
            if form.left_out:
                record.msg, record.args = f"{record.getMessage()} ({form.left_out} more like this before)", ()
            form.since, form.written, form.left_out = now, 0, 0
        form.written += 1
        form.left_out += form.written > ALIKE_LINES
        return form.written <= ALIKE_LINES


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: time (UTC), level, logger, message, and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def formatter_for(log_format: LogFormat) -> logging.Formatter:
    """Return the formatter of this log format."""
    if log_format == "json":
        return JsonFormatter()
    return PrintableFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")


def line_of_dropped(log_format: LogFormat) -> Callable[[int], str]:
    """Return a function that formats the log line for a number of dropped lines."""
    formatter = formatter_for(log_format)

    def line(count: int) -> str:
        facts = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
        text = f"{counted(count, 'line')} dropped here: they were not read in time"
        return formatter.format(logging.makeLogRecord({**facts, "msg": text})) + "\n"

    return line


def set_up_logging(log_format: LogFormat, *, debug: bool) -> None:
    """Log to stderr: `zsl.*` from INFO (or DEBUG), warnings of other loggers, and exceptions that end a thread."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter_for(log_format))
    if not debug:
        handler.addFilter(FewAlike())
        # On import it warns of a missing kernel for 4-bit layers, which a trunk does not use.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("zsl").setLevel(logging.DEBUG if debug else logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook = _log_end_of_thread


def _log_end_of_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_value is not None:
        info = ended.exc_type, ended.exc_value, ended.exc_traceback
        logger.critical("an exception ended the thread %s", ended.thread and ended.thread.name, exc_info=info)
