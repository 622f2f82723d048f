"""`python -m bench.load`: measure, print a table."""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import msgspec
import uvloop

from bench.load import (
    chat,
    deflate,
    fairness,
    http_queries,
    inprocess,
    large,
    memory,
    presence,
    progress,
    reconnects,
    sessions,
    subscriptions,
    transfers,
    writes,
)
from bench.load.figures import Failure, Figure, Row, markdown_table, print_table
from bench.load.stretches import Options


class Workload(msgspec.Struct, frozen=True):
    goals: tuple[int, ...]  # that it measures
    run: Callable[[Options], Awaitable[list[Figure]]]


WORKLOADS = {
    "chat": Workload((1, 2, 3), chat.run),
    "writes": Workload((4, 5), writes.run),
    "progress": Workload((6,), progress.run),
    "subscriptions": Workload((7, 8), subscriptions.run),
    "presence": Workload((), presence.run),
    "sessions": Workload((9,), sessions.run),
    "memory": Workload((10,), memory.run),
    "large": Workload((11,), large.run),
    "reconnects": Workload((12,), reconnects.run),
    "deflate": Workload((13,), deflate.run),
    "transfers": Workload((14,), transfers.run),
    "inprocess": Workload((15,), inprocess.run),
    "multitude": Workload((16,), chat.run_multitude),
    "http": Workload((17,), http_queries.run),
    "fairness": Workload((18,), fairness.run),
}
REPRESENTATIVE = "chat"
_SHORT = Options(seconds=2.0, is_short=True)
_REASON_LENGTH_MAX = 160
_SECONDS_MAX = 600  # of a workload besides its stretches: one that hangs is ended, and says so
_STRETCH_COUNT_MAX = 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description="Load over real sockets.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every workload")
    which.add_argument("--only", type=_names, metavar="…", help=f"goals or names, as 1,4,7: {', '.join(WORKLOADS)}")
    parser.add_argument("--short", action="store_true", help="every workload unless --only; the large ones at a tenth")
    parser.add_argument("--seconds", type=float, help=f"of each measured stretch, {Options().seconds:g}")
    parser.add_argument("--users", type=int, help=f"where the goal says 1,000, {Options().viewer_count:,}")
    parser.add_argument("--peers", action="store_true", help="also other servers, on what they can do (bench/peers)")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    parser.add_argument("--flames", type=Path, metavar="DIRECTORY", help="make flame graphs there: figures suffer")
    arguments = parser.parse_args()
    options = _SHORT if arguments.short else Options()
    options = Options(
        seconds=arguments.seconds or options.seconds,
        viewer_count=arguments.users or options.viewer_count,
        is_short=options.is_short,
        flames=arguments.flames,
    )
    names = list(WORKLOADS) if arguments.all or arguments.short else [REPRESENTATIVE]
    rows: list[Row] = []
    for name in arguments.only or names:
        rows += _run(name, WORKLOADS[name], options)
    if arguments.peers:
        peers = import_module("bench.peers.workloads")  # only now: it is no part of our own figures
        for name in peers.PEERS:
            rows += _run(name, Workload((), partial(peers.run, names=[name])), options)
        rows += writes.against_peers(rows)
    command = " ".join(["python -m bench.load", *_measured_by(sys.argv[1:])])
    print_table(rows, command)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown_table(rows, command))


def _measured_by(arguments: list[str]) -> Iterator[str]:
    """The arguments without the places on this machine that files go to."""
    left = iter(arguments)
    for argument in left:
        option, _, value = argument.partition("=")
        if option not in ("--markdown", "--flames"):
            yield argument
        elif not value:
            next(left)


def _names(text: str) -> list[str]:
    """The workloads of goals and names, in the order of the table."""
    asked = text.split(",")
    goals = {int(word) for word in asked if word.isdecimal()}
    named = {word for word in asked if not word.isdecimal()}
    unknown = (named - WORKLOADS.keys()) | {
        str(goal) for goal in goals if not any(goal in workload.goals for workload in WORKLOADS.values())
    }
    if unknown:
        raise argparse.ArgumentTypeError(f"neither a goal nor a workload: {', '.join(sorted(unknown))}")
    return [name for name, workload in WORKLOADS.items() if name in named or goals.intersection(workload.goals)]


def _run(name: str, workload: Workload, options: Options) -> Iterator[Row]:
    """The rows of a workload; if it fails, one that says so: the others go on."""
    print(f"{name} …", file=sys.stderr)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            yield from runner.run(_awaited(workload, options))
    except Exception as error:  # noqa: BLE001 - a door
        reason = f"{type(error).__name__}: {error}".replace("|", "/").split("\n", 1)[0][:_REASON_LENGTH_MAX]
        yield Failure(workload.goals, name, reason)


async def _awaited(workload: Workload, options: Options) -> list[Figure]:
    return await asyncio.wait_for(workload.run(options), _SECONDS_MAX + _STRETCH_COUNT_MAX * options.seconds)


if __name__ == "__main__":
    main()
