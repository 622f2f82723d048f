"""One soak: a served app under everyday load for a long time, and whether anything of it stays behind.

    warm: all connect and leave ──census──> load ──all leave──census──> reloads with no load ──> Figures

Nothing here judges: `verdict.py` does.
"""

import asyncio
import json
import os
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import aiohttp

from tests.auth import issuers
from tests.reliability.soak.clients import SECONDS_MAX, Client, Query, StuckClient
from tests.reliability.soak.server import CENSUS_PATH, RELOAD_PATH
from tests.reliability.soak.verdict import Figures, Plan, Sample, left_over

REPOSITORY = Path(__file__).parents[3]
_APP = Path(__file__).with_name("app")
_KEY = "EdDSA"
_ROOM_COUNT = 20
_OPENING_COUNT_MAX = 20
_LOOK_SECONDS = 0.25


class Server:
    """The process under test."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path, address: str) -> None:
        self.process, self.directory, self.address = process, directory, address
        host, port = address.removeprefix("http://").split(":")
        self.place = host, int(port)
        self.sync_address = f"{address}/api/1.48.0/sync"
        self.reload_count = 0

    @property
    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def wal_bytes(self) -> int:
        return (self.directory / "soak.db-wal").stat().st_size

    def row_count(self, table: str) -> int:
        with closing(sqlite3.connect(f"file:{self.directory / 'soak.db'}?mode=ro", uri=True)) as connection:
            (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    async def census(self, http: aiohttp.ClientSession) -> dict[str, int]:
        async with http.get(self.address + CENSUS_PATH) as response:
            counts: dict[str, int] = await response.json()
        return counts

    async def reload(self, http: aiohttp.ClientSession) -> None:
        """New code, which says another number."""
        self.reload_count += 1
        path = self.directory / "functions" / "version.py"
        source = (_APP / "functions" / "version.py").read_text()
        path.write_text(source.replace("NUMBER = 0", f"NUMBER = {self.reload_count}"))
        async with http.post(self.address + RELOAD_PATH) as response:
            assert response.status == 200, await response.text()

    async def call(self, http: aiohttp.ClientSession, kind: str, path: str, **arguments: Any) -> Any:
        body = {"path": path, "args": arguments, "format": "json"}
        async with http.post(f"{self.address}/api/{kind}", json=body) as response:
            answer = await response.json()
        assert answer["status"] == "success", answer
        return answer["value"]


@asynccontextmanager
async def served(plan: Plan, directory: Path) -> AsyncIterator[Server]:
    shutil.copytree(_APP, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "jwks.json").write_text(json.dumps(issuers.jwks(_KEY)))
    (directory / "engine.toml").write_text(plan.configuration)
    workarounds = {"jobs_kept_seconds": 5, "sweep_seconds": plan.sweep_seconds, "break": plan.broken}
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.reliability.soak.server", str(directory), str(directory / "soak.db")),
            json.dumps(workarounds),
            cwd=REPOSITORY,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), SECONDS_MAX)
        assert line, (directory / "log").read_text()
        yield Server(process, directory, line.decode().strip())
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), SECONDS_MAX)
            except TimeoutError:
                process.kill()
                await process.wait()


class Soak:
    """One run of a plan."""

    def __init__(self, plan: Plan, server: Server, http: aiohttp.ClientSession) -> None:
        self._plan, self._server, self._http = plan, server, http
        self._random = random.Random(plan.seed)
        self._clients: list[Client] = []
        self._stuck: list[StuckClient] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._failed: list[BaseException] = []
        self._began = time.perf_counter()
        self._seconds_by_call: list[tuple[float, float]] = []  # when, how long
        self._samples: list[Sample] = []
        self._counts = dict.fromkeys(("mutations", "refused", "actions", "churned", "refreshed", "dropped", "asked"), 0)

    async def run(self) -> Figures:
        await self._join()
        await self._server.reload(self._http)  # what was there at the start is hidden from the census
        await self._load(self._plan.warm_seconds, is_measured=False)
        await self._leave()
        baseline = await self._census_at_rest(None)
        await self._join()
        await self._load(self._plan.seconds, is_measured=True)
        await self._compare_with_fresh_runs()
        await self._leave()
        left = await self._census_at_rest(baseline)
        rows = {name: self._server.row_count(name) for name in ("_engine_ledger", "_scheduled_jobs")}
        resident_before = self._server.resident_bytes
        for _ in range(self._plan.reload_count):
            await self._server.reload(self._http)
        await self._server.census(self._http)
        return Figures(
            samples=self._samples,
            seconds_by_call=self._seconds_by_call,
            baseline=baseline,
            left=left,
            rows=rows,
            reload_growth_bytes=self._server.resident_bytes - resident_before,
            counts={**self._counts, "reloads": self._server.reload_count},
            errors=[line for line in self._server.log().splitlines() if " ERROR " in line or " CRITICAL " in line],
        )

    # -- clients

    async def _join(self) -> None:
        opening = asyncio.Semaphore(_OPENING_COUNT_MAX)

        async def open_one(number: int) -> Client:
            async with opening:
                return await self._open(number)

        self._clients = list(await asyncio.gather(*map(open_one, range(self._plan.client_count))))
        self._stuck = [await self._open_stuck() for _ in range(self._plan.stuck_count)]

    async def _open(self, number: int) -> Client:
        room = number % _ROOM_COUNT
        page = {"room": room, "pagination_opts": {"numItems": 10, "cursor": None}}
        queries: list[Query] = [
            ("rooms:latest", {"room": room}),
            ("rooms:online", {"room": room}),
            ("rooms:mine", {}),
            ("version:number", {}),
        ]
        if (
            number % _ROOM_COUNT == 0
        ):  # each that comes later has a page of its own: with all of them that takes an hour
            queries.append(("rooms:page", page))
        client = Client(self._server.sync_address, f"user {number}", self._sign, queries)
        await client.open(self._http)
        return client

    def _sign(self, subject: str) -> str:
        now = int(time.time())
        return issuers.token(_KEY, sub=subject, iat=now, exp=now + self._plan.token_seconds)

    async def _open_stuck(self) -> StuckClient:
        stuck = StuckClient(*self._server.place)
        await stuck.open("rooms:wall")
        return stuck

    async def _leave(self) -> None:
        clients, self._clients = self._clients, []
        await asyncio.gather(*[client.leave(abruptly=number % 2 == 0) for number, client in enumerate(clients)])
        stuck, self._stuck = self._stuck, []
        await asyncio.gather(*[each.close() for each in stuck])

    async def _census_at_rest(self, baseline: dict[str, int] | None) -> dict[str, int]:
        """What is alive once nobody is there and every result that was kept has been touched.

        Waits until it is no more than there was at first; without a baseline, until it stays the same.
        """
        end = time.perf_counter() + self._plan.rest_seconds_max
        before: dict[str, int] = {}
        while True:
            await self._server.call(self._http, "mutation", "rooms:touch_all", room_count=_ROOM_COUNT)
            counts = await self._server.census(self._http)
            if time.perf_counter() > end:
                return counts
            is_settled = counts == before if baseline is None else not left_over(baseline, counts, self._plan)
            if is_settled and self._server.row_count("_disconnects") == 0:
                return counts
            before = counts
            await asyncio.sleep(_LOOK_SECONDS * 2)

    # -- load

    async def _load(self, seconds: float, *, is_measured: bool) -> None:
        plan, began = self._plan, time.perf_counter()
        every = {
            self._call: 1 / plan.mutations_per_second,
            self._paint: plan.paint_seconds,
            self._churn: 60 / (plan.churn_per_minute * plan.client_count),
            self._refresh: plan.refresh_seconds / plan.client_count,
            self._replace_dropped: 1.0,
            self._ask: 1.0,
            self._reload: plan.reload_seconds,
        }
        if is_measured:
            every[self._sample] = plan.sample_seconds
            self._began = began
        next_at = {work: began + period for work, period in every.items()}
        while (now := time.perf_counter()) < began + seconds:
            for work, at in next_at.items():
                if now >= at:
                    next_at[work] = max(at, now - 1) + every[work]  # after a pause of ours nothing comes in a flood
                    await work()
            await asyncio.sleep(max(0, min(next_at.values()) - time.perf_counter()))
            self._check()
        while self._calls:
            await asyncio.wait(self._calls)
        self._check()
        assert self._server.process.returncode is None, self._server.log()[-4_000:]

    def _check(self) -> None:
        """Raises what has gone wrong so far."""
        for client in self._clients:
            client.check()
        for error in self._failed:
            raise error

    async def _call(self) -> None:
        client, share = self._random.choice(self._clients), self._random.random()
        task = asyncio.create_task(self._call_as(client, share))
        self._calls.add(task)
        task.add_done_callback(self._called)

    def _called(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if (error := task.exception()) is not None:
            self._failed.append(error)

    async def _call_as(self, client: Client, share: float) -> None:
        room, began = client.queries[0][1]["room"], time.perf_counter()
        with suppress(asyncio.CancelledError):  # its client has left
            if share < 0.7:
                answer = await client.call("rooms:post", {"room": room, "text": f"{share:.6f}"})
            elif share < 0.93:
                answer = await client.call("rooms:beat", {"room": room})
            elif share < 0.95:
                answer = await client.call("rooms:refuse", {})
                assert not answer["success"], answer
                assert answer["errorData"] == {"code": "REFUSED"}, answer
                self._counts["refused"] += 1
                return
            elif share < 0.98:
                answer = await client.call("rooms:relay", {"room": room, "text": "relayed"}, kind="Action")
                self._counts["actions"] += 1
            else:
                answer = await client.call("rooms:count", {"texts": ["a", "b"]}, kind="Action")
                self._counts["actions"] += 1
            assert answer["success"], answer
            self._counts["mutations"] += 1
            if self._samples:
                self._seconds_by_call.append((began - self._began, time.perf_counter() - began))

    async def _paint(self) -> None:
        await self._server.call(self._http, "mutation", "rooms:paint", number=self._random.randrange(10**8))

    async def _churn(self) -> None:
        number = self._random.randrange(len(self._clients))
        old = self._clients[number]
        await old.leave(abruptly=self._random.random() < 0.5)
        self._clients[number] = await self._open(number)
        self._counts["churned"] += 1

    async def _refresh(self) -> None:
        await self._clients[self._counts["refreshed"] % len(self._clients)].refresh()
        self._counts["refreshed"] += 1

    async def _replace_dropped(self) -> None:
        for number, stuck in enumerate(self._stuck):
            if stuck.is_dropped:
                self._counts["dropped"] += 1
                self._stuck[number] = await self._open_stuck()

    async def _ask(self) -> None:
        room = self._random.randrange(_ROOM_COUNT)
        await self._server.call(self._http, "query", "rooms:latest", room=room)
        self._counts["asked"] += 1

    async def _reload(self) -> None:
        await self._server.reload(self._http)

    async def _sample(self) -> None:
        moment = time.perf_counter() - self._began
        self._samples.append(
            Sample(
                moment,
                self._server.resident_bytes,
                self._server.wal_bytes,
                os.getloadavg()[0] / (os.cpu_count() or 1),
            )
        )

    async def _compare_with_fresh_runs(self) -> None:
        """Every client comes to hold what a fresh run returns."""
        fresh = {
            room: await self._server.call(self._http, "query", "rooms:latest", room=room) for room in range(_ROOM_COUNT)
        }
        for client in self._clients:
            room = client.queries[0][1]["room"]
            expected = {0: fresh[room], 3: self._server.reload_count}
            await client.until(lambda client=client, expected=expected: expected.items() <= client.results.items())


async def soak(plan: Plan, directory: Path) -> Figures:
    """Run a plan, with a server of its own that lives in this directory."""
    connector = aiohttp.TCPConnector(limit=0)
    async with served(plan, directory) as server, aiohttp.ClientSession(connector=connector) as http:
        return await Soak(plan, server, http).run()
