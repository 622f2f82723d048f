"""10,000 signed-in players in 100 games, each with a heartbeat every 30 s; each game's viewer count is watched.

Nobody comes or goes, so no viewer count has a reason to run. The server's own pings to 10,000 sockets are part of what
it uses.
"""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from bench.load.client import Client, Crowd
from bench.load.demo import subjects
from bench.load.figures import Figure, Goal
from bench.load.filling import fill
from bench.load.presence import joining, session_of
from bench.load.processes import Tokens, engine_server, ensure_files
from bench.load.stretches import Options, by_timetable, cost_of

SESSION_COUNT = 10_000
GAME_COUNT = 100
HEARTBEAT_SECONDS = 30
_QUERY = "presence:get_viewer_count"


async def run(options: Options) -> list[Figure]:
    tokens, session_count = Tokens(), options.size(SESSION_COUNT)
    ensure_files(session_count)
    game_ids: list[str] = []

    def make_games(database: Path) -> None:
        games = [(f"Game {number}", "Bench", 0.0, "live") for number in range(GAME_COUNT)]
        game_ids.extend(fill(database, "games", "title, league, starts_at, status", games))

    async with engine_server(tokens, fill=make_games) as server:
        crowd = Crowd(server.port)
        names = subjects(session_count)
        places = {name: {"game_id": game_ids[index % GAME_COUNT]} for index, name in enumerate(names)}

        async def prepare(player: Client) -> None:
            await player.mutate("users:store", {})
            await player.mutate("presence:join", joining(player) | places[player.subject])

        players = await crowd.join(names, tokens.sign, prepare)
        for player in players[:GAME_COUNT]:
            await crowd.unless_lost(player.watch(_QUERY, places[player.subject]))
        turns = cycle(players)

        def send(on_done: Callable[[], None]) -> None:
            player = next(turns)
            player.start_mutation("presence:heartbeat", session_of(player) | places[player.subject], on_done)

        await server.run_counts()
        beats = by_timetable(send, per_second=session_count / HEARTBEAT_SECONDS, seconds=options.seconds)
        with cost_of(server) as cost:
            await crowd.unless_lost(beats)
        run_count = await server.run_count(_QUERY)
        crowd.close()
    workload = f"{session_count:,} presence sessions"
    beat_count = options.seconds * session_count / HEARTBEAT_SECONDS
    return [
        Figure(workload, "server, of one core", cost.server_percent, "%", goal=Goal(9, "≤", 5)),
        Figure(workload, "runs of viewer counts", run_count, "", goal=Goal(9, "≤", 0)),
        Figure(workload, "server CPU a heartbeat", 1e6 * cost.server_cpu_seconds / beat_count, "µs"),
        Figure(workload, "anything else, of one core", cost.other_percent, "%"),
    ]
