"""docs/structure.md has a line for every module, and it is the module's own."""

from __future__ import annotations

from support.module_map import BEGIN, END, PAGE, module_map


def test_the_map_has_the_first_line_of_every_modules_docstring() -> None:
    """Written anew by `cd tests && ../.venv/bin/python -m support.module_map`."""
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip() == module_map().strip()
