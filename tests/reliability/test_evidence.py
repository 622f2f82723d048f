"""`RELIABILITY.md` names commands that there are."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_every_test_that_is_named_is_there() -> None:
    text = (REPOSITORY / "RELIABILITY.md").read_text()
    paths = set(re.findall(r"tests/[\w/]+\.py", text))
    assert len(paths) >= 10
    assert [path for path in sorted(paths) if not (REPOSITORY / path).exists()] == []


def test_every_link_leads_somewhere() -> None:
    text = (REPOSITORY / "RELIABILITY.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_every_command_that_make_has_is_there() -> None:
    text, makefile = ((REPOSITORY / name).read_text() for name in ("RELIABILITY.md", "Makefile"))
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
