"""Texts as users write them, and what finds them."""

import re
import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.values import words
from engine.values.words import WORD_LENGTH_MAX, Terms, relevance, terms_of, words_of
from tests.strategies import any_texts

# letters of many scripts, accents alone and on letters, symbols, punctuation, and what lies between
characters = st.sampled_from(
    "aAbz09 éÉ'_-,.\"*()éñ\u0301\u0327ß ıİ ﬁ½ ёйЙҚқ ΣςάΐᾳΩ اَب שׁ कि्ष ក្ម ไทย 東京がｶﾞー 한글ᄒ 👍🏽🇺🇿\ufe0f\u200d\ud800\0"
)
texts = st.text(characters, max_size=12) | any_texts | st.text(max_size=8)
IOTA_BELOW = re.compile("[\u0345]")


def whole_and_score(text: str, wanted: str) -> tuple[bool, float]:
    found = relevance(terms_of(wanted), words_of(text))
    assert found is not None
    return found


def answers(text: str, wanted: str) -> bool:
    terms = terms_of(wanted)
    return len(terms) > 0 and relevance(terms, words_of(text)) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Gól, ЁЛКА!", ["gol", "елка"]),
        ("don't_do 2", ["don", "t", "do", "2"]),
        ("o‘zbek oʻzbek", ["o", "zbek", "o", "zbek"]),
        ("東京都", ["東", "京", "都", "東京", "京都"]),
        ("が ｶﾞ", ["が", "ガ"]),
        ("iPhone15を買う", ["iphone15", "を", "買", "う", "を買", "買う"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("שָׁלוֹם مُحَمَّد", ["שלום", "محمد"]),
        ("가격", ["가격"]),
        ("👍🏽👏 👨‍👩‍👧", ["👍", "👏", "👨", "👩", "👧"]),
        ("ﬁne ² STRAßE Ⅳ", ["fine", "2", "strasse", "iv"]),
        ("soft\u00adhyphen", ["softhyphen"]),
        ("a" * 100 + " b", ["a" * WORD_LENGTH_MAX, "b"]),
        ('…!? "*" () ', []),
    ],
    ids=ascii,
)
def test_a_text_is_split_into_words(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("goal oka", Terms(("goal",), "oka")),
        ("oka oka Goal", Terms(("oka",), "goal")),
        ("goal ", Terms((), "goal")),
        ("東京都", Terms(("京都", "東京"), None)),
        ("京 goal", Terms(("京",), "goal")),
        ("goal 京", Terms(("goal", "京"), None)),
        ("x" * 100, Terms((), "x" * WORD_LENGTH_MAX)),
        ('"*"', Terms((), None)),
    ],
    ids=ascii,
)
def test_only_the_last_word_may_be_there_in_part(text: str, expected: Terms) -> None:
    assert terms_of(text) == expected


@pytest.mark.parametrize(
    ("text", "wanted", "is_found"),
    [
        ("What a goal!", "GOAL wha", True),
        ("What a goal!", "wha goal", False),
        ("Гол, ёлка", "елка гол", True),
        ("café", "cafe\u0301", True),
        ("resume", "résumé", True),
        ("東京都に行く", "京都", True),
        ("東京都に行く", "行都", False),
        ("ภาษาไทย", "ไทย", True),
        ("IŞIK ışık", "ışık isik", True),
        ("anything", "", False),
        ("anything", "?!", False),
        ("", "a", False),
    ],
)
def test_a_text_answers_when_it_has_all_the_words(text: str, wanted: str, is_found: bool) -> None:
    assert answers(text, wanted) == is_found


@given(texts)
def test_words_are_what_a_search_index_can_hold(text: str) -> None:
    """Invariant 3."""
    for word in words_of(text):
        assert 1 <= len(word) <= WORD_LENGTH_MAX
        assert re.fullmatch(r"[a-z0-9\u0080-\U0010ffff]+", word), ascii(word)
        assert word.split() == [word]
        word.encode()  # no half of a surrogate pair


@given(texts)
@example("\u0323\u0301a")
def test_equivalent_texts_have_the_same_words(text: str) -> None:
    """Invariant 2."""
    for form in ("NFC", "NFD"):
        assert words_of(unicodedata.normalize(form, text)) == words_of(text)


@given(texts)
def test_capitals_make_no_difference(text: str) -> None:
    """Invariant 2."""
    text = IOTA_BELOW.sub("", unicodedata.normalize("NFD", text))
    assert words_of(text.lower()) == words_of(text.upper()) == words_of(text)


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_split_as_everything_else_is(text: str) -> None:
    assert words_of(text) == [word[:WORD_LENGTH_MAX] for _, word in words._split(text)]


@given(texts, texts)
def test_the_words_of_two_texts_are_those_of_each(first: str, second: str) -> None:
    together = words_of(f"{first} {second}")
    assert together == words_of(first) + words_of(second)


@given(texts)
def test_every_text_with_words_is_found_by_itself(text: str) -> None:
    assert answers(text, text) == bool(words_of(text))
    assert len(terms_of(text)) <= len(words_of(text))


@given(texts, texts, texts)
def test_a_run_without_spaces_is_found_by_any_part_of_it(before: str, part: str, after: str) -> None:
    def unspaced(text: str) -> str:
        return "".join(run for run, _ in words._split(text))

    whole = unspaced(before) + unspaced(part) + unspaced(after)
    assert answers(whole, unspaced(part)) == bool(unspaced(part))


@given(st.lists(st.sampled_from(["a", "ab", "abc", "b", "京"])), st.lists(st.sampled_from(["a", "ab", "abc", "京"])))
def test_a_text_matches_iff_each_term_is_there(in_text: list[str], wanted: list[str]) -> None:
    """Invariant 1."""
    text, terms = words_of(" ".join(in_text)), terms_of(" ".join(wanted))
    expected = all(word in text for word in terms.words) and (
        terms.prefix is None or any(word.startswith(terms.prefix) for word in text)
    )
    assert (relevance(terms, text) is not None) == expected


def test_a_whole_last_word_comes_before_one_that_goes_on() -> None:
    assert whole_and_score("an oka in a long, long text about something else", "oka") > whole_and_score("okay", "oka")


def test_more_occurrences_in_fewer_words_are_more_relevant() -> None:
    texts = ["goal goal", "goal", "goal of the day", "goal " + "and many other words " * 10]
    scores = [whole_and_score(text, "goal") for text in texts]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize(
    "unit",
    ["\u0316\u0301", "\u093c\u094d", "\u0e38\u0e48", "\u0344", "\u0958", "\ufdfa", "京", "x", "é ", "👍"],
    ids=ascii,
)
def test_no_text_takes_more_than_linear_time(unit: str) -> None:
    """Invariant 4: what takes milliseconds now would take minutes if it were quadratic."""
    started_at = time.process_time()
    words_of("a" + unit * 30_000)
    assert time.process_time() - started_at < 2
