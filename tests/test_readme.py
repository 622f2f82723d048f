"""The README says what a client can meet."""

import re
from collections.abc import Iterator
from pathlib import Path

from engine.errors import RequestError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def codes_of(error: type[RequestError]) -> Iterator[str]:
    for kind in error.__subclasses__():
        yield kind.code
        yield from codes_of(kind)


def test_every_error_that_a_request_can_meet_is_in_the_readme() -> None:
    assert [code for code in codes_of(RequestError) if f"`{code}`" not in README] == []


def test_every_refusal_of_the_demo_app_is_in_the_readme() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "functions").glob("*.py")]
    codes = {code for source in sources for code in re.findall(r'"code": "([A-Z_]+)"', source)}
    assert len(codes) > 5
    assert sorted(code for code in codes if f"`{code}`" not in README) == []
