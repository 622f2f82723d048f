"""What no honest client sends, made from a seed: whole connections, requests, and texts for what reads texts.

Each input is made from what is right by a step that may make it wrong. What it turned out to be is not known: whoever
sends it judges the answer by what is allowed at all.
"""

import json
import random
import re
import struct
import uuid
import zlib
from base64 import b64encode
from typing import Any

import msgspec

FINAL, TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 0x80, 1, 2, 0, 8, 9, 10
LONE = "\ud800"
_OBSERVED = re.compile(rb'maxObservedTimestamp": *("?[^",}]*"?)')
_NOTHING_OBSERVED = b'"AAAAAAAAAAA="'
COMPRESSED = 0x40
MESSAGE_SIZE_MAX = 8 << 20  # of the server that is attacked: unfolding 1 MiB takes 1.3 ms

Message = dict[str, Any]


class Attack(msgspec.Struct, frozen=True):
    """The bytes that follow a good handshake."""

    data: bytes
    is_whole: bool = True  # it ends where a frame ends, so that a ping behind it is a ping
    is_polite: bool = False  # the client answers a close frame, instead of ending the stream at once
    is_deflated: bool = False  # the handshake offers permessage-deflate
    may_be_ahead: bool = False  # it may say that it has seen a later state than there is: that is told with 1011


class Maker:
    """Inputs, one after another, the same ones for the same seed."""

    def __init__(self, seed: str, good_token: str) -> None:
        self.random = random.Random(seed)
        self._good_token = good_token

    # -- sockets

    def attack(self) -> Attack:
        choices = self.random
        make = choices.choices([self._grammar, self._json, self._frames, self._deflated], [5, 2, 3, 1])[0]
        attack = make()
        return msgspec.structs.replace(attack, is_polite=attack.is_whole and choices.random() < 0.3)

    def _grammar(self) -> Attack:
        """A burst of the protocol, with something wrong in it."""
        messages = self._honest()
        for _ in range(self.random.choice([1, 1, 1, 2, 4])):
            self._spoil(messages)
        return self._said(*map(dumps, messages))

    def _said(self, *texts: bytes) -> Attack:
        observed = [value for text in texts for value in _OBSERVED.findall(text)]
        frames = b"".join(map(self._frame, texts))
        return Attack(frames, may_be_ahead=any(value != _NOTHING_OBSERVED for value in observed))

    def _honest(self) -> list[Message]:
        choices = self.random
        connect: Message = {
            "type": "Connect", "sessionId": str(uuid.UUID(int=choices.getrandbits(128))), "connectionCount": 0,
            "lastCloseReason": "InitialConnect", "clientTs": 0, "maxObservedTimestamp": "AAAAAAAAAAA=",
        }  # fmt: skip
        adds = [
            {"type": "Add", "queryId": n, "udfPath": "m:by_key", "args": [{"key": f"k{n}"}], "journal": None}
            for n in range(choices.randint(0, 3))
        ]
        return [
            connect,
            {"type": "Authenticate", "baseVersion": 0, "tokenType": "User", "value": self._good_token},
            {"type": "ModifyQuerySet", "baseVersion": 0, "newVersion": 1, "modifications": adds},
            {"type": "Mutation", "requestId": 0, "udfPath": "m:add", "args": [{"key": "k0"}]},
            {"type": "Action", "requestId": 1, "udfPath": "m:act", "args": [{}]},
            {"type": "Event", "eventType": "ClientConnect", "event": []},
        ][: choices.randint(1, 6)]

    def _spoil(self, messages: list[Message]) -> None:
        choices = self.random
        message = choices.choice(messages)
        holders = list(_holders(message))
        holder = choices.choice(holders)
        key = choices.choice(list(holder) or ["x"]) if isinstance(holder, dict) else choices.randrange(len(holder) or 1)
        match choices.randrange(7):
            case 0 if isinstance(holder, dict):
                holder.pop(key, None)
            case 1:
                messages.insert(choices.randint(0, len(messages)), choices.choice(messages))  # again, or out of order
            case 2:
                choices.shuffle(messages)
            case 3 if isinstance(holder, dict):
                holder[choices.choice(["type", "queryId", "extra", "", "$integer", LONE])] = self._anything()
            case 4 if isinstance(holder, list):
                holder.append(self._anything())
            case _ if isinstance(holder, dict):
                holder[key] = self._anything()

    def _anything(self, depth: int = 0) -> Any:
        choices = self.random
        simple: list[Any] = [
            None, True, 0, -1, 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 1.5, -0.0, 1e308, "", "x", "\0",
            LONE, "é" * 40, "../x", "m:by_key", "m:by_key.js", "m:secret", ":", "AAAAAAAAAAA=", "////////fw==", "=",
            "x" * 2_000, "AAAAAAAAAA==", "Add", "Remove", "Connect", "Admin", [], {}, [[]], {"type": "Add"}, [{}, {}],
            {"$integer": "AAAAAAAAAAA="}, {"$integer": "x"}, {"$float": "AAAAAAAA+H8="}, {"$bytes": "!"}, {"$x": 1},
            {"$integer": "AA==", "y": 1}, {"$float": 1}, float("nan"), float("inf"),
        ]  # fmt: skip
        if depth < 3 and choices.random() < 0.15:
            return {
                choices.choice(["a", "$a", "_a", "é", ""]): self._anything(depth + 1),
                "k": [self._anything(depth + 1)],
            }
        return choices.choice(simple)

    def json_text(self) -> bytes:
        """Text that is nearly JSON, or JSON that is too much of it."""
        choices = self.random
        good = dumps(choices.choice(self._honest()))
        match choices.randrange(12):
            case 0:
                return good[: choices.randrange(len(good))]
            case 1:
                return good + choices.choice([b"x", b"{}", b"\0", b",", b"]", b"\n\n "])
            case 2:
                place = choices.randrange(len(good))
                return good[:place] + bytes([choices.randrange(256)]) + good[place + 1 :]
            case 3:
                depth = choices.choice([1, 64, 65, 900, 1_100, 10_000])
                return b'{"type":"Event","event":' + b"[" * depth + b"]" * choices.choice([depth, 0]) + b"}"
            case 4:
                digits = b"9" * choices.choice([19, 20, 309, 4_400, 20_000])
                return b'{"type":"Mutation","requestId":%b,"udfPath":"m:add","args":[{"key":%b}]}' % (digits, digits)
            case 5:
                return good[:-1] + b"," + good[1:]  # each key twice
            case 6:
                number = choices.choice([b"NaN", b"-Infinity", b"1e999", b"01", b"+1", b"0x1", b"1.", b".5", b"--1"])
                return b'{"type":"Event","event":%b}' % number
            case 7:
                escape = choices.choice(
                    [rb"\ud800", rb"\udc00\ud800", rb"\u12", rb"\x41", rb"\u0000", rb"\ud83d\ude00"]
                )
                return b'{"type":"Mutation","requestId":0,"udfPath":"m:add","args":[{"key":"%b"}]}' % escape
            case 8:
                return b'{"type":"Event","event":[' + b"[]," * choices.choice([10, 3_000, 60_000]) + b"[]]}"
            case 9:
                pairs = b",".join(b'"k%d":%d' % (n, n) for n in range(choices.choice([1, 1_025, 20_000])))
                return b'{"type":"Mutation","requestId":0,"udfPath":"m:any","args":[{"value":{%b}}]}' % pairs
            case 10:
                return choices.choice(
                    [b"", b"null", b"[]", b'""', b"0", b"\xef\xbb\xbf" + good, b"  " + good + b"  ", b"\0"]
                )
            case _:
                return choices.randbytes(choices.randrange(60)).replace(b"\xff", b"{")

    def _json(self) -> Attack:
        connect = dumps(self._honest()[0])
        texts = [connect, self.json_text()] if self.random.random() < 0.8 else [self.json_text()]
        return self._said(*texts)

    def _frames(self) -> Attack:
        """Bytes that are nearly frames."""
        choices = self.random
        connect = dumps(self._honest()[0])
        good = self._frame(connect)
        match choices.randrange(12):
            case 0:
                return Attack(good + self._frame(b"x", first=choices.randrange(256)))
            case 1:
                return Attack(
                    good
                    + self._frame(choices.randbytes(choices.randrange(130)), first=FINAL | choices.choice([8, 9, 10]))
                )
            case 2:
                size = choices.choice([2**16, 2**25 + 1, 2**31, 2**63, 2**64 - 1])
                return Attack(
                    good + bytes((FINAL | TEXT, 0x80 | 127)) + struct.pack("!Q", size) + b"abcd", is_whole=False
                )
            case 3:
                return Attack(good[: choices.randrange(len(good))], is_whole=False)
            case 4:
                flood = self._frame(b"", first=CONTINUATION) * choices.choice([1, 100, 2_000])
                return Attack(self._frame(connect, first=TEXT) + flood + self._frame(b"", first=FINAL | CONTINUATION))
            case 5:
                place = choices.randrange(len(connect))
                control = self._frame(
                    b"", first=choices.choice([FINAL | PING, FINAL | PONG, FINAL | TEXT, FINAL | BINARY])
                )
                pieces = (
                    self._frame(connect[:place], first=TEXT),
                    self._frame(connect[place:], first=FINAL | CONTINUATION),
                )
                return Attack(pieces[0] + control + pieces[1])
            case 6:
                code = choices.choice(
                    [0, 999, 1000, 1001, 1004, 1005, 1006, 1011, 1015, 2999, 3000, 4999, 5000, 65_535]
                )
                reason = choices.choice([b"", b"bye", b"\xff", b"x" * 123, b"x" * 124, "é".encode()[:1]])
                payload = choices.choice([struct.pack("!H", code) + reason, b"", b"\x03"])
                return Attack(good + self._frame(payload, first=FINAL | CLOSE), is_whole=False)  # it ended it itself
            case 7:
                return Attack(good + bytes((FINAL | TEXT, 4)) + b"abcd", is_whole=False)  # no mask
            case 8:
                spoiled = bytearray(good + self._frame(b"{}") * 3)
                for _ in range(choices.choice([1, 2, 8])):
                    spoiled[choices.randrange(len(spoiled))] ^= 1 << choices.randrange(8)
                return Attack(bytes(spoiled), is_whole=False, may_be_ahead=True)
            case 9:
                return Attack(choices.randbytes(choices.randrange(1, 400)), is_whole=False)
            case 10:
                text = choices.choice(
                    [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3", b"x" * 200 + b"\x80"]
                )
                return Attack(good + self._frame(text))
            case _:
                size = choices.choice([65_537, 66_000])  # past what is taken before Connect
                return Attack(self._frame(b'{"type":"Event","x":"' + b"y" * size + b'"}'))

    def _deflated(self) -> Attack:
        """Compressed messages, well and badly."""
        choices = self.random
        first = FINAL | COMPRESSED | TEXT
        connect = self._frame(deflated(dumps(self._honest()[0])), first=first)
        match choices.randrange(7):
            case 0:
                last = self._frame(choices.randbytes(choices.randrange(200)), first=first)
            case 1:
                whole = deflated(self.json_text())
                last = self._frame(whole[: choices.randrange(len(whole) + 1)], first=first)
            case 2:
                last = self._frame(_BOMB, first=first)
            case 3:
                connect, last = (
                    b"",
                    self._frame(deflated(b" " * (65 << 10)), first=first),
                )  # past what may be before Connect
            case 4:
                last = self._frame(
                    deflated(b"{}"), first=choices.choice([FINAL | COMPRESSED | PING, COMPRESSED, 0x70 | TEXT])
                )
            case 5:
                whole = deflated(self.json_text())
                last = self._frame(whole[:9], first=COMPRESSED | TEXT) + self._frame(
                    whole[9:], first=choices.choice([FINAL, FINAL | COMPRESSED]) | CONTINUATION
                )
            case _:
                last = self._frame(deflated(self.json_text()), first=first)
        return Attack(connect + last, is_deflated=True, may_be_ahead=True)

    def _frame(self, payload: bytes, *, first: int = FINAL | TEXT) -> bytes:
        return frame(payload, first=first, key=self.random.randbytes(4))

    # -- HTTP

    def request(self) -> bytes:
        """One request, as bytes; after it the stream ends."""
        choices = self.random
        method = choices.choice(
            ["GET", "POST", "POST", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "FOO", "get", ""]
        )
        target = choices.choice(TARGETS)
        if choices.random() < 0.15:
            target += choices.choice(
                ["%", "%zz", "?" + "a=" * 50, "?path=%ff", "#x", " ", "\0", "é", "%00", "//", "/.." * 9]
            )
        body = self._body()
        headers = {"Host": "127.0.0.1", "Content-Length": str(len(body)), "Connection": "close"}
        for _ in range(choices.choice([0, 1, 1, 2, 3])):
            name, values = choices.choice(HEADERS)
            headers[name] = choices.choice(values)
        version = choices.choices(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "HTTQ/1.1", ""], [30, 3, 1, 1, 1, 1])[
            0
        ]
        head = f"{method} {target} {version}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        raw = head.encode(errors="surrogatepass") + b"\r\n" + body
        match choices.randrange(25):
            case 0:
                return raw[: choices.randrange(1, len(raw))]
            case 1:
                place = choices.randrange(len(raw))
                return raw[:place] + choices.randbytes(1) + raw[place + 1 :]
            case 2:
                return raw.replace(b"\r\n", choices.choice([b"\n", b"\r", b"\r\n ", b"\r\n\r\n"]), 1)
            case _:
                return raw

    def _body(self) -> bytes:
        choices = self.random
        ask: Message = {
            "path": choices.choice(["m:by_key", "m:add", "m:act", "m:any", "m:page", "m:secret", "no:such"]),
            "args": {"key": "k0"}, "format": "json",
        }  # fmt: skip
        match choices.randrange(6):
            case 0:
                return self.json_text()
            case 1:
                return dumps({"queries": [ask, self._anything()]})
            case 2:
                return dumps(self._anything())
            case 3:
                ask["args"] = choices.choice([[ask["args"]], {"key": self._anything()}, self._anything()])
                return dumps(ask)
            case 4:
                ask[choices.choice(["path", "args", "format", "ts", "componentPath", "x"])] = self._anything()
                return dumps(ask)
            case _:
                return dumps(ask)

    # -- texts for what reads texts

    def token(self) -> str:
        """Nearly a credential."""
        choices = self.random
        header = {"alg": choices.choice(["HS256", "none", "RS256", "", 5, None]), "kid": self._anything(), "typ": "JWT"}
        claims = {"iss": "https://login.test", "aud": "app", "sub": "a", "exp": self._anything(), "x": self._anything()}
        match choices.randrange(5):
            case 0:
                return ".".join(encoded(part) for part in (dumps(header), dumps(claims), choices.randbytes(32)))
            case 1:
                place = choices.randrange(len(self._good_token))
                return (
                    self._good_token[:place]
                    + chr(choices.choice([0, 46, 65, 95, 255, 0xD800]))
                    + self._good_token[place + 1 :]
                )
            case 2:
                return self._good_token[: choices.randrange(len(self._good_token))] + "." * choices.randrange(3)
            case 3:
                return ".".join(encoded(self.json_text()[:3_000]) for _ in range(choices.randint(1, 4)))
            case _:
                return str(self._anything())

    def cursor(self, good: str) -> str:
        """Nearly a cursor."""
        choices = self.random
        match choices.randrange(4):
            case 0:
                place = choices.randrange(len(good))
                return good[:place] + choices.choice("Aa_-=é\0~\ud800") + good[place + 1 :]
            case 1:
                return good[: choices.randrange(len(good))]
            case 2:
                return encoded(choices.randbytes(choices.randrange(80)))
            case _:
                return str(self._anything())


TARGETS = """
    /api/query /api/mutation /api/action /api/query_ts /api/query_at_ts /api/query_batch /api/function /api/explain
    /api/profile /api/run/m/by_key /api/run/%2e%2e/x /api/storage/upload /api/storage/upload?token=1-x /api/storage/a-d
    /api/debug_event /api/sync /api/1.48.0/sync //api/query /openapi.json / /version /items/k0 /items/%ff /items
    /nowhere /api/query?path=m:by_key&args=%7B%22key%22%3A%22k0%22%7D /api/query?path=m:by_key&args=[ * /\ud800
    http://127.0.0.1/api/query api/query
""".split()
HEADERS: list[tuple[str, list[str]]] = [
    ("Content-Length", ["0", "-1", "1e3", "99999999999999999999", "5", "2, 2", "", "17825793"]),
    ("Transfer-Encoding", ["chunked", "gzip, chunked", "chunked, chunked", "xchunked", "identity", "\x0bchunked"]),
    ("Content-Encoding", ["gzip", "deflate", "br", "zstd", "x", "gzip, gzip"]),
    ("Content-Type", ["text/plain", "application/json; charset=utf-16", "multipart/form-data; boundary=x", "x" * 300]),
    ("Authorization", ["Bearer x", "Convex x", "Convex a|b:e30=", "Basic eDp5", "Bearer", "Bearer a.b.c", "x" * 9_000]),
    ("Origin", ["null", "https://x", "", "\xff", "https://" + "x" * 5_000]),
    ("Expect", ["100-continue", "200-ok"]),
    ("Upgrade", ["websocket", "h2c", ""]),
    ("Connection", ["Upgrade", "keep-alive, Upgrade", "close", "x"]),
    ("Sec-WebSocket-Key", ["x", "AAAAAAAAAAAAAAAAAAAAAA==", ""]),
    ("Sec-WebSocket-Version", ["13", "0", "x"]),
    ("Sec-WebSocket-Extensions", [";;;", "permessage-deflate; x=" + "y" * 500, "permessage-deflate; x=9"]),
    ("Range", ["bytes=0-", "bytes=9-1", "bytes=-", "bytes=" + "0-1," * 500, "x"]),
    ("If-None-Match", ["*", '"x"', 'W/"' + "y" * 900 + '"']),
    ("Digest", ["sha-256=x", "md5=AA==", ""]),
    ("Host", ["", "a b", "x" * 5_000, "127.0.0.1:99999", "[::1"]),
    ("X-Forwarded-For", ["1.2.3.4", "x" * 3_000, "::1, 1.1.1.1, \x01"]),
    ("Access-Control-Request-Method", ["POST", "", "x" * 500]),
    ("Cookie", ["a=b", "x" * 9_000, "=;=;=", '"']),
    ("X-Long", ["y" * 18_000]),
    ("Bad Name", ["x"]),
    ("X-Split", ["a\r\nX-Injected: 1", "a\rb", "a\nb", "a\0b"]),
]  # fmt: skip


def frame(payload: bytes, *, first: int = FINAL | TEXT, key: bytes = b"\0\0\0\0") -> bytes:
    size = len(payload)
    second, length = (
        (size, b"") if size < 126 else (126, size.to_bytes(2)) if size < 1 << 16 else (127, size.to_bytes(8))
    )
    stream = key * (size // 4 + 1)
    masked = (int.from_bytes(payload) ^ int.from_bytes(stream[:size])).to_bytes(size) if size else b""
    return bytes((first, 0x80 | second)) + length + key + masked


def deflated(text: bytes) -> bytes:
    """As permessage-deflate has it: without the four bytes that end each block."""
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return (deflater.compress(text) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def encoded(part: bytes) -> str:
    return b64encode(part, b"-_").rstrip(b"=").decode()


_BOMB = deflated(b" " * (MESSAGE_SIZE_MAX + 1))


def _holders(value: Any) -> list[Any]:
    """The objects and lists within a message, itself first."""
    found: list[Any] = [value]
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            found += _holders(inner)
    return found
