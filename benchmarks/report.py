"""Report of a benchmark: rows as a printed table, a JSON file with the machine's data, and a plot.

    report = Report("transport", "Round trips over loopback TCP", out)
    report.add(payload="8 MB", transport="zsl", median_ms=12.3)
    report.note("what the numbers mean")
    report.publish()
    report.plot_bars("payload", "median_ms", "transport", x_label="payload", y_label="median round trip (ms)")

Imports no torch, so that a process that only measures does not pay for it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display; before pyplot
from matplotlib import pyplot
from matplotlib.axes import Axes

DEFAULT_OUT = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "pyzmq", "msgpack", "grpcio")
FIGURE_INCHES = (8, 5)
DOTS_PER_INCH = 150

Row = dict[str, Any]

out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_OUT,
    show_default="benchmarks/results",
    help="Directory for the JSON file and the plot.",
)


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of all lie, interpolated."""
    return float(np.percentile(values, percent))


def interquartile(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile."""
    return percentile(values, 25), percentile(values, 75)


class Report:
    """The results of one benchmark. A row maps a column to a text, a number, or a tuple (low, high)."""

    def __init__(self, name: str, description: str, out: Path) -> None:
        self._name = name
        self._description = description
        self._out = out
        self._rows: list[Row] = []
        self._notes: list[str] = []

    def add(self, **row: Any) -> None:
        """Another row."""
        self._rows.append(row)

    def note(self, text: str) -> None:
        """A line under the table."""
        self._notes.append(text)

    def publish(self) -> None:
        """Print the table, and write `<out>/<name>.json`."""
        facts = machine_facts()
        versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        print(self._description)
        print(
            f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, Python {facts['python']}, {versions}"
        )
        print()
        print(as_table(self._rows))
        print("".join(f"\n{note}" for note in self._notes))
        results = {
            "name": self._name,
            "description": self._description,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "machine": facts,
            "rows": self._rows,
            "notes": self._notes,
        }
        self._out.mkdir(parents=True, exist_ok=True)
        self._path("json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"\nwritten: {_shown(self._path('json'))}")

    def plot_lines(
        self,
        x: str,
        y: str,
        series: str,
        *,
        x_label: str,
        y_label: str,
        log_x: bool = False,
        log_y: bool = False,
        only: tuple[str, str] | None = None,
    ) -> None:
        """`<out>/<name>.png`: column `y` over column `x`, one line for each value of the column `series`.

        With `only` a column and a value: of the rows that have it, in `<out>/<name>-<value>.png`.
        """
        rows = [row for row in self._rows if only is None or row[only[0]] == only[1]]

        def draw(axes: Axes) -> None:
            for name in _distinct(rows, series):
                points = sorted((row[x], row[y]) for row in rows if row[series] == name and y in row)
                axes.plot(*zip(*points, strict=True), marker="o", label=str(name))
            axes.set_xscale("log" if log_x else "linear")
            axes.set_yscale("log" if log_y else "linear")
            if not log_x:
                axes.set_xticks(sorted({row[x] for row in rows}))
            if not log_y:
                axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)

        self._plot(draw, series, x_label, y_label, only)

    def plot_bars(self, group: str, y: str, series: str, *, x_label: str, y_label: str) -> None:
        """`<out>/<name>.png`: column `y` as bars, one group for each `group`, in it one bar for each `series`."""

        def draw(axes: Axes) -> None:
            groups, names = _distinct(self._rows, group), _distinct(self._rows, series)
            width = 0.8 / len(names)
            heights = {(row[group], row[series]): row[y] for row in self._rows if y in row}
            present = {key: [name for name in names if (key, name) in heights] for key in groups}
            for name in names:
                own = [key for key in groups if name in present[key]]
                # A group that lacks some of the series is still centred on its tick.
                places = [present[key].index(name) - (len(present[key]) - 1) / 2 for key in own]
                positions = [groups.index(key) + place * width for key, place in zip(own, places, strict=True)]
                bars = axes.bar(positions, [heights[key, name] for key in own], width, label=str(name))
                axes.bar_label(bars, fmt=_in_three_digits, fontsize=8)
            axes.set_xticks(range(len(groups)), [str(key) for key in groups])
            axes.grid(axis="y", alpha=0.3)

        self._plot(draw, series, x_label, y_label)

    def _plot(
        self,
        draw: Callable[[Axes], None],
        series: str,
        x_label: str,
        y_label: str,
        only: tuple[str, str] | None = None,
    ) -> None:
        path = self._path("png")
        title = self._description
        if only is not None:
            path, title = path.with_stem(f"{path.stem}-{only[1]}"), f"{title}; {only[0]} {only[1]}"
        figure, axes = pyplot.subplots(figsize=FIGURE_INCHES, layout="constrained")
        draw(axes)
        axes.set_title(title, fontsize=10, wrap=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(title=series)
        self._out.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH)
        pyplot.close(figure)
        print(f"written: {_shown(path)}")

    def _path(self, suffix: str) -> Path:
        return self._out / f"{self._name}.{suffix}"


def as_table(rows: Sequence[Row]) -> str:
    """The rows under their columns' names: texts to the left, numbers to the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    is_text = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in (columns, *cells)
    )


def machine_facts() -> dict[str, Any]:
    """Return the machine's data that a reader needs to interpret the numbers."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {package: version for package in PACKAGES if (version := _version(package)) is not None},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform knows only the architecture there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " to ".join(_cell(part) for part in value)
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _in_three_digits(value: float) -> str:
    """12.3, 1230: three digits that count, and no power of ten."""
    digits = max(2 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:.{digits}f}"


def _distinct(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def _shown(path: Path) -> str:
    """The path as seen from here, where it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
