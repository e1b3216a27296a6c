"""Shorten an error of another library to its first line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with the second if the first ends with a colon, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
