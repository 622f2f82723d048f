"""Figures: what was measured, beside the raw limit of the machine, and how they are printed."""

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table


class Figure(msgspec.Struct, frozen=True):
    workload: str
    name: str
    value: float
    unit: str
    raw: float | None = None  # the raw limit in the same unit; None where there is nothing to compare with

    @property
    def ratio(self) -> float | None:
        """The figure over its raw limit: below 1 is less throughput, or less time."""
        return None if not self.raw else self.value / self.raw

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        raw = "" if self.raw is None else f"{_digits(self.raw)} {self.unit}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return self.workload, self.name, f"{_digits(self.value)} {self.unit}", raw, ratio


COLUMNS = ("workload", "figure", "value", "raw limit", "ratio")


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` per cent of them; `values` must not be empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def print_table(figures: Iterable[Figure], command: str) -> None:
    table = Table(*COLUMNS)
    for column in table.columns[2:]:
        column.justify = "right"
    for figure in figures:
        table.add_row(*figure.cells)
    console = Console()
    console.print(table)
    console.print(origin(command))


def markdown_table(figures: Iterable[Figure], command: str) -> str:
    """The same table as Markdown, for `bench/RESULTS.md`."""
    lines = [COLUMNS, ("---", "---", "--:", "--:", "--:"), *(figure.cells for figure in figures)]
    return "\n".join([f"| {' | '.join(cells)} |" for cells in lines]) + f"\n\n{origin(command)}\n"


def origin(command: str) -> str:
    """Command, commit, machine and versions in a line."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout.strip()
    parts = (
        f"`{command}`",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"commit {commit or 'none'}",
        f"{_processor()} × {os.cpu_count()}",
        f"{platform.system()} {platform.release()}",
        f"Python {platform.python_version()}",
    )
    return ", ".join(parts)


def _processor() -> str:
    information = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in information.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
