"""Numbers in words. Knows no torch."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
