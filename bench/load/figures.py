"""Figures: what was measured, beside the limit of the machine and the goal, and how they are printed."""

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table


class Goal(msgspec.Struct, frozen=True):
    """What a figure is to reach."""

    number: int  # of the table of goals in `bench/RESULTS.md`
    relation: Literal["≥", "≤"]
    bound: float
    of: Literal["ratio", "value"] = "value"

    def is_met(self, figure: "Figure") -> bool:
        measured = figure.value if self.of == "value" else figure.ratio
        if measured is None:
            return False
        return measured >= self.bound if self.relation == "≥" else measured <= self.bound


class Figure(msgspec.Struct, frozen=True):
    workload: str
    name: str
    value: float
    unit: str
    raw: float | None = None  # the limit in the same unit; None where there is nothing to compare with
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        """The figure over its limit: below 1 is less throughput, or less time."""
        return None if not self.raw else self.value / self.raw

    @property
    def cells(self) -> tuple[str, ...]:
        goal, number, bound, verdict = self.goal, "", "", ""
        if goal is not None:
            of = f"{goal.bound:g} ×" if goal.of == "ratio" else _with_unit(goal.bound, self.unit)
            number, bound, verdict = str(goal.number), f"{goal.relation} {of}", _VERDICTS[goal.is_met(self)]
        limit = "" if self.raw is None else _with_unit(self.raw, self.unit)
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        return number, self.workload, self.name, limit, _with_unit(self.value, self.unit), ratio, bound, verdict


class Failure(msgspec.Struct, frozen=True):
    """The row of a workload that could not be measured."""

    goals: tuple[int, ...]
    workload: str
    reason: str

    @property
    def cells(self) -> tuple[str, ...]:
        return ", ".join(map(str, self.goals)), self.workload, self.reason, "", "", "", "", _VERDICTS[False]


Row = Figure | Failure
COLUMNS = ("goal", "workload", "figure", "limit", "ours", "ratio", "bound", "met")
_PLAIN_WIDTH = 150  # where nobody says how wide a line may be
_TEXT_COLUMN_COUNT = 3  # the first of them; the rest are numbers
_VERDICTS = {True: "yes", False: "**no**"}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` per cent of them; `values` must not be empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def print_table(rows: Sequence[Row], command: str) -> None:
    """The goals, in their order; then what else was measured."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PLAIN_WIDTH)
    for title, some in _parts(rows):
        table = Table(*COLUMNS, title=title)
        for column in table.columns[_TEXT_COLUMN_COUNT:]:
            column.justify = "right"
        for row in some:
            table.add_row(*[cell.strip("*") for cell in row.cells])
        console.print(table)
    console.print(origin(command))


def markdown_table(rows: Sequence[Row], command: str) -> str:
    """The same as Markdown, for `bench/RESULTS.md`."""
    rules = ["---"] * _TEXT_COLUMN_COUNT + ["--:"] * (len(COLUMNS) - _TEXT_COLUMN_COUNT)
    parts = [f"{origin(command)}\n"]
    for title, some in _parts(rows):
        lines = [COLUMNS, rules, *(row.cells for row in some)]
        parts += [f"### {title}\n", "\n".join([f"| {' | '.join(cells)} |" for cells in lines]) + "\n"]
    return "\n".join(parts)


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    def first_goal(row: Row) -> int:
        if isinstance(row, Failure):
            return row.goals[0] if row.goals else 0
        return row.goal.number if row.goal is not None else 0

    goals = sorted((row for row in rows if first_goal(row)), key=first_goal)
    rest = [row for row in rows if not first_goal(row)]
    return ((title, some) for title, some in (("Goals", goals), ("Besides", rest)) if some)


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


def _with_unit(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}".rstrip() if value >= 100 else f"{value:.3g} {unit}".rstrip()
