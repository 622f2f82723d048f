"""`python -m bench.load [workload …]`: measure, print a table."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from bench.load import chat, memory, presence, progress, writes
from bench.load.figures import Figure, markdown_table, print_table
from bench.load.stretches import Options

WORKLOADS: dict[str, Callable[[Options], Awaitable[list[Figure]]]] = {
    "chat": chat.run,
    "writes": writes.run,
    "progress": progress.run,
    "presence": presence.run,
    "memory": memory.run,
}
REPRESENTATIVE = "chat"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description="Load over real sockets.")
    parser.add_argument("workload", nargs="*", choices=[*WORKLOADS, "all"], default=REPRESENTATIVE)
    parser.add_argument("--seconds", type=float, default=Options().seconds, help="of each measured stretch")
    parser.add_argument("--users", type=int, default=Options().viewer_count, help="in all but writes")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    asked = [arguments.workload] if isinstance(arguments.workload, str) else arguments.workload
    names = list(WORKLOADS) if "all" in asked else asked
    options = Options(seconds=arguments.seconds, viewer_count=arguments.users)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(_run(names, options))
    command = f"python -m bench.load {' '.join(names)} --seconds {options.seconds:g} --users {options.viewer_count}"
    print_table(figures, command)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown_table(figures, command))


async def _run(names: list[str], options: Options) -> list[Figure]:
    return [figure for name in names for figure in await WORKLOADS[name](options)]


if __name__ == "__main__":
    main()
