import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from engine.transaction.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    with closing(Worker("test-worker")) as worker:
        yield worker


async def test_it_gives_what_the_call_returns(worker: Worker) -> None:
    assert await worker.run(lambda: 7) == 7


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
async def test_it_raises_what_the_call_raises_and_goes_on(worker: Worker, error: BaseException) -> None:
    def fail() -> None:
        raise error

    future = asyncio.ensure_future(_caught(worker, fail))
    assert await future is error
    assert await worker.run(lambda: 7) == 7


async def _caught(worker: Worker, call: object) -> BaseException | None:
    try:
        await worker.run(call)  # type: ignore[arg-type]
    except BaseException as error:  # noqa: BLE001 - that is what is looked at
        return error
    return None


async def test_all_calls_are_made_in_its_one_thread(worker: Worker) -> None:
    names = {await worker.run(lambda: threading.current_thread().name) for _ in range(3)}
    assert names == {"test-worker"}


async def test_the_loop_goes_on_while_a_call_waits(worker: Worker) -> None:
    may_end = threading.Event()
    waiting = asyncio.ensure_future(worker.run(may_end.wait))
    await asyncio.sleep(0)  # the loop is here, while the thread waits for what only the loop does
    may_end.set()
    assert await waiting is True


async def test_calls_are_made_in_the_order_they_came(worker: Worker) -> None:
    made: list[int] = []
    await asyncio.gather(*(worker.run(lambda number=number: made.append(number)) for number in range(100)))  # type: ignore[misc]
    assert made == list(range(100))


async def test_a_caller_that_is_gone_harms_nobody(worker: Worker) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    may_end = threading.Event()
    gone = asyncio.ensure_future(worker.run(may_end.wait))
    await asyncio.sleep(0)
    gone.cancel()
    may_end.set()
    assert await worker.run(lambda: 7) == 7
    assert gone.cancelled()
    assert complaints == []


async def test_closing_waits_for_the_calls_that_came_before() -> None:
    worker, made = Worker("test-worker"), list[int]()
    running = [asyncio.ensure_future(worker.run(lambda number=number: made.append(number))) for number in range(10)]  # type: ignore[misc]
    await asyncio.sleep(0)
    worker.close()
    assert made == list(range(10))
    await asyncio.gather(*running)
    assert not worker._thread.is_alive()
