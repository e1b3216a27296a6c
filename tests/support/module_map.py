"""The map of docs/structure.md: each module with the first line of its docstring.

python -m support.module_map            in tests/: writes it anew
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "structure.md"
BEGIN, END = "<!-- map: tests/support/module_map.py -->\n", "<!-- end of the map -->\n"


def module_map() -> str:
    """Markdown tables: one for each room, one row for each module."""
    files = sorted((ROOT / "zsl").rglob("*.py"))
    rooms: dict[Path, list[Path]] = {}
    for file in files:
        rooms.setdefault(file.parent.relative_to(ROOT), []).append(file)
    tables = []
    for room, modules in sorted(rooms.items()):
        rows = [f"| `{file.name}` | {first_line(file)} |" for file in modules if file.name != "__init__.py"]
        if rows:
            head = f"### `{room}/`\n{first_line(room / '__init__.py')}\n\n| module | |\n|---|---|\n"
            tables.append(head + "\n".join(rows) + "\n")
    return "\n".join(tables)


def first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text()))
    assert docstring, f"{file} has no docstring"
    return docstring.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + module_map() + "\n" + END + rest.partition(END)[2])
