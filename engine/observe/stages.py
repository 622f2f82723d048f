"""Which stage of the hot path a stack is in: the place of its innermost frame that has one.

Invariants
  1. Every stack has exactly one stage, so the shares of a profile add up to all of the time.
  2. The table goes by folder first: a new module of a folder is counted where its neighbours are.
"""

import sysconfig
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Final

IDLE, DISK, OTHER = "idle", "waits for the disk", "the rest"

_ENGINE: Final = str(Path(__file__).parents[1])
_LIBRARIES: Final = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_CACHE_COUNT: Final = 20_000  # code objects: more than a large app and the engine have

# `file:function` → stage, the first that fits; what asks its caller has None. In the order of the hot path.
_STAGE_BY_PLACE: Final = {
    "server/*:*[wW]rite*": "frames out",
    "server/*:*flush*": "frames out",
    "server/*:*[sS]end*": "frames out",
    "server/outgoing.py:*": "frames out",
    "server/frames.py:*": None,
    **dict.fromkeys(
        [f"server/{name}.py:*" for name in ("answers", "app", "files", "http", "origins", "routes")], "HTTP"
    ),
    "server/*:*": "frames in",
    "sync/session.py:Session.receive": "frames in",
    "sync/session.py:Session.flush": "frames out",
    "sync/session.py:Session._send_shared": "frames out",
    "sync/protocol.py:*encode*": "encode",
    "sync/shared_frames.py:*": "encode",
    "sync/*:*": None,
    "auth/*:*": "signing in",
    "functions/arguments.py:Signature.call": "functions",
    "functions/arguments.py:*": "decode",
    "functions/*:*": "functions",
    "values/encoder.py:*": "encode",
    "values/plain.py:*": "encode",
    "storage/rows.py:*": "rows",
    "values/columns.py:*": "rows",
    "storage/*:*": "SQL",
    "transaction/committer.py:*": "commit",
    "transaction/worker.py:*": "commit",
    "transaction/*:*": "functions",
    "live/invalidation.py:*": "invalidate",
    "live/intervals.py:*": "invalidate",
    "live/search_entries.py:*": "invalidate",
    "live/*:*": "share and publish",
    "aiohttp/*:*data_received*": "frames in",
    "aiohttp/web_protocol.py:*": "HTTP",
}
STAGES: Final = (
    *("frames in", "decode", "functions", "rows", "SQL", "commit", "invalidate", "share and publish", "encode"),
    *("frames out", "signing in", "HTTP", OTHER, DISK, IDLE),
)
_IDLE_PLACES: Final = ("asyncio/runners.py:*", "uvloop/_noop.py:*", "selectors.py:*select")  # uvloop's, asyncio's


@lru_cache(_CACHE_COUNT)
def is_idle(code: CodeType) -> bool:
    """Whether a loop whose innermost frame this is waits for something to do."""
    return any(fnmatchcase(_place_of(code), pattern) for pattern in _IDLE_PLACES)


def stage_of(codes: Sequence[CodeType]) -> str:
    """The stage of a stack of a busy loop, innermost first (1)."""
    return next((stage for code in codes if (stage := _stage_of(code)) is not None), OTHER)


def is_own(codes: Sequence[CodeType]) -> bool:
    """Whether the app's code runs, or what it has called that is not the engine's."""
    return next((not code.co_filename.startswith(_ENGINE) for code in codes if not is_library(code)), False)


@lru_cache(_CACHE_COUNT)
def is_library(code: CodeType) -> bool:
    """Whether this is neither the engine's code nor the app's."""
    name = code.co_filename
    return not name.startswith(_ENGINE) and (name.startswith(("<", *_LIBRARIES)))


@lru_cache(_CACHE_COUNT)
def _stage_of(code: CodeType) -> str | None:
    place = _place_of(code)
    return next((stage for pattern, stage in _STAGE_BY_PLACE.items() if fnmatchcase(place, pattern)), None)


@lru_cache(_CACHE_COUNT)
def _place_of(code: CodeType) -> str:
    """`live/publisher.py:Publisher.publish`; libraries from their package on; of an app the whole path."""
    path = code.co_filename
    for root in (_ENGINE, *sorted(_LIBRARIES, key=len, reverse=True)):
        if path.startswith(root):
            path = path[len(root) + 1 :]
            break
    name: str = getattr(code, "co_qualname", code.co_name)
    return f"{path}:{name}"


def is_in(code: CodeType, place: str) -> bool:
    """Whether the code belongs to a module of the engine: `live/publisher.py`."""
    return code.co_filename.startswith(_ENGINE) and _place_of(code).startswith(f"{place}:")


def label_of(code: CodeType) -> str:
    """For people: `Publisher.publish (live/publisher.py:123)`."""
    path, _, name = _place_of(code).rpartition(":")
    return f"{name} ({path}:{code.co_firstlineno})"
