"""The first line of another library's error."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's text, and the next if the first only announces it: one line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
