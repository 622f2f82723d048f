"""`/openapi.json`: the app's routes and public functions as an OpenAPI 3.1 document, for tools that make clients.

Each public function is `POST /api/run/<module>/<name>`: the one way to call it that has an address of its own. Schemas
are made from the shapes that decoders and encoders are compiled from, so they say what really is accepted and sent:
what goes in may differ from what comes out (defaults, int64, bytes).
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from engine.functions.registry import Function, Registry
from engine.functions.requests import NO_VALUES, split_response
from engine.functions.routes import Route
from engine.functions.webhooks import scheme_of
from engine.values.shapes import (
    Anything,
    Bool,
    Bytes,
    Constrained,
    DictShape,
    Float,
    Int,
    Int64Shape,
    ListShape,
    LiteralShape,
    Null,
    RecordField,
    RecordShape,
    Shape,
    Str,
    UnionShape,
    shape_of,
)

Schema = dict[str, Any]
Side = Literal["in", "text", "out"]  # in JSON, in an address, or what is answered

_DESCRIPTION = """\
Names of arguments may be written in snake_case or camelCase. Ids are text. An int is exact as a number up to 2^53:
beyond that, and where a field is int64, it is answered as decimal text and taken as {"$integer": base64 of its 8 bytes,
little-endian}. Bytes are answered as base64 and taken as {"$bytes": base64}. NaN and the infinities are answered as the
text "NaN", "Infinity" and "-Infinity"."""
_DETAILS_OF_BOUNDS = ("type", "items", "contentEncoding")  # what msgspec says of a bounded type that the shape says
_FIXED_SCHEMAS: dict[str, Schema] = {
    "Error": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "description": "stable: match on it, never on the message"},
            "message": {"type": "string"},
            "data": {"description": "of an AppError: what the app says"},
        },
        "required": ["code", "message"],
    },
    "FunctionError": {
        "type": "object",
        "properties": {
            "status": {"const": "error"},
            "errorMessage": {"type": "string"},
            "errorData": {"description": "of an AppError: what the app says"},
            "logLines": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["status", "errorMessage", "logLines"],
    },
    "Int64": {"type": "object", "properties": {"$integer": {"type": "string"}}, "required": ["$integer"]},
    "Bytes": {"type": "object", "properties": {"$bytes": {"type": "string"}}, "required": ["$bytes"]},
}
_TOKEN = "token"  # noqa: S105 - the name of a scheme


def openapi_document(registry: Registry) -> bytes:
    """The document of one version of the app, as JSON."""
    writer = _Writer()
    paths: dict[str, Any] = {}
    for route in registry.routes.routes:
        paths.setdefault(route.path, {})[route.method.lower()] = writer.route(route)
    for function in registry.by_path.values():
        if not function.is_internal:
            paths[f"/api/run/{function.path.replace(':', '/')}"] = {"post": writer.function(function)}
    components = {
        "schemas": _FIXED_SCHEMAS | writer.schema_by_name,
        "responses": {"Error": {"description": "It was refused, or failed.", "content": _json(_reference("Error"))}},
        "securitySchemes": {_TOKEN: {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
    }
    digest = hashlib.sha256(msgspec.json.encode([paths, components], order="deterministic")).hexdigest()
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Routes and functions", "version": digest[:12], "description": _DESCRIPTION},
        "paths": paths,
        "components": components,
    }
    return msgspec.json.encode(document)


class _Writer:
    """Writes operations, and collects the schemas that they refer to."""

    def __init__(self) -> None:
        self.schema_by_name: dict[str, Schema] = {}
        self._name_by_record: dict[tuple[object, ...], str] = {}
        self._operation_ids: set[str] = set()

    def route(self, route: Route) -> dict[str, Any]:
        operation = self._operation(route.function)
        parameters = [self._parameter(route.field_by_name[name], "path", is_required=True) for name in route.path_names]
        for field in route.query:
            is_required = field.is_required and field.name not in route.query_defaults
            parameters.append(self._parameter(field, "query", is_required=is_required))
        if route.webhook is not None:
            operation["security"] = []
            header = {"name": scheme_of(route.webhook).header, "in": "header", "required": True}
            parameters.append(header | {"schema": {"type": "string"}, "description": "The sender's signature."})
        if parameters:
            operation["parameters"] = parameters
        if route.body is not None:
            content = _json(self.schema(route.body.shape, "in"))
            operation["requestBody"] = {"content": content, "required": route.body.is_required}
        operation["responses"] = self._responses(route.function)
        return operation

    def function(self, function: Function) -> dict[str, Any]:
        operation = self._operation(function)
        arguments = self._object(function.signature.fields, "in")
        body: Schema = {"type": "object", "properties": {"args": arguments, "format": {"const": "json"}}}
        if "required" in arguments:
            body["required"] = ["args"]
        value = self.schema(shape_of(function.signature.return_type, where=function.path), "out")
        answer: Schema = {
            "type": "object",
            "properties": {
                "status": {"const": "success"},
                "value": value,
                "logLines": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["status", "value", "logLines"],
        }
        operation["requestBody"] = {"content": _json(body), "required": "required" in body}
        operation["responses"] = {
            "200": {
                "description": f"How the {function.kind} ended.",
                "content": _json({"oneOf": [answer, _reference("FunctionError")]}),
            },
            "default": {"$ref": "#/components/responses/Error"},
        }
        return operation

    def _operation(self, function: Function) -> dict[str, Any]:
        """What each operation has."""
        operation_id = _unique(re.sub(r"\W", "_", function.path), self._operation_ids.__contains__)
        self._operation_ids.add(operation_id)
        operation = {
            "operationId": operation_id,
            "tags": [function.path.rpartition(":")[0]],
            "security": [{}, {_TOKEN: []}],
        }
        text = inspect.getdoc(function.callable)
        if text:
            operation |= {"summary": text.partition("\n")[0], "description": text}
        return operation

    def _parameter(self, field: RecordField, place: str, *, is_required: bool) -> dict[str, Any]:
        schema = self.schema(field.shape, "text")
        return {"name": field.name, "in": place, "required": is_required, "schema": schema}

    def _responses(self, function: Function) -> dict[str, Any]:
        annotation, may_respond = split_response(function.signature.return_type)
        responses: dict[str, Any] = {"default": {"$ref": "#/components/responses/Error"}}
        if may_respond:
            responses["default"] = {"description": "As the route says; an error as everywhere."}
        if annotation is NO_VALUES:
            return responses
        shape = shape_of(annotation, where=function.path)
        alternatives = shape.alternatives if isinstance(shape, UnionShape) else (shape,)
        values = [self.schema(each, "out") for each in alternatives if not isinstance(each, Null)]
        if values:
            schema = values[0] if len(values) == 1 else {"anyOf": values}
            responses["200"] = {"description": "The value.", "content": _json(schema)}
        if len(values) < len(alternatives) or isinstance(shape, Anything):
            responses["204"] = {"description": "Nothing."}
        return responses

    # -- schemas

    def schema(self, shape: Shape, side: Side) -> Schema:
        match shape:
            case Null() | Bool() | Int() | Float():
                return {"type": _TYPE_BY_SHAPE[type(shape)]}
            case Int64Shape():
                return _int64(side)
            case Str(id_of):
                return {"type": "string"} if id_of is None else {"type": "string", "description": str(shape)}
            case Bytes():
                return _reference("Bytes") if side == "in" else {"type": "string", "contentEncoding": "base64"}
            case LiteralShape(choices):
                return {"enum": list(choices)}
            case Anything():
                return {}
            case ListShape(item):
                return {"type": "array", "items": self.schema(item, side)}
            case DictShape(key, item):
                schema = {"type": "object", "additionalProperties": self.schema(item, side)}
                return schema | ({"propertyNames": self.schema(key, side)} if isinstance(key, LiteralShape) else {})
            case Constrained(inner, annotation):
                schema = self.schema(inner, side)
                if isinstance(inner, Int64Shape | Bytes):  # the bounds are of a number, and of bytes
                    return schema
                bounds = msgspec.json.schema(annotation)
                return schema | {name: value for name, value in bounds.items() if name not in _DETAILS_OF_BOUNDS}
            case UnionShape(alternatives):
                if side == "text":
                    alternatives = tuple(each for each in alternatives if not isinstance(each, Null))
                schemas = [self.schema(each, side) for each in alternatives]
                return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
            case RecordShape():
                return self._record(shape, side)
        raise AssertionError(f"no schema for {shape!r}")

    def _record(self, shape: RecordShape, side: Side) -> Schema:
        """A reference to the component that the record is on this side."""
        fields = tuple((field.wire_name, str(field.shape), field.is_required) for field in shape.fields)
        key = (shape.name, shape.struct_type, fields, side)  # a generic struct is another one for each of its types
        name = self._name_by_record.get(key)
        if name is None:
            taken = _FIXED_SCHEMAS | self.schema_by_name
            name = _unique(f"{shape.name}Input" if side == "in" else shape.name, taken.__contains__)
            self._name_by_record[key] = name
            self.schema_by_name[name] = {}  # a record inside itself refers to it
            has_all = side == "out" and shape.struct_type is not None
            schema = self._object(shape.fields, side, has_all=has_all)
            if shape.tag_field is not None:
                schema["properties"][shape.tag_field] = {"const": shape.tag}
                schema["required"] = [shape.tag_field, *schema.get("required", [])]
            self.schema_by_name[name] = schema
        return _reference(name)

    def _object(self, fields: Iterable[RecordField], side: Side, *, has_all: bool = False) -> Schema:
        schema: Schema = {
            "type": "object",
            "properties": {field.wire_name: self.schema(field.shape, side) for field in fields},
        }
        required = [field.wire_name for field in fields if field.is_required or has_all]
        return schema | {"required": required} if required else schema


_TYPE_BY_SHAPE: dict[type[Shape], str] = {Null: "null", Bool: "boolean", Int: "integer", Float: "number"}


def _int64(side: Side) -> Schema:
    match side:
        case "in":
            return {"anyOf": [{"type": "integer"}, _reference("Int64")]}
        case "text":
            return {"type": "integer", "format": "int64"}
        case "out":
            return {"type": "string", "pattern": "^-?[0-9]+$"}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _unique(name: str, is_taken: Callable[[str], bool]) -> str:
    """The name, or with a number behind it if it is taken."""
    candidate, number = name, 1
    while is_taken(candidate):
        number += 1
        candidate = f"{name}_{number}"
    return candidate
