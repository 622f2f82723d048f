"""The words of a text, and how well a text answers a search. Pure.

    "Gól, ЁЛКА!"  → "gol", "елка"    no accents, no capitals, no punctuation
    "don't_do 2"  → "don", "t", "do", "2"    a word is a run of letters, digits and the marks that belong to them
    "東京都"       → "東", "京", "都", "東京", "京都"    of scripts without spaces: characters, and pairs of neighbours
    "👍🏽👏"         → "👍", "👏"    a symbol is a word of its own

Invariants
  1. A text matches iff each of `Terms.words` is one of its words and one of its words begins with `Terms.prefix`.
  2. Texts that Unicode calls equivalent have the same words, and so have those that differ in case only (but for the
     small iota under Greek vowels, a letter of its own in capitals).
  3. A word is 1 to WORD_LENGTH_MAX characters: a-z, 0-9, and characters outside ASCII that are no spaces.
  4. Time is linear in the text, whatever is in it.
"""

import re
import unicodedata
from functools import cache
from itertools import chain
from typing import NamedTuple

import msgspec

WORD_LENGTH_MAX = 64  # a longer run counts as its beginning: no word of a language, and an index entry for each prefix
WORDS_VERSION = f"1, Unicode {unicodedata.unidata_version}"  # texts split by another one are split again

_ASCII_WORDS = re.compile("[a-z0-9]+")
# Han, kana, Thai, Lao, Myanmar, Khmer: letters and marks, no digits
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u1000-\u103f\u1050-\u108f\u1780-\u17d3\u3005-\u3007\u3041-\u309a"
    "\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_APOSTROPHES = "\u02b0-\u02ff"  # and other modifiers: o'zbek is often spelt with one, and letters they are not
_MARK_RUN_LENGTH_MAX = 8  # after one letter; unicodedata sorts such a run in quadratic time

_SATURATION, _LENGTH_WEIGHT, _LENGTH_TYPICAL = 1.2, 0.75, 16  # of BM25; the typical length is fixed: see `relevance`


class Terms(msgspec.Struct, frozen=True):
    """What a search asks for."""

    words: tuple[str, ...]  # sorted, each once
    prefix: str | None  # the last word, which may be typed only in part

    def __len__(self) -> int:
        return len(self.words) + (self.prefix is not None)


def words_of(text: str) -> list[str]:
    """The words of a text in its order, as often as they are in it; of an unspaced run each piece that may be asked."""
    if text.isascii():
        return [word[:WORD_LENGTH_MAX] for word in _ASCII_WORDS.findall(text.lower())]
    words: list[str] = []
    for unspaced, word in _split(text):
        if unspaced:
            words += unspaced
            words += _pairs(unspaced)
        else:
            words.append(word[:WORD_LENGTH_MAX])
    return words


def terms_of(text: str) -> Terms:
    """The terms of what a user typed; none at all for a text without words."""
    words: set[str] = set()
    prefix = None
    for unspaced, word in _split(text):
        if prefix is not None:
            words.add(prefix)
            prefix = None
        if unspaced:
            words.update(_pairs(unspaced) or [unspaced])
        else:
            prefix = word[:WORD_LENGTH_MAX]
    return Terms(tuple(sorted(words)), prefix)


def relevance(terms: Terms, words: list[str]) -> tuple[bool, float] | None:
    """How well a text with these words answers, the greater the better; None: it does not match (invariant 1).

    A text that has the last word whole comes before one that only continues it; then counts how often the terms are in
    it, the more the fewer words it has in all. It depends on the terms and on this text alone: how rare a word is in
    *other* texts, which BM25 would count too, changes with every write anywhere.
    """
    damping = _SATURATION * (1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * len(words) / _LENGTH_TYPICAL)
    score, is_whole = 0.0, True
    for term in terms.words:
        count = words.count(term)
        if count == 0:
            return None
        score += count / (count + damping)
    prefix = terms.prefix
    if prefix is not None:
        count = sum([word.startswith(prefix) for word in words])
        if count == 0:
            return None
        score += count / (count + damping)
        is_whole = prefix in words
    return is_whole, score


def _pairs(unspaced: str) -> list[str]:
    return [unspaced[place : place + 2] for place in range(len(unspaced) - 1)]


def _split(text: str) -> list[tuple[str, str]]:
    """(unspaced run, "") or ("", word or symbol), in order."""
    patterns = _patterns()
    text = patterns.dropped.sub("", text)  # first, for invariant 4
    text = patterns.long_mark_run.sub(r"\1", text)
    text = patterns.dropped.sub("", unicodedata.normalize("NFKD", text))
    text = text.casefold().replace("ı", "i")  # the I of Turkish: its capital cannot be told from the other
    return patterns.pieces.findall(unicodedata.normalize("NFKC", text))


class _Patterns(NamedTuple):
    pieces: re.Pattern[str]
    dropped: re.Pattern[str]
    long_mark_run: re.Pattern[str]


@cache
def _patterns() -> _Patterns:
    """Made at the first use: it looks at every character that there is (30 ms), as `re` knows no categories."""
    kept: list[int] = []
    dropped: list[int] = []
    symbols: list[int] = []
    for codepoint in chain(range(0x80, 0x20000), range(0xE0000, 0xE0200)):
        character = chr(codepoint)
        category = unicodedata.category(character)
        if category == "So":
            symbols.append(codepoint)
        elif category[0] == "M" or category == "Cf":
            (kept if _belongs_to_letter(character, category) else dropped).append(codepoint)
    marks = _ranges(kept)
    return _Patterns(
        re.compile(f"([{_UNSPACED}]+)|((?:[^\\W_{_UNSPACED}{_APOSTROPHES}]|[{marks}])+|[{_ranges(symbols)}])"),
        re.compile(f"[{_ranges(dropped)}]+"),
        re.compile(f"([{marks}]{{{_MARK_RUN_LENGTH_MAX}}})[{marks}]+"),
    )


def _belongs_to_letter(character: str, category: str) -> bool:
    """Whether a mark makes another letter: vowel signs, nukta, virama, the voicing of kana; not accents and points,
    and nothing that only says how to show (joiners, variants, frames)."""
    if category in ("Cf", "Me") or unicodedata.name(character, "").startswith("VARIATION SELECTOR"):
        return False
    combining_class = unicodedata.combining(character)
    return combining_class < 10 or 36 < combining_class < 200  # unicode.org/reports/tr44, Canonical Combining Class


def _ranges(codepoints: list[int]) -> str:
    """Sorted code points as the inside of a character class."""
    ranges: list[tuple[int, int]] = []
    for codepoint in codepoints:
        if ranges and ranges[-1][1] == codepoint - 1:
            ranges[-1] = (ranges[-1][0], codepoint)
        else:
            ranges.append((codepoint, codepoint))
    return "".join([f"{chr(first)}-{chr(last)}" for first, last in ranges])
