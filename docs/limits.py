"""Writes `docs/limits.md`: one table of every bound, from the structs of `engine/limits.py` and their comments.

`python docs/limits.py`; a test holds the page up to date.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.limits import Limits, PerIp

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "engine" / "limits.py", ROOT / "docs" / "limits.md"
TABLES = {"Limits": "limits", "PerIp": "per_ip"}  # struct → table of engine.toml
DEFAULTS = {"Limits": Limits(), "PerIp": PerIp()}
_SECTION = re.compile(r"-- (.+)")
_HEAD = """# Limits

Every bound of the engine with its default. Each can be set in `engine.toml`:

```toml
[limits]
run_ms_max = 2_000

[per_ip]                       # bounds of each client address: none without this table, and never on this machine
connection_count_max = 200
```

The last column says what whoever goes past a bound meets: the code of an error (the [README](../README.md) lists them),
of a close or of an HTTP status, or what is done instead. This page is made by `python docs/limits.py` from
[`engine/limits.py`](../engine/limits.py).
"""


class Entry(NamedTuple):
    """One bound, as it is documented."""

    table: str
    section: str
    name: str
    default: int
    reason: str
    past_it: str  # empty: nobody goes past it


def entries() -> Iterator[Entry]:
    """Every bound, in the order of the source."""
    source = SOURCE.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for struct in ast.parse(source).body:
        if not isinstance(struct, ast.ClassDef):
            continue
        section = "One client address"  # the other struct has sections of its own
        line = struct.lineno
        for field in struct.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            for above in range(line, field.lineno):
                if (found := _SECTION.fullmatch(comments.get(above, ""))) is not None:
                    section = f"{found[1][0].upper()}{found[1][1:]}"
            line = field.lineno
            reason, _, past_it = (part.strip() for part in comments.get(line, "").partition("=>"))
            default = getattr(DEFAULTS[struct.name], field.target.id)
            yield Entry(TABLES[struct.name], section, field.target.id, default, reason, past_it)


def page() -> str:
    """The whole page."""
    lines, shown = [_HEAD], None
    for entry in entries():
        if (entry.table, entry.section) != shown:
            shown = (entry.table, entry.section)
            lines += ["", f"## {entry.section.rstrip('.')}", ""]
            lines += [f"| `[{entry.table}]` | default | what, and why | past it |", "|---|---|---|---|"]
        lines.append(f"| `{entry.name}` | {_shown(entry)} | {entry.reason} | {_code(entry.past_it)} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _shown(entry: Entry) -> str:
    name, value = entry.name, entry.default
    if "bytes" in name:
        for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value % size == 0:
                return f"{value // size:,} {unit}"
        return f"{value:,} bytes"
    for part, unit in (("_per_second", "/s"), ("_ms", " ms"), ("seconds", " s"), ("days", " days")):
        if part in name:
            return f"{value:,}{unit}"
    return f"{value:,}"


def _code(text: str) -> str:
    """Names of errors as code."""
    return re.sub(r"\b([A-Z][a-z]+[A-Z]\w+|Overloaded|Forbidden)\b", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
