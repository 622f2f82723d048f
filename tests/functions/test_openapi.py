"""`/openapi.json`: a valid document, and what it says of arguments and answers is what the server does."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from engine.functions.loader import load_app
from engine.functions.openapi import openapi_document
from engine.limits import Limits
from tests.functions.apps import write_app
from tests.server.real import RealServer, serve_app

APP = """
import msgspec
from typing import Annotated, Generic, Literal, TypeVar, TypedDict

T = TypeVar("T")

class Tree(msgspec.Struct):
    name: str
    children: list["Tree"] = []

class Card(msgspec.Struct, tag="card"):
    number: Annotated[str, msgspec.Meta(min_length=4, pattern="^[0-9]+$")]

class Cash(msgspec.Struct, tag="cash"):
    amount: Annotated[int, msgspec.Meta(ge=1)]

class Options(TypedDict, total=False):
    colour: Literal["red", "blue"]

class Everything(msgspec.Struct):
    big: Int64
    raw: bytes
    ratio: float
    flag: bool
    maybe: str | None
    counts: dict[str, int]
    pair: list[Card | Cash]
    anything: Any
    options: Options
    tree: Tree
    level: Literal[1, 2] = 1

class Box(msgspec.Struct, Generic[T]):
    inside: T

@query
async def items(ctx: QueryCtx, key: str, options: PaginationOptions | None = None) -> list[Item]:
    \"\"\"The items of a key.

    In order.
    \"\"\"
    return await ctx.db.query(Item.by_key, key=key).collect()

@mutation
async def keep(ctx: MutationCtx, key: str = "a") -> Id[Item]:
    return await ctx.db.insert(Item(key=key))

@action
async def echo(ctx: ActionCtx, value: Everything) -> Everything:
    return value

@query
async def boxes(ctx: QueryCtx, one: Box[int], two: Box[str]) -> Box[int]:
    return one

@mutation(internal=True)
async def hidden(ctx: MutationCtx) -> None: ...

@http.get("/app/items/{item_id}")
async def get_item(
    ctx: ActionCtx, item_id: Id[Item], tags: list[str], sort: Literal["new", "old"] = "new", limit: int | None = None
) -> Item | None: ...

@http.post("/app/echo")
async def echo_route(ctx: ActionCtx, body: Everything) -> Everything:
    return body

@http.put("/app/echo")
async def file(ctx: ActionCtx, body: Any = None) -> Response: ...

@http.post("/app/hook", webhook=Webhook(secret="key", scheme="github"))
async def hook(ctx: ActionCtx, body: Cash) -> None: ...
"""


@pytest.fixture
def document(tmp_path: Path) -> Any:
    return msgspec.json.decode(openapi_document(load_app(write_app(tmp_path, APP), Limits()).registry))


def schema_of(document: Any, *path: str) -> Any:
    for name in path:
        document = document[name]
    return document["content"]["application/json"]["schema"]


def component(document: Any, schema: Any) -> Any:
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


def fits(document: Any, schema: Any, value: Any) -> bool:
    resource = Resource(contents=document, specification=DRAFT202012)
    wrapped = {"$id": "urn:test", **schema}
    text = msgspec.json.encode(wrapped).replace(b'"#/components', b'"urn:document#/components')
    registry: Any = Registry().with_resource("urn:document", resource)
    return bool(OAS31Validator(msgspec.json.decode(text), registry=registry).is_valid(value))


def test_the_document_is_valid_openapi(document: Any) -> None:
    validate(document)


def test_every_route_and_public_function_is_in_it_and_nothing_else(document: Any) -> None:
    assert {path: set(operations) for path, operations in document["paths"].items()} == {
        "/app/items/{item_id}": {"get"},
        "/app/echo": {"post", "put"},
        "/app/hook": {"post"},
        "/api/run/m/items": {"post"},
        "/api/run/m/keep": {"post"},
        "/api/run/m/echo": {"post"},
        "/api/run/m/boxes": {"post"},
    }


def test_an_app_without_anything_has_a_valid_document(tmp_path: Path) -> None:
    empty = msgspec.json.decode(openapi_document(load_app(write_app(tmp_path, ""), Limits()).registry))
    validate(empty)
    assert empty["paths"] == {}


def test_operations_have_names_of_their_own_and_their_docstrings(tmp_path: Path) -> None:
    modules = {
        "a/b": "@query\nasync def c(ctx: QueryCtx) -> None:\n    'Does c.'\n",
        "a_b": '@query\nasync def c(ctx: QueryCtx) -> None: ...\n@http.get("/c")\nasync def d(ctx: ActionCtx): ...\n',
    }
    document = msgspec.json.decode(openapi_document(load_app(write_app(tmp_path, modules), Limits()).registry))
    validate(document)
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert sorted(operation["operationId"] for operation in operations) == ["a_b_c", "a_b_c_2", "a_b_d"]
    assert [operation["summary"] for operation in operations if "summary" in operation] == ["Does c."]


def test_parameters_say_where_they_stand_and_whether_they_must_be_there(document: Any) -> None:
    operation = document["paths"]["/app/items/{item_id}"]["get"]
    assert operation["parameters"] == [
        {
            "name": "item_id",
            "in": "path",
            "required": True,
            "schema": {"type": "string", "description": "Id[Item]"},
        },
        {"name": "tags", "in": "query", "required": False, "schema": {"type": "array", "items": {"type": "string"}}},
        {"name": "sort", "in": "query", "required": False, "schema": {"enum": ["new", "old"]}},
        {"name": "limit", "in": "query", "required": False, "schema": {"type": "integer"}},
    ]
    assert operation["responses"].keys() == {"200", "204", "default"}
    item = component(document, schema_of(operation, "responses", "200"))
    assert item["required"][:2] == ["_id", "_creationTime"]


def test_a_webhook_asks_for_a_signature_and_no_token(document: Any) -> None:
    operation = document["paths"]["/app/hook"]["post"]
    assert operation["security"] == []
    assert [parameter["name"] for parameter in operation["parameters"]] == ["x-hub-signature-256"]
    assert document["paths"]["/app/echo"]["post"]["security"] == [{}, {"token": []}]
    assert operation["responses"].keys() == {"204", "default"}


def test_a_generic_struct_is_another_one_for_each_of_its_types(document: Any) -> None:
    arguments = schema_of(document["paths"]["/api/run/m/boxes"]["post"], "requestBody")["properties"]["args"]
    one, two = (component(document, arguments["properties"][name]) for name in ("one", "two"))
    assert one["properties"]["inside"] == {"type": "integer"}
    assert two["properties"]["inside"] == {"type": "string"}


GOOD = {
    "big": {"$integer": "AAAAAAAAABA="},
    "raw": {"$bytes": "AQI="},
    "ratio": 0.5,
    "flag": True,
    "maybe": None,
    "counts": {"a": 1},
    "pair": [{"type": "card", "number": "1234"}, {"type": "cash", "amount": 1}],
    "anything": [1, "x"],
    "options": {"colour": "red"},
    "tree": {"name": "root", "children": [{"name": "leaf"}]},
}
WRONG: list[dict[str, Any]] = [
    {"big": "1"},
    {"raw": "AQI="},
    {"ratio": "0.5"},
    {"flag": 1},
    {"maybe": 5},
    {"counts": {"a": "1"}},
    {"pair": [{"type": "card", "number": "123"}]},
    {"pair": [{"type": "card", "number": "123a"}]},
    {"pair": [{"type": "cash", "amount": 0}]},
    {"pair": [{"type": "cheque"}]},
    {"options": {"colour": "green"}},
    {"tree": {"name": "root", "children": [{}]}},
    {"level": 3},
]


@pytest.fixture
async def real(tmp_path: Path) -> Any:
    async with serve_app(tmp_path, APP) as real:
        yield real


async def described(real: RealServer) -> Any:
    reply = await real.ask("GET", "/openapi.json")
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
    return reply.json


async def test_what_fits_the_schemas_is_accepted_and_what_is_answered_fits_them(real: RealServer) -> None:
    document = await described(real)
    operation = document["paths"]["/app/echo"]["post"]
    assert fits(document, schema_of(operation, "requestBody"), GOOD)
    reply = await real.ask("POST", "/app/echo", json=GOOD)
    assert reply.status == 200
    assert fits(document, schema_of(operation, "responses", "200"), reply.json)
    for path, args in (
        ("/api/run/m/echo", {"value": GOOD}),
        ("/api/run/m/keep", {}),
        ("/api/run/m/items", {"key": "a"}),
        ("/api/run/m/boxes", {"one": {"inside": 1}, "two": {"inside": "x"}}),
        ("/api/run/m/items", {}),
    ):
        operation = document["paths"][path]["post"]
        is_right = path != "/api/run/m/items" or bool(args)
        assert fits(document, schema_of(operation, "requestBody"), {"args": args, "format": "json"}) == is_right
        reply = await real.ask("POST", path, json={"args": args, "format": "json"})
        assert fits(document, schema_of(operation, "responses", "200"), reply.json)
        assert (reply.json["status"] == "success") == is_right


@pytest.mark.parametrize("wrong", WRONG, ids=str)
async def test_what_does_not_fit_the_schemas_is_refused(real: RealServer, wrong: dict[str, Any]) -> None:
    document = await described(real)
    body = {**GOOD, **wrong}
    assert not fits(document, schema_of(document["paths"]["/app/echo"]["post"], "requestBody"), body)
    reply = await real.ask("POST", "/app/echo", json=body)
    assert reply.status == 400
    assert fits(document, {"$ref": "#/components/schemas/Error"}, reply.json)


async def test_the_document_follows_a_reload(real: RealServer) -> None:
    before = await described(real)
    assert await described(real) == before
    await real.app.rewrite('@http.get("/app/new")\nasync def new(ctx: ActionCtx) -> int: ...')
    after = await described(real)
    assert set(after["paths"]) == {"/app/new"}
    assert after["info"]["version"] != before["info"]["version"]
