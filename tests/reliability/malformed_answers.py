"""One malformed input over a socket, and whether its answer is one of those that are allowed."""

import asyncio
import json
import zlib
from contextlib import suppress
from typing import Any

from engine.server import frames
from tests.reliability.malformed import CLOSE, COMPRESSED, FINAL, PING, Attack, frame

HANDSHAKE = (
    b"GET /api/sync HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n%b\r\n"
)
EXTENSION = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
LAST_PING = frame(b"last", first=FINAL | PING)
CLOSES_OF_THE_DOOR = {1002, 1003, 1007, 1009, 1013}
DECLARED_STATUSES = {503}  # of those from 500 on

SILENT_SECONDS = 0.1  # a server that says nothing for so long waits for more


class Fault(Exception):
    """What an answer should not have been."""


def frames_of(heard: bytes) -> list[tuple[int, bytes]]:
    """The frames of a server, unmasked and whole, by their opcodes."""
    found, position = [], 0
    while position < len(heard):
        first, size = heard[position : position + 2]
        position += 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size = int.from_bytes(heard[position : position + width])
            position += width
        if position + size > len(heard):
            raise Fault(f"half a frame at the end: {heard[-80:]!r}")
        payload = heard[position : position + size]
        if first & COMPRESSED:
            payload = zlib.decompressobj(-zlib.MAX_WBITS).decompress(payload + b"\0\0\xff\xff")
        found.append((first & 0x0F, payload))
        position += size
    return found


def judge_frames(heard: bytes, attack: Attack) -> str:
    """How it ended. One end, told once, and nothing after it."""
    texts: list[dict[str, Any]] = []
    ends: list[str] = []
    codes: list[int] = []
    for opcode, payload in frames_of(heard):
        if codes:
            raise Fault("something after the close frame")
        match opcode:
            case frames.TEXT:
                texts.append(json.loads(payload))
            case frames.PONG:
                ends += ["pong"] if payload == b"last" else []
            case frames.CLOSE:
                codes.append(int.from_bytes(payload[:2]) if payload else 1005)
            case frames.PING:
                pass
            case _:
                raise Fault(f"a frame of kind {opcode}")
    kinds = [text["type"] for text in texts]
    if any(kind in ("FatalError", "AuthError") for kind in kinds[:-1]):
        raise Fault(f"something after the end: {kinds}")
    if kinds and kinds[-1] in ("FatalError", "AuthError"):
        ends.append(kinds[-1])
    if not codes:
        raise Fault(f"no close frame, after {kinds} {ends}")
    code = codes[0]
    if code in CLOSES_OF_THE_DOOR:
        ends.append(str(code))
    elif code == 1011 and not attack.may_be_ahead:
        raise Fault("1011 for what a client sent")
    if len([end for end in ends if end != "pong"]) > 1:
        raise Fault(f"it was told more than once: {ends}")
    return ends[-1] if ends else f"closed {code}"


async def attack_socket(port: int, attack: Attack) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(HANDSHAKE % (EXTENSION if attack.is_deflated else b""))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise Fault(f"no handshake: {head[:100]!r}")
        writer.write(attack.data + LAST_PING)
        if attack.is_polite:
            heard = await politely(reader, writer)
        else:
            writer.write_eof()
            heard = await reader.read(-1)
        return judge_frames(heard, attack)
    finally:
        writer.close()


async def politely(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Wait for the pong or the close frame, answer it with a close frame, and read to the end."""
    heard = b""
    while True:
        data = await reader.read(1 << 16)
        if not data:
            return heard
        heard += data
        with suppress(Fault, IndexError):
            if any(opcode == CLOSE or payload == b"last" for opcode, payload in frames_of(heard)):
                break
    writer.write(frame((1000).to_bytes(2), first=FINAL | CLOSE))
    return heard + await reader.read(-1)


async def answer_or_silence(reader: asyncio.StreamReader) -> bytes:
    """What comes before the server ends it, or waits for more."""
    heard = b""
    with suppress(TimeoutError):
        while data := await asyncio.wait_for(reader.read(1 << 16), SILENT_SECONDS):
            heard += data
    return heard


async def attack_http(port: int, request: bytes) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        writer.write(request)
        heard = await answer_or_silence(reader)
        writer.write_eof()  # what it may still wait for does not come
        heard += await reader.read(-1)
    except ConnectionResetError:  # it was closed with a part of the request unread
        heard = b""
    finally:
        writer.close()
    if not heard:
        return "closed"
    line = heard.partition(b"\r\n")[0].split(b" ")
    if len(line) < 3 or not line[0].startswith(b"HTTP/") or not line[1].isdigit():
        raise Fault(f"not an answer: {heard[:100]!r}")
    status = int(line[1])
    if status >= 500 and status not in DECLARED_STATUSES:
        raise Fault(f"status {status}: {heard[-300:]!r}")
    if b"Traceback" in heard or b"X-Injected" in heard:
        raise Fault(f"too much was said: {heard[-300:]!r}")
    return str(status)
