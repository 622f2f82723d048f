"""`python -m bench.peers`: measure what the engine is compared with, print a table."""

import argparse
import asyncio
from pathlib import Path

import uvloop

from bench.load.figures import markdown_table, print_table
from bench.load.stretches import Options
from bench.peers.workloads import PEERS, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="The same load on other servers.")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PEERS), help=", ".join(PEERS))
    parser.add_argument("--seconds", type=float, default=Options().seconds, help="of each measured stretch")
    parser.add_argument("--users", type=int, default=Options().viewer_count, help="that watch")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - PEERS.keys():
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    options = Options(seconds=arguments.seconds, viewer_count=arguments.users)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(run(options, arguments.only))
    command = (
        f"python -m bench.peers --only {','.join(arguments.only)} "
        f"--seconds {options.seconds:g} --users {options.viewer_count}"
    )
    print_table(figures, command)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown_table(figures, command))


if __name__ == "__main__":
    main()
