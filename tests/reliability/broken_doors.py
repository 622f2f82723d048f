"""Doors that break a promise, for checks that must find it out: `ServerProcess(…, broken=name)`."""

from typing import Any

from engine.server.connection import Connection
from engine.server.lagging import Lagging
from engine.sync.query_set import QuerySet
from engine.sync.session import Session


def _nothing(*_: Any) -> None:
    pass


def _send_everything() -> None:
    Session.set_lagging = _nothing


def _keep_the_stuck() -> None:
    Lagging.began = _nothing


def _keep_the_silent() -> None:
    Connection.sweep = _nothing


def _take_any_number_of_queries() -> None:
    QuerySet.rest_seconds = lambda *_: 0.0


BROKEN_DOORS = {
    "who lags is sent everything": _send_everything,
    "who is stuck is kept": _keep_the_stuck,
    "who is silent is kept": _keep_the_silent,
    "queries are not paced": _take_any_number_of_queries,
}
