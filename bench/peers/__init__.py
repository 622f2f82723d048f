"""Other ways to the same screens, measured as the engine is: on this machine, at this time, by the same load.

`python -m bench.peers` installs what they need, measures all and prints a table; `--only node,pocketbase` those.

    aiohttp      aiohttp and sqlite3 by hand: after a write it asks SQLite again and sends that to all who watch
    fastapi      the same on FastAPI, aiosqlite and uvicorn
    node         Node, better-sqlite3 and ws: sends the new message only
    pocketbase   PocketBase as it ships: sends the new record only, and does not wait for the disk

Each has a directory with its own dependencies, installed beside it into `.venv` or `node_modules`. What each promises
and what it does not is said in its first lines. Nobody signs in to any of them, and none knows rules about who may see
what: that is less work than the engine does for the same figures.
"""
