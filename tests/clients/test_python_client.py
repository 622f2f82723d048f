"""The official Python clients against a server process: `convex.ConvexClient` and `convex.http_client`.

`ConvexClient` waits without an end for what does not come, and holds the GIL meanwhile. So a signal ends a test that
waits too long, and a client that is to wait while the test goes on lives in a process of its own.
"""

import math
import signal
from collections.abc import Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from threading import Event
from typing import Any

import pytest
from convex import ConvexClient, ConvexError, ConvexInt64, QuerySubscription
from convex.http_client import ConvexExecutionError, ConvexHttpClient

from tests.clients.server import ISSUER, Server, running_server

TEST_SECONDS_MAX = 40
REFUSAL = {"code": "FULL", "limit": 3.0, "retry": None, "payload": b"\x00\xff", "seats": [1.0, 2.5]}
SPECIAL_VALUES: list[Any] = [
    *(None, True, 0.0, -0.0, 1.0, 1.5, -1e-300, 2.0**53, 1e300, math.inf, -math.inf),
    *(ConvexInt64(2**63 - 1), ConvexInt64(-(2**63))),  # smaller ones come back as numbers, unless typed `Int64`
    *("", 'grüße 👋🏽 \x00 \u2028 "quoted" \\', b"", b"\x00\x01\x7f\x80\xff"),
    *([], {}, {"_private": -0.0, "a key with spaces": 1.0}, [[-0.0], {"deep": [ConvexInt64(2**60), {"b": b"\x07"}]}]),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def client(server: Server) -> ConvexClient:
    return ConvexClient(server.address)


@pytest.fixture
def http(server: Server) -> ConvexHttpClient:
    return ConvexHttpClient(server.address)


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Ends a test that waits for what does not come; nothing but a signal gets through to a waiting client."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"the test has not ended within {TEST_SECONDS_MAX} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS_MAX)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


class Board:
    """One client's subscription to the notes of a board."""

    def __init__(self, client: ConvexClient, board: str) -> None:
        self._results: QuerySubscription = client.subscribe("notes:listNotes", {"board": board})
        self.views: list[list[str]] = []  # oldest first

    def until(self, texts: list[str]) -> None:
        while not self.views or self.views[-1] != texts:
            notes: Any = next(self._results)
            self.views.append([note["text"] for note in notes])


def add(client: ConvexClient | ConvexHttpClient, board: str, text: str) -> str:
    note_id: str = client.mutation("notes:add", {"board": board, "text": text})
    return note_id


def same(received: object, sent: object) -> bool:
    """Equal in value and in kind: 1.0 is not 1, and -0.0 is not 0.0."""
    return repr(received) == repr(sent)


# -- over the socket


def test_two_clients_see_each_others_writes(server: Server, client: ConvexClient) -> None:
    other = ConvexClient(server.address)
    mine, theirs = Board(client, "shared"), Board(other, "shared")
    mine.until([])
    theirs.until([])
    add(client, "shared", "from one")
    theirs.until(["from one"])
    add(other, "shared", "from the other")
    mine.until(["from one", "from the other"])
    theirs.until(["from one", "from the other"])


def test_a_write_is_visible_to_the_next_query(client: ConvexClient) -> None:
    for count in range(1, 6):
        add(client, "counted", "note")
        assert client.query("notes:count_notes", {"board": "counted"}) == count


def test_an_app_error_reaches_the_caller_with_its_data(client: ConvexClient) -> None:
    for call, path in (
        (client.query, "faults:refuse_query"),
        (client.mutation, "faults:refuse_mutation"),
        (client.action, "faults:refuse_action"),
    ):
        with pytest.raises(ConvexError) as refused:
            call(path)
        assert refused.value.data == REFUSAL


def test_who_does_something_too_often_is_told_when_to_try_again(client: ConvexClient, http: ConvexHttpClient) -> None:
    client.mutation("visits:knock", {"board": "limited"})
    for asking in (client, http):
        with pytest.raises(ConvexError) as refused:
            asking.mutation("visits:knock", {"board": "limited"})
        data: Any = refused.value.data
        assert (data["code"], data["name"]) == ("RateLimited", "visits:knock")
        assert 3_500_000 < data["retry_after_ms"] <= 3_600_000


def test_a_client_that_is_gone_has_left(server: Server, client: ConvexClient) -> None:
    board = Board(client, "visited")
    board.until([])
    told, end = Pipe(duplex=False)
    visitor = get_context("spawn").Process(target=visit, args=(server.address, "visited", "ann", end), daemon=True)
    visitor.start()
    assert told.recv() == "entered"
    board.until(["ann"])
    visitor.kill()
    visitor.join()
    board.until([])


def visit(address: str, board: str, name: str, told: "Connection[str, str]") -> None:
    """Enter, and stay until killed: the body of a process."""
    client = ConvexClient(address)
    client.mutation("visits:enter", {"board": board, "name": name})
    told.send("entered")
    Event().wait()


def test_any_other_error_is_redacted_in_production(client: ConvexClient) -> None:
    for call, path in (
        (client.query, "faults:break_query"),
        (client.mutation, "faults:break_mutation"),
        (client.action, "faults:break_action"),
    ):
        with pytest.raises(Exception, match="Server Error") as broken:
            call(path)
        assert not isinstance(broken.value, ConvexError)
        assert "combination" not in str(broken.value)


def test_a_wrong_argument_is_an_error_that_names_it(client: ConvexClient) -> None:
    with pytest.raises(Exception, match="text"):
        client.mutation("notes:add", {"board": "arguments"})
    with pytest.raises(Exception, match="colour"):
        client.query("notes:listNotes", {"board": "arguments", "colour": "red"})


def test_an_unknown_function_is_an_error_and_no_hang(client: ConvexClient) -> None:
    for call in (client.query, client.mutation, client.action):
        with pytest.raises(Exception, match="Could not find public"):
            call("notes:missing")


def test_an_action_writes_and_subscribers_see_it(client: ConvexClient) -> None:
    board = Board(client, "errand")
    board.until([])
    assert client.action("errands:add_twice", {"board": "errand", "text": "milk"}) == 2.0
    board.until(["milk 1", "milk 2"])


def test_a_caller_signs_in_changes_its_token_and_signs_out(server: Server, client: ConvexClient) -> None:
    def whoami() -> Any:
        known = [client.query("callers:whoami"), client.mutation("callers:whoami_as_mutation")]
        assert known[0] == known[1] == client.action("callers:whoami_as_action")
        return known[0]

    assert whoami() is None
    client.set_auth(server.token("alice", edition=1))
    assert whoami() == {"subject": "alice", "token_identifier": f"{ISSUER}|alice", "edition": 1.0}
    client.set_auth(server.token("alice", edition=2))
    assert whoami()["edition"] == 2.0
    client.set_auth(server.token("bob"))
    assert whoami()["subject"] == "bob"
    client.clear_auth()
    assert whoami() is None


def test_signing_out_changes_what_a_subscriber_sees(server: Server, client: ConvexClient) -> None:
    client.set_auth(server.token("alice"))
    results = client.subscribe("callers:secret")
    assert next(results) == "for signed-in callers"
    client.clear_auth()
    with pytest.raises(ConvexError) as refused:
        next(results)
    assert refused.value.data == {"code": "SIGNED_OUT"}


def test_values_come_back_as_they_were_sent(client: ConvexClient) -> None:
    for value in SPECIAL_VALUES:
        assert same(client.query("samples:echo", {"value": value}), value)
        assert same(client.action("samples:echo_by_action", {"value": value}), value)
    assert math.isnan(client.query("samples:echo", {"value": math.nan}))
    for whole in (0, -1, 5, 2**63 - 1):
        assert same(client.query("samples:echo_int64", {"value": ConvexInt64(whole)}), ConvexInt64(whole))


def test_values_come_back_from_the_database_as_they_were_stored(client: ConvexClient) -> None:
    sample: dict[str, Any] = {
        "whole": ConvexInt64(-(2**63)),
        "payload": b"\x00\xff",
        "ratio": -math.inf,
        "anything": {"list": [math.inf, None], "payload": b"\x01", "whole": ConvexInt64(-(2**60)), "zero": -0.0},
    }
    sample_id = client.mutation("samples:keep", sample)
    kept = client.query("samples:kept", {"sampleId": sample_id})
    assert kept.pop("_id") == sample_id
    assert isinstance(kept.pop("_creationTime"), float)
    assert {name: same(kept[name], sample[name]) for name in kept} == dict.fromkeys(sample, True)


def test_several_queries_of_one_client_change_together(client: ConvexClient) -> None:
    listed = client.subscribe("notes:listNotes", {"board": "together"})
    counted = client.subscribe("notes:countNotes", {"board": "together"})
    views = client.watch_all()
    sent = 0
    while sent < 6:
        view: Any = next(views)
        notes, count = view.get(listed.id), view.get(counted.id)
        if notes is None or count is None:
            continue  # not both are answered yet
        assert len(notes["value"]) == count["value"]
        if count["value"] == sent:
            add(client, "together", f"note {sent}")
            sent += 1


def test_more_than_one_frame_can_hold_arrives_whole(client: ConvexClient) -> None:
    """This client drops a connection for a frame of 16 MiB."""
    value = "é" * 3_000_000
    assert client.query("samples:echo", {"value": value}) == value
    size = 7_000_000
    subscriptions = [client.subscribe("samples:pad", {"letter": letter, "size": size}) for letter in "abc"]
    for letter, subscription in zip("abc", subscriptions, strict=True):
        assert next(subscription) == letter * size


def test_a_subscription_outlives_the_servers_death_and_no_acknowledged_write_is_lost(
    server: Server, client: ConvexClient, http: ConvexHttpClient
) -> None:
    board = Board(client, "killed")
    board.until([])
    texts = [f"note {number}" for number in range(60)]
    acknowledged, end = Pipe(duplex=False)
    writer = get_context("spawn").Process(target=write_notes, args=(server.address, "killed", texts, end), daemon=True)
    writer.start()
    for text in texts:
        assert acknowledged.recv() == text
        if text in ("note 20", "note 40"):
            server.restart()
    writer.join()

    stored = [note["text"] for note in http.query("notes:listNotes", {"board": "killed"})]
    assert list(dict.fromkeys(stored)) == texts
    assert len(stored) <= len(texts) + 2  # a write whose answer is lost with the connection is sent again as a new one
    board.until(stored)


def write_notes(address: str, board: str, texts: list[str], acknowledged: "Connection[str, str]") -> None:
    """Write one note after the other and say which are acknowledged: the body of a process."""
    client = ConvexClient(address)
    for text in texts:
        while True:
            try:
                add(client, board, text)
                break
            except Exception as error:
                if str(error) != "channel closed":  # its connection ended at a moment that it does not survive
                    raise
                client = ConvexClient(address)
        acknowledged.send(text)


def test_a_client_is_still_signed_in_after_the_servers_death(server: Server, client: ConvexClient) -> None:
    client.set_auth(server.token("alice"))
    assert client.query("callers:whoami")["subject"] == "alice"
    server.restart()
    assert client.mutation("callers:whoami_as_mutation")["subject"] == "alice"


# -- over HTTP


def test_a_write_over_http_reaches_a_subscriber_on_a_socket(client: ConvexClient, http: ConvexHttpClient) -> None:
    board = Board(client, "http")
    board.until([])
    add(http, "http", "posted")
    assert [note["text"] for note in http.query("notes:listNotes", {"board": "http"})] == ["posted"]
    assert http.action("errands:addTwice", {"board": "http", "text": "done"}) == 3.0
    board.until(["posted", "done 1", "done 2"])


def test_errors_over_http(http: ConvexHttpClient) -> None:
    for call, path in ((http.query, "query"), (http.mutation, "mutation"), (http.action, "action")):
        with pytest.raises(ConvexError) as refused:
            call(f"faults:refuse_{path}")
        assert refused.value.data == {**REFUSAL, "payload": {"$bytes": "AP8="}}  # this client leaves it encoded
        with pytest.raises(ConvexExecutionError, match="Server Error") as broken:
            call(f"faults:break_{path}")
        assert "combination" not in str(broken.value)
        with pytest.raises(ConvexExecutionError, match="Could not find public"):
            call("notes:missing")
    with pytest.raises(ConvexExecutionError, match="text"):
        http.mutation("notes:add", {"board": "arguments"})


def test_a_caller_over_http(server: Server, http: ConvexHttpClient) -> None:
    assert http.query("callers:whoami") is None
    http.set_auth(server.token("alice"))
    assert http.query("callers:whoami")["subject"] == "alice"
    assert http.mutation("callers:whoami_as_mutation")["subject"] == "alice"
    http.set_auth(server.token(is_forged=True))
    with pytest.raises(Exception, match=r"^401 "):
        http.query("callers:whoami")
    http.clear_auth()
    assert http.query("callers:whoami") is None


def test_values_over_http(http: ConvexHttpClient) -> None:
    for value in SPECIAL_VALUES:
        assert same(http.query("samples:echo", {"value": value}), value)
    assert same(http.action("samples:echo_by_action", {"value": SPECIAL_VALUES}), SPECIAL_VALUES)
    assert math.isnan(http.query("samples:echo", {"value": math.nan}))
    assert http.query("samples:echo_int64", {"value": ConvexInt64(7)}) == ConvexInt64(7)
    assert same(http.query("samples:double_integer", {"value": 21}), 42.0)
