"""The session, driven by messages: no socket, no time of its own."""

import json
from typing import Any

import pytest

from engine.errors import AuthenticationFailed
from engine.identity import Identity
from engine.limits import Limits
from engine.sync.backend import AdminKey, MutationOutcome, UserToken
from engine.sync.protocol import decode_timestamp, encode_timestamp
from engine.testing import ManualClock
from tests.sync.fakes import (
    SESSION_ID,
    FakeBackend,
    FakeClient,
    FakeFailure,
    FakeVerified,
    action,
    add,
    authenticate,
    connect,
    mutation,
    query_set,
    remove,
    types,
)

ALICE = Identity(subject="alice", issuer="https://login.example")
APP_FAILURE = FakeFailure("Uncaught AppError", data=b'{"code":"FULL"}', code="AppError")
PLAIN_FAILURE = FakeFailure("Server Error")


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    backend.show("chat:list", ["hi"])
    backend.show("games:list", [])
    return backend


@pytest.fixture
def client(backend: FakeBackend) -> FakeClient:
    return FakeClient(backend)


def subscribed(backend: FakeBackend, **more: Any) -> FakeClient:
    """A client that has the result of one query."""
    client = FakeClient(backend, **more)
    client.say(connect(), query_set(0, add(0, "chat:list")))
    assert client.state == {0: ["hi"]}
    return client


# -- the first Transition ----------------------------------------------------------------------------------------------


def test_the_first_transition_starts_at_zero_and_answers_every_query(backend: FakeBackend, client: FakeClient) -> None:
    (transition,) = client.say(connect(), query_set(0, add(0, "chat:list"), add(1, "games:list")))
    assert transition["startVersion"] == {"querySet": 0, "identity": 0, "ts": "AAAAAAAAAAA="}
    assert transition["endVersion"] == {"querySet": 1, "identity": 0, "ts": encode_timestamp(1000)}
    assert transition["modifications"] == [
        {"queryId": 0, "type": "QueryUpdated", "value": ["hi"], "logLines": [], "journal": None},
        {"queryId": 1, "type": "QueryUpdated", "value": [], "logLines": [], "journal": None},
    ]


def test_an_empty_query_set_is_answered(client: FakeClient) -> None:
    assert types(client.say(connect(), query_set(0))) == ["Transition"]
    assert client.version["querySet"] == 1


def test_several_query_sets_of_one_burst_are_one_transition(client: FakeClient) -> None:
    heard = client.say(connect(), query_set(0, add(0, "chat:list")), query_set(1, add(1, "games:list")))
    assert types(heard) == ["Transition"]
    assert client.version["querySet"] == 2


def test_the_first_transition_waits_for_a_query_set_that_comes_later(client: FakeClient) -> None:
    assert client.say(connect()) == []
    assert client.say(authenticate(0, None)) == []
    (transition,) = client.say(query_set(0, add(0, "chat:list")))
    assert transition["endVersion"]["identity"] == 1
    assert client.state == {0: ["hi"]}


def test_an_identity_alone_is_confirmed_when_no_query_set_comes(client: FakeClient) -> None:
    assert client.say(connect(), authenticate(0, None)) == []
    client.clock.advance(0.3)
    (transition,) = client.hear()
    assert transition["modifications"] == []
    assert client.version["identity"] == 1


def test_nothing_is_sent_while_one_of_the_queries_has_no_result(backend: FakeBackend, client: FakeClient) -> None:
    backend.slow_paths.add("games:list")
    assert client.say(connect(), query_set(0, add(0, "chat:list"), add(1, "games:list"))) == []
    backend.slow_paths.clear()
    backend.tell()
    assert types(client.hear()) == ["Transition"]
    assert client.state == {0: ["hi"], 1: []}


@pytest.mark.parametrize("reason", [{"lastCloseReason": None}, {"lastCloseReason": ""}, {}])
@pytest.mark.parametrize(
    "client_ts", [{"clientTs": 0}, {"clientTs": 4e14}, {"clientTs": 12.5}, {"clientTs": 10**400}, {}]
)
def test_connect_is_accepted_in_every_spelling(
    client: FakeClient, reason: dict[str, Any], client_ts: dict[str, Any]
) -> None:
    message = {"type": "Connect", "sessionId": SESSION_ID, "connectionCount": 3, **reason, **client_ts}
    (transition,) = client.say(message, query_set(0))
    stamp = [type(transition[name]) for name in ("clientClockSkew", "serverTs") if name in transition]
    assert stamp in ([int, int], [])


def test_the_clock_skew_and_the_server_time_are_true(client: FakeClient) -> None:
    now_ms = client.clock.wall_ns() // 1_000_000
    (transition,) = client.say(connect(clientTs=now_ms + 250), query_set(0))
    assert transition["clientClockSkew"] == 250
    assert transition["serverTs"] == client.clock.wall_ns()


def test_a_client_that_is_ahead_of_the_database_is_closed(client: FakeClient, caplog: pytest.LogCaptureFixture) -> None:
    assert client.say(connect(maxObservedTimestamp=encode_timestamp(1001)), query_set(0)) == []
    assert client.session.closing is not None
    assert (client.session.closing.code, client.session.closing.reason) == (1011, "InternalServerError")
    assert "lost commits" in caplog.text


def test_a_client_that_has_seen_the_newest_commit_is_served(client: FakeClient) -> None:
    assert types(client.say(connect(maxObservedTimestamp=encode_timestamp(1000)), query_set(0))) == ["Transition"]


# -- changes -----------------------------------------------------------------------------------------------------------


def test_a_commit_of_somebody_else_is_pushed(backend: FakeBackend) -> None:
    client = subscribed(backend)
    backend.commit(**{"chat:list": ["hi", "you"]})
    (transition,) = client.hear()
    assert client.state == {0: ["hi", "you"]}
    assert decode_timestamp(transition["endVersion"]["ts"]) == 1001


def test_a_commit_that_changes_nothing_of_it_is_not_told(backend: FakeBackend) -> None:
    client = subscribed(backend)
    backend.commit()
    assert client.hear() == []


def test_an_unchanged_result_is_not_sent_again(backend: FakeBackend) -> None:
    client = subscribed(backend)
    (transition,) = client.say(query_set(1, add(1, "games:list")))
    assert [modification["queryId"] for modification in transition["modifications"]] == [1]


def test_a_remove_is_acknowledged(backend: FakeBackend) -> None:
    client = subscribed(backend)
    (transition,) = client.say(query_set(1, remove(0)))
    assert transition["modifications"] == [{"queryId": 0, "type": "QueryRemoved"}]


def test_a_query_removed_before_its_result_came_leaves_no_trace(backend: FakeBackend, client: FakeClient) -> None:
    backend.slow_paths.add("chat:list")
    assert client.say(connect(), query_set(0, add(0, "chat:list"))) == []
    (transition,) = client.say(query_set(1, remove(0)))
    assert transition["modifications"] == [{"queryId": 0, "type": "QueryRemoved"}]


def test_a_query_id_that_comes_back_in_the_same_burst_has_one_modification(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(query_set(1, remove(0)), query_set(2, add(0, "games:list")))
    assert client.state == {0: []}


def test_the_remove_of_an_unknown_query_is_ignored(client: FakeClient) -> None:
    assert types(client.say(connect(), query_set(0, remove(7)))) == ["Transition"]


def test_a_failed_query_keeps_the_journal_of_its_client(backend: FakeBackend, client: FakeClient) -> None:
    backend.fail("chat:list", PLAIN_FAILURE, journal="page-end")
    backend.fail("games:list", APP_FAILURE)
    (transition,) = client.say(connect(), query_set(0, add(0, "chat:list"), add(1, "games:list")))
    assert transition["modifications"] == [
        {"queryId": 0, "type": "QueryFailed", "errorMessage": "Server Error", "logLines": [], "journal": "page-end"},
        {
            "queryId": 1,
            "type": "QueryFailed",
            "errorMessage": "Uncaught AppError",
            "errorData": {"code": "FULL"},
            "logLines": [],
        },
    ]


def test_the_journal_of_an_add_reaches_the_view(backend: FakeBackend, client: FakeClient) -> None:
    client.say(connect(), query_set(0, add(0, "chat:list", {"game": 1}, journal="page-end")))
    assert client.view.asked[0] == (b'{"game": 1}', "page-end")


def test_one_result_is_encoded_once_for_all_who_have_it(backend: FakeBackend) -> None:
    clients = [subscribed(backend) for _ in range(3)]
    backend.commit(**{"chat:list": ["new"]})
    first = clients[0].hear()
    fragment = backend.results["chat:list"].encoded
    assert fragment is not None
    assert [client.hear()[0]["modifications"] for client in clients[1:]] == [first[0]["modifications"]] * 2
    assert backend.results["chat:list"].encoded is fragment


def test_an_internal_error_in_a_query_closes_instead_of_being_shown(backend: FakeBackend, client: FakeClient) -> None:
    backend.fail("chat:list", FakeFailure("bug", code="InternalError"))
    assert client.say(connect(), query_set(0, add(0, "chat:list"))) == []
    assert client.session.closing is not None
    assert client.session.closing.code == 1011


# -- mutations ---------------------------------------------------------------------------------------------------------


def test_a_mutation_is_answered_and_then_shown(backend: FakeBackend) -> None:
    client = subscribed(backend)
    assert client.say(mutation(0, "chat:send", {"body": "x"})) == []
    (running,) = backend.mutations
    assert (running.path, running.arguments) == ("chat:send", b'{"body": "x"}')
    ts = backend.commit(running, value="id1", **{"chat:list": ["hi", "x"]})
    response, transition = client.hear()
    assert response == {
        "type": "MutationResponse",
        "requestId": 0,
        "success": True,
        "result": "id1",
        "ts": encode_timestamp(ts),
        "logLines": [],
    }
    assert decode_timestamp(transition["endVersion"]["ts"]) >= ts
    assert client.state == {0: ["hi", "x"]}


def test_a_transition_follows_a_mutation_that_changed_nothing(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0))
    running = backend.mutations.pop()
    running.done(MutationOutcome(ts=backend.ts, value=b"null"))  # it only read: the timestamp of what it saw
    response, transition = client.hear()
    assert response["result"] is None
    assert transition["startVersion"] == transition["endVersion"]


def test_a_transition_follows_even_if_an_earlier_one_passed_that_timestamp(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0))
    backend.commit(**{"chat:list": ["other"]})
    assert types(client.hear()) == ["Transition"]
    backend.mutations.pop().done(MutationOutcome(ts=1000, value=b"null"))
    assert types(client.hear()) == ["MutationResponse", "Transition"]


def test_a_view_that_is_held_back_does_not_pay_for_a_newer_mutation(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0))
    backend.view_ts = backend.ts
    ts = backend.commit(backend.mutations[0], **{"chat:list": ["older"]})
    heard = client.hear()
    assert types(heard) == ["MutationResponse", "Transition"]
    assert client.ts < ts
    backend.view_ts = None
    backend.tell()
    assert types(client.hear()) == ["Transition"]
    assert client.ts == ts


def test_one_transition_serves_several_answers(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0))
    client.session.receive(json.dumps(mutation(1)))
    backend.commit(backend.mutations[0])
    backend.commit(backend.mutations[0])
    assert types(client.hear()) == ["MutationResponse", "MutationResponse", "Transition"]


def test_mutations_run_one_at_a_time_in_order(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0, "a:a"), mutation(1, "b:b"), mutation(2, "c:c"))
    assert backend.started == ["a:a"]
    answers = []
    for _ in range(3):
        backend.commit(backend.mutations[0])
        answers += [message["requestId"] for message in client.hear() if message["type"] == "MutationResponse"]
    assert backend.started == ["a:a", "b:b", "c:c"]
    assert answers == [0, 1, 2]


def test_mutations_refused_at_once_do_not_pile_up_on_the_stack(backend: FakeBackend) -> None:
    client = subscribed(backend)
    heard = client.say(*[mutation(number, "refused:at_once") for number in range(2_000)])
    assert [message["requestId"] for message in heard] == list(range(2_000))


def test_a_failed_mutation_with_data_is_followed_by_a_transition_and_a_plain_one_is_not(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0), mutation(1))
    backend.refuse(backend.mutations[0], APP_FAILURE)
    response, transition = client.hear()
    assert response == {
        "type": "MutationResponse",
        "requestId": 0,
        "success": False,
        "result": "Uncaught AppError",
        "errorData": {"code": "FULL"},
        "logLines": [],
    }
    assert transition["type"] == "Transition"
    backend.refuse(backend.mutations[0], PLAIN_FAILURE)
    (response,) = client.hear()
    assert "errorData" not in response


def test_a_mutation_without_any_query_set_is_answered_and_followed_by_a_transition(
    backend: FakeBackend, client: FakeClient
) -> None:
    client.say(connect(), mutation(0))
    backend.commit(backend.mutations[0])
    assert types(client.hear()) == ["MutationResponse", "Transition"]
    assert client.version["querySet"] == 0


def test_a_failure_without_any_query_set_is_answered_too(backend: FakeBackend, client: FakeClient) -> None:
    client.say(connect(), mutation(0))
    backend.refuse(backend.mutations[0], APP_FAILURE)
    assert types(client.hear()) == ["MutationResponse", "Transition"]


def test_an_internal_error_in_a_mutation_closes_and_does_not_answer(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0))
    backend.refuse(backend.mutations[0], FakeFailure("bug", code="InternalError"))
    assert client.hear() == []
    assert client.session.closing is not None
    assert (client.session.closing.code, client.session.closing.reason) == (1011, "InternalServerError")


# -- reconnecting ------------------------------------------------------------------------------------------------------


def test_success_answers_of_resent_mutations_come_before_the_first_transition(
    backend: FakeBackend, client: FakeClient
) -> None:
    backend.recorded[SESSION_ID, 4] = MutationOutcome(ts=990, value=b'"id4"')
    heard = client.say(connect(), query_set(0, add(0, "chat:list")), mutation(4))
    assert types(heard) == ["MutationResponse", "Transition"]
    assert (heard[0]["result"], decode_timestamp(heard[0]["ts"])) == ("id4", 990)
    assert backend.started == [], "it is not run again"


def test_failure_answers_come_after_the_first_transition(backend: FakeBackend, client: FakeClient) -> None:
    backend.slow_paths.add("chat:list")
    client.say(connect(), query_set(0, add(0, "chat:list")), mutation(4), action(5))
    backend.refuse(backend.mutations[0], APP_FAILURE)
    backend.end(backend.actions[0], failure=PLAIN_FAILURE)
    assert client.hear() == []
    backend.slow_paths.clear()
    backend.tell()
    heard = client.hear()
    assert types(heard) == ["Transition", "MutationResponse", "ActionResponse", "Transition"]
    assert [message["requestId"] for message in heard[1:3]] == [4, 5]


def test_the_same_query_ids_are_accepted_on_a_new_connection(backend: FakeBackend) -> None:
    subscribed(backend)
    subscribed(backend)


# -- actions -----------------------------------------------------------------------------------------------------------


def test_actions_run_beside_mutations_and_need_no_transition(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0), action(1), action(2))
    assert len(backend.actions) == 2
    backend.end(backend.actions[1], "sent")
    assert client.hear() == [
        {"type": "ActionResponse", "requestId": 2, "success": True, "result": "sent", "logLines": []}
    ]


def test_a_failed_action_has_error_data_only_from_the_app(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(action(0), action(1))
    backend.end(backend.actions[0], failure=PLAIN_FAILURE)
    backend.end(backend.actions[0], failure=APP_FAILURE)
    plain, of_the_app, transition = client.hear()
    assert "errorData" not in plain
    assert of_the_app["errorData"] == {"code": "FULL"}
    assert transition["type"] == "Transition", "the PyPI client waits for it"


def test_actions_past_the_bound_wait_for_their_turn(backend: FakeBackend) -> None:
    client = subscribed(backend, limits=Limits(action_concurrent_count_max=2))
    client.say(action(0), action(1), action(2))
    assert len(backend.actions) == 2
    backend.end(backend.actions[0])
    assert len(backend.actions) == 2
    assert [message["requestId"] for message in client.hear()] == [0]


def test_actions_with_one_request_id_are_each_answered(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(action(0), action(0), action(0, "refused:at_once"))
    backend.end(backend.actions[0])
    backend.end(backend.actions[0])
    assert types(client.hear()) == ["ActionResponse", "ActionResponse"]


# -- who asks ----------------------------------------------------------------------------------------------------------


def test_an_accepted_credential_advances_the_identity_even_without_changes(backend: FakeBackend) -> None:
    client = subscribed(backend)
    assert client.say(authenticate(0)) == []
    assert client.session.unverified == UserToken("token")
    client.session.accept(FakeVerified(ALICE))
    (transition,) = client.hear()
    assert (transition["modifications"], client.version["identity"]) == ([], 1)
    assert client.view.identity == ALICE


def test_signing_out_advances_the_identity_too(backend: FakeBackend) -> None:
    client = subscribed(backend)
    assert types(client.say(authenticate(0, None))) == ["Transition"]
    assert client.version["identity"] == 1


def test_several_identities_may_collapse_into_one_transition(backend: FakeBackend) -> None:
    client = subscribed(backend)
    assert types(client.say(authenticate(0, None), authenticate(1, None))) == ["Transition"]
    assert client.version["identity"] == 2


def test_messages_wait_while_a_credential_is_checked_and_then_run_under_it(backend: FakeBackend) -> None:
    client = FakeClient(backend)
    burst = [connect(), authenticate(0), query_set(0, add(0, "chat:list")), mutation(0), authenticate(1), mutation(1)]
    assert client.say(*burst) == []
    assert client.session.is_reading_paused
    assert backend.started == []
    client.session.accept(FakeVerified(ALICE))
    assert [running.identity for running in backend.mutations] == [ALICE]
    client.session.accept(FakeVerified(None))
    assert not client.session.is_reading_paused
    backend.commit(backend.mutations[0])
    assert [running.identity for running in backend.mutations] == [None]
    assert client.hear()[-1]["endVersion"]["identity"] == 2


def test_a_refused_credential_is_told_and_closes(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(authenticate(0, None))
    client.say(authenticate(1), mutation(0))
    client.session.refuse(AuthenticationFailed("The signature is wrong."))
    frames = [json.loads(b"".join(frame)) for frame in client.session.outbox]
    assert frames == [
        {"type": "AuthError", "error": "The signature is wrong.", "baseVersion": 1, "authUpdateAttempted": True}
    ]
    assert client.session.closing is not None
    assert client.session.closing.code == 1000
    assert backend.started == [], "what came after it is ignored"


def test_an_expired_identity_is_told_and_closes(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(authenticate(0))
    expires_at_ms = client.clock.wall_ns() / 1e6 + 7_200_000
    client.session.accept(FakeVerified(ALICE, expires_at_ms))
    client.hear()
    client.clock.advance(7_199)
    assert client.session.closing is None
    client.clock.advance(2)
    error = json.loads(b"".join(client.session.outbox[-1]))
    assert (error["type"], error["authUpdateAttempted"], error["baseVersion"]) == ("AuthError", False, 1)
    assert client.session.closing is not None


def test_a_newer_credential_puts_the_expiry_off(backend: FakeBackend) -> None:
    client = subscribed(backend)
    now_ms = client.clock.wall_ns() / 1e6
    client.say(authenticate(0))
    client.session.accept(FakeVerified(ALICE, now_ms + 10_000))
    client.say(authenticate(1))
    client.clock.advance(11)  # expired while the newer one is being checked
    assert client.session.closing is None
    client.session.accept(FakeVerified(ALICE, now_ms + 60_000))
    client.clock.advance(40)
    assert client.session.closing is None


@pytest.mark.parametrize("member", ["impersonating", "acting_as"])
def test_an_admin_may_act_as_a_user_in_both_spellings(backend: FakeBackend, member: str) -> None:
    client = subscribed(backend)
    user = {"issuer": "https://i", "subject": "u1"}
    client.say({"type": "Authenticate", "baseVersion": 0, "tokenType": "Admin", "value": "key", member: user})
    assert client.session.unverified == AdminKey("key", user)


def test_an_identity_version_that_does_not_follow_closes_so_that_the_client_starts_over(backend: FakeBackend) -> None:
    client = subscribed(backend)
    assert client.say(authenticate(3)) == []
    assert client.session.closing is not None
    assert client.session.closing.code == 1002


# -- requests that are refused -----------------------------------------------------------------------------------------


def test_component_paths_are_refused_per_request(backend: FakeBackend, client: FakeClient) -> None:
    heard = client.say(
        connect(),
        query_set(0, add(0, "chat:list", componentPath="x")),
        mutation(0, componentPath="x"),
        action(1, componentPath="x"),
    )
    assert types(heard) == ["Transition", "MutationResponse", "ActionResponse"]
    assert "Could not find public query function for 'x/chat:list'" in client.state[0]
    assert [message["success"] for message in heard[1:]] == [False, False]
    assert backend.started == []


@pytest.mark.parametrize("args", [[], [{}, {}], {}, 3])
def test_arguments_that_are_not_one_object_fail_their_request(client: FakeClient, args: Any) -> None:
    message = {"type": "Mutation", "requestId": 0, "udfPath": "chat:send", "args": args}
    heard = client.say(connect(), query_set(0), message)
    assert types(heard) == ["Transition", "MutationResponse"]
    assert heard[1]["result"].startswith("InvalidArgument: ")


def test_half_a_surrogate_pair_in_arguments_fails_its_request_only(backend: FakeBackend, client: FakeClient) -> None:
    client.say(connect(), query_set(0, add(0, "chat:list", {"name": "\ud800"}), add(1, "games:list")))
    assert client.state[0].startswith("InvalidArgument: ")
    assert client.state[1] == []
    heard = client.say(mutation(0, "chat:send", {"a\udfff": 1}))
    assert (types(heard), heard[0]["success"]) == (["MutationResponse"], False)
    assert client.session.closing is None


def test_arguments_past_the_bound_fail_their_request(backend: FakeBackend) -> None:
    client = FakeClient(backend, limits=Limits(arguments_size_bytes_max=20))
    fits, does_not = "x" * (20 - len('{"a": ""}')), "x" * (21 - len('{"a": ""}'))
    client.say(connect(), query_set(0, add(0, "chat:list", {"a": fits}), add(1, "chat:list", {"a": does_not})))
    assert client.state[0] == ["hi"]
    assert client.state[1].startswith("LimitExceeded: bytes of arguments: 21 used, 20 allowed.")


def test_subscriptions_past_the_bound_fail_and_the_others_live_on(backend: FakeBackend) -> None:
    client = FakeClient(backend, limits=Limits(query_count_max=2))
    client.say(connect(), query_set(0, *[add(number, "chat:list") for number in range(3)]))
    assert [client.state[0], client.state[1]] == [["hi"], ["hi"]]
    assert client.state[2].startswith("LimitExceeded: subscriptions of this connection: 3 used, 2 allowed.")
    client.say(query_set(1, remove(2), remove(0), add(3, "chat:list")))
    assert client.state == {1: ["hi"], 3: ["hi"]}


def test_a_flood_of_refused_subscriptions_ends_the_connection(backend: FakeBackend) -> None:
    client = FakeClient(backend, limits=Limits(query_count_max=2))
    client.say(connect(), query_set(0, *[add(number, "chat:list") for number in range(5)]))
    assert client.session.closing is not None
    assert client.session.closing.code == 1013


# -- misuse of the protocol --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "NaN",
        '{"type":"Nonsense"}',
        '{"type":"Connect"}',
        '{"type":"Connect","sessionId":"me","connectionCount":0}',
        '{"type":"Mutation","requestId":-1,"udfPath":"a:b","args":[{}]}',
        '{"type":"Mutation","requestId":4294967296,"udfPath":"a:b","args":[{}]}',
        '{"type":"Mutation","requestId":1.5,"udfPath":"a:b","args":[{}]}',
        '{"type":"Mutation","requestId":0,"udfPath":"a:b","args":[NaN]}',
        '{"type":"Mutation","requestId":0,"udfPath":"a:b\\ud800","args":[{}]}',
        '{"type":"Mutation","requestId":0,"udfPath":"a:b","args":[' + "[" * 100_000 + "]" * 100_000 + "]}",
        '{"type":"ModifyQuerySet","baseVersion":0,"newVersion":1,"modifications":[{"type":"Twist","queryId":1}]}',
        '{"type":"Authenticate","baseVersion":0,"tokenType":"Magic"}',
        "\x00",
    ],
)
def test_what_no_official_client_sends_is_fatal(client: FakeClient, text: str) -> None:
    client.say(connect())
    client.session.receive(text)
    frames = [json.loads(b"".join(frame)) for frame in client.session.outbox]
    assert types(frames) == ["FatalError"]
    assert client.session.closing is not None


@pytest.mark.parametrize("first", [query_set(0), mutation(0), authenticate(0), {"type": "Event", "eventType": "x"}])
def test_the_first_message_is_connect(client: FakeClient, first: dict[str, Any]) -> None:
    client.session.receive(json.dumps(first))
    assert json.loads(b"".join(client.session.outbox[0]))["type"] == "FatalError"


def test_a_second_connect_is_fatal(client: FakeClient) -> None:
    client.session.receive(json.dumps(connect()))
    client.session.receive(json.dumps(connect()))
    assert json.loads(b"".join(client.session.outbox[0]))["type"] == "FatalError"


@pytest.mark.parametrize("message", [query_set(1), query_set(0, to=0), query_set(0, add(0, "a:b"), add(0, "a:b"))])
def test_a_query_set_that_does_not_follow_closes_so_that_the_client_starts_over(
    client: FakeClient, message: dict[str, Any]
) -> None:
    assert client.say(connect(), message) == []
    assert client.session.closing is not None
    assert client.session.closing.code == 1002


def test_a_large_message_before_connect_closes(client: FakeClient) -> None:
    client.session.receive(json.dumps(connect(lastCloseReason="x" * (64 << 10))))
    assert client.session.closing is not None
    assert client.session.closing.code == 1009


def test_telemetry_is_never_answered(client: FakeClient) -> None:
    client.say(connect(), query_set(0))
    assert client.say({"type": "Event", "eventType": "ClientConnect", "event": [{"name": "x", "startTime": 1.5}]}) == []


# -- back-pressure -----------------------------------------------------------------------------------------------------


def test_a_lagging_client_is_skipped_and_then_gets_the_newest_state_once(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.session.set_lagging(True)
    for number in range(5):
        backend.commit(**{"chat:list": [number]})
        assert client.hear() == []
    client.session.set_lagging(False)
    assert types(client.hear()) == ["Transition"]
    assert client.state == {0: [4]}


def test_a_lagging_client_starts_no_request_and_gets_its_answers_when_it_has_caught_up(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0, "a:a"))
    client.session.set_lagging(True)
    client.say(mutation(1, "b:b"), action(2, "c:c"))
    assert backend.started == ["a:a"]
    backend.commit(backend.mutations[0])
    assert client.hear() == []
    client.session.set_lagging(False)
    assert backend.started == ["a:a", "b:b", "c:c"]
    assert types(client.hear()) == ["MutationResponse", "Transition"]


def test_reading_pauses_while_too_many_requests_wait(backend: FakeBackend) -> None:
    client = subscribed(backend, limits=Limits(mutation_queue_count_max=2))
    client.say(mutation(0), mutation(1))
    assert not client.session.is_reading_paused  # one runs, one waits
    client.say(mutation(2))
    assert client.session.is_reading_paused
    backend.commit(backend.mutations[0])
    client.hear()
    assert not client.session.is_reading_paused


def test_requests_that_are_refused_at_once_pause_reading_too_while_nobody_reads_the_answers(
    backend: FakeBackend,
) -> None:
    client = subscribed(backend, limits=Limits(mutation_queue_count_max=2))
    client.session.set_lagging(True)
    client.say({**mutation(0), "args": []}, {**mutation(1), "args": []})
    assert client.session.is_reading_paused
    client.session.set_lagging(False)
    assert types(client.hear())[:2] == ["MutationResponse", "MutationResponse"]
    assert not client.session.is_reading_paused


def test_a_large_transition_is_spread_over_several_for_clients_that_know_no_chunks(backend: FakeBackend) -> None:
    client = FakeClient(backend, limits=Limits(transition_size_bytes_max=3_000))
    paths = [f"big:{number}" for number in range(5)]
    for path in paths:
        backend.show(path, "x" * 1_000)
    heard = client.say(connect(), query_set(0, *[add(number, path) for number, path in enumerate(paths)]))
    assert types(heard) == ["Transition"] * 3
    assert [message["endVersion"]["querySet"] for message in heard] == [0, 0, 1]
    assert len(client.state) == 5


@pytest.mark.slow
def test_a_large_transition_comes_in_parts_for_clients_that_know_them(backend: FakeBackend) -> None:
    backend.show("chat:list", 'é"\n' * 1_500_000)
    client = FakeClient(backend, accepts_chunks=True)
    heard = client.say(connect(), query_set(0, add(0, "chat:list")))
    assert types(heard) == ["TransitionChunk"] * len(heard)
    assert [part["partNumber"] for part in heard] == list(range(len(heard)))
    assert {(part["totalParts"], part["transitionId"]) for part in heard} == {(len(heard), heard[0]["transitionId"])}
    transition = json.loads("".join(part["chunk"] for part in heard))
    assert transition["modifications"][0]["value"] == 'é"\n' * 1_500_000


# -- time and the end --------------------------------------------------------------------------------------------------


def test_a_silent_connection_is_pinged_from_the_start(client: FakeClient) -> None:
    client.clock.advance(14)
    assert client.hear() == []
    client.clock.advance(1)
    assert client.hear() == [{"type": "Ping"}]
    client.clock.advance(15)
    assert client.hear() == [{"type": "Ping"}]


def test_whatever_is_sent_puts_the_ping_off(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.clock.advance(10)
    backend.commit(**{"chat:list": ["x"]})
    client.hear()
    client.clock.advance(10)
    assert client.hear() == []
    client.clock.advance(5)
    assert client.hear() == [{"type": "Ping"}]


def test_pings_keep_their_pace_when_times_are_no_whole_seconds(backend: FakeBackend) -> None:
    client = subscribed(backend)
    for number in range(200):
        client.clock.advance(0.1)
        if number < 50:
            backend.commit(**{"chat:list": [number]})
            assert types(client.hear()) == ["Transition"]
    assert client.hear() == [{"type": "Ping"}]


def test_a_connection_without_connect_ends_after_five_minutes(client: FakeClient) -> None:
    client.clock.advance(299)
    assert client.session.closing is None
    client.clock.advance(16)
    assert client.session.closing is not None


def test_answers_are_confirmed_by_a_pong_to_a_later_ping_only(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(7), mutation(8), mutation(9))
    backend.commit(backend.mutations[0])
    backend.commit(backend.mutations[0])
    client.hear()
    client.session.pong(b"8")
    assert backend.seen == [], "no ping asked that"
    client.clock.advance(15)
    client.hear()
    assert client.session.ping_payload == b"8", "not 9: it still runs"
    client.session.pong(b"not a number")
    client.session.pong(b"8")
    assert backend.seen == [(SESSION_ID, 8)]


def test_nothing_happens_after_the_close(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0), action(1))
    client.session.close(1000, "")
    assert client.view.is_closed
    assert backend.actions[0].is_cancelled
    backend.commit(backend.mutations[0], **{"chat:list": ["x"]})
    backend.end(backend.actions[0])
    client.clock.advance(3_600)
    assert client.say(mutation(2)) == []
    assert backend.started == ["chat:send", "mail:send"]


def test_a_server_that_stops_answers_the_mutation_that_runs_and_starts_no_other(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.say(mutation(0, "a:a"), mutation(1, "b:b"))
    client.session.end()
    assert client.hear() == []
    assert client.session.closing is None
    backend.commit(backend.mutations[0])
    client.session.flush()
    assert [json.loads(b"".join(frame))["type"] for frame in client.session.outbox] == [
        "MutationResponse",
        "Transition",
    ]
    assert client.session.closing is not None
    assert (client.session.closing.code, client.session.closing.reason) == (1001, "")
    assert backend.started == ["a:a"]


def test_no_timer_is_left_behind(backend: FakeBackend) -> None:
    clock = ManualClock()
    client = subscribed(backend, clock=clock)
    client.say(authenticate(0))
    client.session.accept(FakeVerified(ALICE, clock.wall_ns() / 1e6 + 60_000))
    client.session.close(1000, "")
    assert clock.seconds_to_next_timer is None


# -- who is connected --------------------------------------------------------------------------------------------------


def test_the_backend_is_told_once_that_a_session_is_connected_and_once_that_it_is_gone(backend: FakeBackend) -> None:
    client = FakeClient(backend)
    assert backend.connections == []
    client.say(connect(sessionId=SESSION_ID.upper()), query_set(0))
    assert backend.connections == [(SESSION_ID, "connected")]
    client.session.close(1011, "InternalServerError")
    client.session.peer_closed(1001)
    client.session.close(1000, "")
    assert backend.connections == [(SESSION_ID, "connected"), (SESSION_ID, None)]


def test_the_backend_is_told_the_code_that_a_client_closes_with(backend: FakeBackend) -> None:
    client = subscribed(backend)
    client.session.peer_closed(1001)
    assert backend.connections[-1] == (SESSION_ID, 1001)
    assert client.session.closing is not None


def test_a_connection_that_ends_before_it_has_a_session_is_none_of_it(backend: FakeBackend) -> None:
    FakeClient(backend).session.peer_closed(1001)
    FakeClient(backend).say({"type": "Event"})
    assert backend.connections == []


def test_a_session_that_is_refused_at_once_was_connected_and_is_gone(backend: FakeBackend) -> None:
    client = FakeClient(backend)
    client.say(connect(maxObservedTimestamp=encode_timestamp(2_000)))
    assert backend.connections == [(SESSION_ID, "connected"), (SESSION_ID, None)]
