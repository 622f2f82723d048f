"""Becomes a peer's process, whatever it is written in: `python -m bench.peers.launch COMMAND … PORT`.

`{port}` in the command stands for the port.
"""

import os
import sys


def main() -> None:
    *command, port = sys.argv[1:]
    os.environ.pop("PYTHONPATH", None)  # it has packages of its own
    arguments = [part.replace("{port}", port) for part in command]
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    main()
