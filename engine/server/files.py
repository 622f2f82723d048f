"""The door for files: `POST /api/storage/upload?token=…` and `GET /api/storage/KEY`, as the Convex clients use them.

Invariants
  1. Who asks does not count, only the address: `functions/storage.py` made it, a function gave it away.
  2. What is served is what was uploaded, and never a page of this origin: nosniff, and anything that a browser could
     run is a download.
  3. A file never changes, so its digest is its ETag, and it may be kept for long by whoever got it.
"""

import asyncio
import logging
import re
from base64 import b64decode, b64encode
from typing import Final, Protocol

from aiohttp import web

from engine.errors import DocumentNotFound, InvalidArgument, LimitExceeded, Overloaded
from engine.functions.files import Files
from engine.functions.storage import StoredFile
from engine.limits import Limits
from engine.server.http import BROKEN_BODY
from engine.server.origins import Origins

_log = logging.getLogger("engine.server")

_KEPT_SECONDS: Final = 30 * 86_400
# no comma: a browser takes the last of several types, and `image/png;x,text/html` is a page
_SHOWN_TYPE: Final = re.compile(r"((image|audio|video)/(?!.*xml)[^;,]+|text/plain|application/pdf)[\t ]*(;[^,]*)?")
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_READABLE_HEADERS: Final = "Accept-Ranges, Content-Disposition, Content-Length, Content-Range, Digest, ETag"


class FileBackend(Protocol):
    """What it asks of the engine."""

    @property
    def files(self) -> Files: ...


class FileDoor:
    """The handlers under `/api/storage/`."""

    def __init__(self, backend: FileBackend, limits: Limits, origins: Origins) -> None:
        self._backend, self._limits, self._origins = backend, limits, origins

    async def upload(self, request: web.Request) -> web.Response:
        """Keep the body as a file; the answer has its id."""
        files = self._backend.files
        files.check_upload(request.query.get("token", ""))  # 1
        content_type, sha256 = request.headers.get("Content-Type"), _sha256_of(request)
        try:
            files.check_size(request.content_length or 0)
            storage_id = await files.store(request.content.iter_any(), content_type, sha256=sha256)
        except LimitExceeded as error:
            raise web.HTTPRequestEntityTooLarge(0, 0, text=str(error)) from error
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(text="The file took too long to arrive.") from error
        except BROKEN_BODY as error:
            raise web.HTTPBadRequest(text="The file did not arrive whole, or is not encoded as it says.") from error
        return web.json_response({"storageId": storage_id})

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """The file, the part of it that is asked for, or that the asker has it already."""
        file = self._backend.files.named_by(request.match_info["key"])
        if file is None:
            raise _gone()
        response = web.StreamResponse(headers=_headers_of(file))
        self._origins.mark(request, response.headers)
        start, end = 0, file.size
        if _knows(request, file):
            response.set_status(304)
            end = 0
        elif request.method == "GET" and (part := _range_of(request, file)) is not None:
            start, end = part
            is_there = start < end
            response.set_status(206 if is_there else 416)
            response.headers["Content-Range"] = f"bytes {f'{start}-{end - 1}' if is_there else '*'}/{file.size}"
        if response.status == 200:
            response.headers["Digest"] = f"sha-256={b64encode(bytes.fromhex(file.sha256)).decode()}"
        if response.status != 304:
            response.content_length = end - start
        if request.method == "GET":
            await self._send(request, response, file, start, end)
        else:
            await response.prepare(request)
        return response

    async def _send(
        self, request: web.Request, response: web.StreamResponse, file: StoredFile, start: int, end: int
    ) -> None:
        try:
            async with self._backend.files.opened(file, start, end) as chunks:
                await response.prepare(request)
                async for chunk in chunks:
                    async with asyncio.timeout(self._limits.send_stuck_seconds_max):
                        await response.write(chunk)
                await response.write_eof()
        except DocumentNotFound as error:  # before anything was sent
            raise _gone() from error
        except (TimeoutError, ConnectionError):  # nobody reads it any more
            _abort(request)
        except (Overloaded, OSError):
            if not response.prepared:
                raise
            _log.exception("file %s was sent in part only", file.id)
            _abort(request)  # an error message would be taken for a part of the file


def _abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _gone() -> web.HTTPNotFound:
    return web.HTTPNotFound(text="There is no such file, or not any more.")


def _sha256_of(request: web.Request) -> str | None:
    """What the sender says the file's digest is, hexadecimal."""
    written = request.headers.get("Digest")
    if written is None:
        return None
    algorithm, _, digest = written.partition("=")
    try:
        decoded = b64decode(digest, validate=True)
    except ValueError:
        decoded = b""
    if algorithm.lower() != "sha-256" or len(decoded) != 32:
        raise InvalidArgument(f"Digest: expected sha-256=<base64 of 32 bytes>, got {written[:80]!r}.")
    return decoded.hex()


def _headers_of(file: StoredFile) -> dict[str, str]:
    content_type = file.content_type or "application/octet-stream"
    return {
        "Content-Type": content_type,
        "Content-Disposition": "inline" if _SHOWN_TYPE.fullmatch(content_type.lower()) else "attachment",  # 2
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",  # 1: what a document links to is not told the document's address
        "Cache-Control": f"private, max-age={_KEPT_SECONDS}, immutable",  # 3
        "ETag": f'"{file.sha256}"',
        "Accept-Ranges": "bytes",
        "Access-Control-Expose-Headers": _READABLE_HEADERS,
    }


def _knows(request: web.Request, file: StoredFile) -> bool:
    """Whether the asker has this file already (RFC 9110, 13.1.2: weak comparison)."""
    written = request.headers.get("If-None-Match", "")
    tags = [tag.strip().removeprefix("W/") for tag in written.split(",")]
    return f'"{file.sha256}"' in tags or tags == ["*"]


def _range_of(request: web.Request, file: StoredFile) -> tuple[int, int] | None:
    """The one part that is asked for, `start <= i < end`; empty: the file has nothing there; None: all is asked for.

    What is no range, or several, may be ignored (RFC 9110, 14.2).
    """
    found = _RANGE.fullmatch(request.headers.get("Range", ""))
    if found is None or request.headers.get("If-Range", f'"{file.sha256}"') != f'"{file.sha256}"':
        return None
    first, last = found.groups()
    if first:
        start, end = int(first), int(last) + 1 if last else file.size
        if last and end <= start:
            return None  # not a range
    elif last:
        start, end = max(0, file.size - int(last)), file.size
    else:
        return None
    end = min(end, file.size)
    return (start, end) if start < end else (0, 0)
