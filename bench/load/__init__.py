"""Load on a server in its own process, over real sockets, on the shipped defaults.

`python -m bench.load` runs the representative workload, `chat`; `--all` all; `--only 4,7,presence` some, by goal or by
name; `--short` all in a few minutes, the large ones at a tenth of their size; `--peers` other servers besides.

    goal   workload       what it does
    1-3    chat           1,000 signed-in users watch one chat: 50 messages/s, then saturated, then the newest state
    4-5    writes         32 clients, then a lone one, write their own progress as fast as they are acknowledged
    6      progress       1,000 users each watch their own progress: 200 updates/s at random
    7-8    subscriptions  a write among 100,000 subscriptions, and one that touches many of them
           presence       1,000 players of one game watch its viewer count, and come and go
    9      sessions       10,000 players send a heartbeat each 30 s, 100 viewer counts are watched
    10     memory         what 10,000 idle subscribers cost
    11     large          1,000,000 documents: starting, the first query and write, writes and progress
    12     reconnects     2,000 users with 5 queries each come back at once after a SIGKILL
    13     deflate        chat to browsers, which offer permessage-deflate: bytes and CPU
    14     transfers      64 clients move money between accounts, uniformly and contended
    15     inprocess      mutations without a socket, 64 callers
    16     multitude      10,000 viewers of one chat, 50 messages/s
    17     http           `/api/query`, cached and uncached
    18     fairness       one session's single call beside another one that asks all it may

Every figure is printed beside its limit, taken in the same run on the same machine: a bare aiohttp broadcast of the
same bytes (`broadcast`), a bare aiohttp handler (`bare`), the same SQLite statements in grouped commits (`commits`), or
the same workload at its smallest. The load generator is a process of its own, outside every CPU figure. A workload that
fails says so in its row.

Other servers are `bench.peers`, with their own dependencies, each on what it can do of this. Their workloads are called
as ours, with the title after a colon; "no fsync" in it says that a write is acknowledged before it is on the disk.
"""
