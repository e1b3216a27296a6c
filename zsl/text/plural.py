"""Format counts with a singular or plural noun."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return a count and its noun, such as `1 row` or `1,000 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
