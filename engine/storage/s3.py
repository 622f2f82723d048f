"""Files in a bucket that speaks the S3 protocol: Amazon's own, or a compatible one.

    [storage]
    bucket = "live-files"
    endpoint = "https://s3.provider.example"        # none: Amazon
    region = "eu-central-1"
    prefix = "live/"                                # of every key

The keys are found as every tool of Amazon's finds them: the variables `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`,
a profile, or the role of the machine.

The client is botocore: Amazon's own, released with every change of the protocol, and what all compatible providers test
against. It blocks, as every `FileStore` may; one client serves all threads.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.errors import ConfigError, Overloaded
from engine.storage.files import OpenedFile

_log = logging.getLogger("engine.storage")

_CONNECT_SECONDS_MAX = 5
_READ_SECONDS_MAX = 30
_CONNECTION_COUNT_MAX = 64  # kept open; more are opened when needed
_ATTEMPT_COUNT_MAX = 3
_MISSING_CODES = ("NoSuchKey", "404")


class S3Location(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[storage]` in `engine.toml`."""

    bucket: str
    endpoint: str | None = None
    region: str | None = None
    prefix: str = ""
    addressing: Literal["auto", "path", "virtual"] = "auto"  # bucket in the path or in the host name


class S3FileStore:
    """Files as objects under a prefix. Databases may share one: no two files ever get one name."""

    def __init__(self, location: S3Location) -> None:
        try:
            session: Any = importlib.import_module("botocore.session")
            config: Any = importlib.import_module("botocore.config")
            self._errors: Any = importlib.import_module("botocore.exceptions")
        except ImportError as cause:
            raise ConfigError("[storage] needs the S3 client: pip install 'reactive-engine[s3]'.") from cause
        self._location = location
        try:
            self._client = session.get_session().create_client(
                "s3",
                endpoint_url=location.endpoint,
                region_name=location.region,
                config=config.Config(
                    connect_timeout=_CONNECT_SECONDS_MAX,
                    read_timeout=_READ_SECONDS_MAX,
                    max_pool_connections=_CONNECTION_COUNT_MAX,
                    retries={"mode": "standard", "total_max_attempts": _ATTEMPT_COUNT_MAX},
                    s3={"addressing_style": location.addressing},
                    # other providers do not know the checksums that Amazon's adds by default
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except (ValueError, self._errors.BotoCoreError) as cause:  # an endpoint that is no address, no region
            raise ConfigError(f"[storage]: {cause}") from cause

    def put(self, name: str, source: Path) -> None:
        with self._unreachable_told(), source.open("rb") as file:
            self._client.put_object(**self._object(name), Body=file)

    def open(self, name: str, start: int, end: int) -> OpenedFile | None:
        with self._unreachable_told():
            try:
                answer = self._client.get_object(**self._object(name), Range=f"bytes={start}-{end - 1}")
            except self._errors.ClientError as error:
                if error.response["Error"]["Code"] in _MISSING_CODES:
                    return None
                raise
        return _S3File(self, answer["Body"])

    def delete(self, name: str) -> None:
        with self._unreachable_told():
            self._client.delete_object(**self._object(name))

    def close(self) -> None:
        self._client.close()

    def _object(self, name: str) -> dict[str, str]:
        return {"Bucket": self._location.bucket, "Key": self._location.prefix + name}

    @contextmanager
    def _unreachable_told(self) -> Iterator[None]:
        try:
            yield
        except (self._errors.BotoCoreError, self._errors.ClientError) as cause:
            _log.warning("the bucket %s: %s", self._location.bucket, cause)  # a wrong key is the operator's to see
            raise Overloaded("The file storage does not answer as it should. Try again.") from cause


class _S3File:
    """A part of an object that is being received."""

    def __init__(self, store: S3FileStore, body: Any) -> None:
        self._store, self._body = store, body

    def read(self, size_bytes: int, /) -> bytes:
        with self._store._unreachable_told():
            return bytes(self._body.read(size_bytes))

    def close(self) -> None:
        self._body.close()
