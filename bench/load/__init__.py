"""Load on a server in its own process, over real sockets, on the shipped defaults.

`python -m bench.load` runs the representative workload, `chat`; `python -m bench.load writes memory` those; `all` all.

    chat       1,000 signed-in users watch one chat: 50 messages/s, then as many as are acknowledged
    writes     32 clients, then a lone one, write their own progress as fast as they are acknowledged
    progress   1,000 users each watch their own progress: 200 updates/s at random
    presence   1,000 players of one game watch its viewer count: 12,000 heartbeats a minute; then 20/s come or go too
    memory     what 1,000 idle subscribers cost

Every figure is printed beside its raw limit, taken in the same run on the same machine: a bare aiohttp broadcast of
the same bytes (`broadcast`), the same SQLite statements in grouped commits (`commits`).
"""
