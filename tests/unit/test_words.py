"""Words that were met before: the tokenizer's own ids whatever the text, and no more memory than is stated."""

import pickle
import random

import pytest
import tokenizers

from serve_app import words
from serve_app.tokens import Tokenizer
from serve_app.words import LONGEST_WORD, Words
from tests.model import FOLDER

LIBRARY = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
LIBRARY.no_truncation()
LIBRARY.no_padding()
PIECES = [
    *["the", "The", "THE", "query", "naïve", "antidisestablishmentarianism", "x" * 99, "y" * 100, "z" * 101, "3.14"],
    *["don't", "_a_b", "##ing", "e\u0301", "中文", "\ufeff", "[MASK]", "[mask]", "[CLS]x", "[", "]", "U.S.A.", "C++"],
    *map(chr, range(256)),
    *" \t\r\n\x0b\x0c\x1c\x85\xa0\u2028",
]


def length_of(word: str) -> list[int]:
    """Stands in for a tokenizer where it matters only whether it was asked."""
    return [len(word)]


@pytest.mark.parametrize("lowercase", [False, True])
def test_ids_are_the_librarys_whatever_the_text(lowercase: bool) -> None:
    pick = random.Random(1)
    texts = [pick.choice(["", " "]).join(pick.choices(PIECES, k=pick.randint(0, 30))) for _ in range(3_000)]
    tokenizer = Tokenizer(FOLDER, 512, lowercase)
    expected = [LIBRARY.encode(text.lower() if lowercase else text).ids for text in texts]
    for _ in range(2):  # once with words that are new, once with known ones
        packed = tokenizer.tokenize(texts).packed
        ends = packed.lengths.cumsum()
        got = [packed.ids[end - length : end].tolist() for end, length in zip(ends, packed.lengths, strict=True)]
        assert got == expected


def test_a_known_word_is_not_tokenized_again() -> None:
    asked: list[str] = []

    def encode(word: str) -> list[int]:
        asked.append(word)
        return [len(word)]

    known = Words(encode, ["[MASK]"])
    assert known.ids("one, two\tone") == [3, 1, 3, 3] == known.ids("one,two one")
    assert asked == ["one", ",", "two"]


@pytest.mark.parametrize("text", ["naïve", "a\x00b", "a\x7f", "\x0b", "a [MASK] b", "[mask]", "中"])
def test_what_is_not_plain_is_left_to_the_tokenizer(text: str) -> None:
    assert Words(length_of, ["[MASK]"]).ids(text) is None
    assert Words(length_of, []).ids("a [MASK] b") == [1, 1, 4, 1, 1]


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    known = Words(length_of, [])
    assert known.ids("a b c " + "d" * (LONGEST_WORD + 1)) == [1, 1, 1, LONGEST_WORD + 1]
    assert set(known) == {"a", "b", "c"}
    assert known.ids("e a") == [1, 1]
    assert set(known) == {"e", "a"}


def test_a_copy_starts_empty() -> None:
    known = Words(length_of, ["[MASK]"])
    known.ids("a")
    copy = pickle.loads(pickle.dumps(known))
    assert not copy and copy.ids("[mask]") is None and copy.ids("ab") == [2]
    tokenizer = Tokenizer(FOLDER, 512, lowercase=False)
    texts = ["how long does red wine keep"]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert (again.tokenize(texts).packed.ids == tokenizer.tokenize(texts).packed.ids).all()
