"""Words that were met before: the tokenizer's own ids whatever the text, and no more memory than is stated."""

import pickle
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers.normalizers import Lowercase

from serve_app import words
from serve_app.tokens import Tokenizer
from serve_app.words import LONGEST_WORD, MOST_IDS, Words
from tests.model import FOLDER

PIECES = [
    *["the", "The", "THE", "query", "naïve", "antidisestablishmentarianism", "x" * 99, "y" * 100, "z" * 101, "3.14"],
    *["don't", "_a_b", "##ing", "e\u0301", "中文", "\ufeff", "[MASK]", "[mask]", "[CLS]x", "[", "]", "U.S.A.", "C++"],
    *["don\u2019t", "\u201cso\u201d", "a\u2014b", "\u2026", "\u2018", "\u2013", "\u02bc"],
    *map(chr, range(256)),
    *" \t\r\n\x0b\x0c\x1c\x85\xa0\u2028",
]


def length_of(word: str) -> list[int]:
    """Stands in for a tokenizer where it matters only whether it was asked."""
    return [len(word)]


def library(folder: Path = FOLDER) -> tokenizers.Tokenizer:
    """The tokenizer by its own library alone."""
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_truncation()
    found.no_padding()
    return found


def ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    packed = tokenizer.tokenize(texts).packed
    ends = packed.lengths.cumsum()
    return [packed.ids[end - length : end].tolist() for end, length in zip(ends, packed.lengths, strict=True)]


@pytest.mark.parametrize("lowercase", [False, True])
def test_ids_are_the_librarys_whatever_the_text(lowercase: bool) -> None:
    pick = random.Random(1)
    texts = [pick.choice(["", " "]).join(pick.choices(PIECES, k=pick.randint(0, 30))) for _ in range(3_000)]
    tokenizer, alone = Tokenizer(FOLDER, 512, lowercase), library()
    expected = [alone.encode(text.lower() if lowercase else text).ids for text in texts]
    for _ in range(2):  # once with words that are new, once with known ones
        assert ids(tokenizer, texts) == expected


@pytest.mark.parametrize("text", ["how do I reset it?", "\u201cDon\u2019t,\u201d\r\n\tshe said \u2013 and left\u2026"])
def test_what_is_known_is_looked_up_and_what_is_new_is_known_the_next_time(text: str) -> None:
    tokenizer = Tokenizer(FOLDER, 512, lowercase=False)
    new = sum(not character.isspace() for character in text)
    assert tokenizer.tokenize_known([text], new - 1) is None
    assert tokenizer.tokenize_known([text], new) is not None
    assert tokenizer.tokenize_known([text] * 99, 0) is not None
    assert tokenizer.tokenize_known([text, "naïve"], 4) is None
    # What fits is learnt, though the whole does not.
    assert tokenizer.tokenize_known(["wine", "cellar"], 6) is None
    assert tokenizer.tokenize_known(["wine"], 0) is not None


@pytest.mark.parametrize(
    ("added", "text"),
    [("[MASK]", "a [mask] b"), ("new york", "new\tyork"), ("café au", "cafe au"), ("C++", "c++ and C++")],
)
def test_ids_are_the_librarys_whatever_tokens_were_added(tmp_path: Path, added: str, text: str) -> None:
    changed = library()
    changed.add_tokens([tokenizers.AddedToken(added, normalized=True)])
    changed.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, 512, lowercase=False)
    for _ in range(2):
        assert ids(tokenizer, [text, f"{text} the"]) == [changed.encode(each).ids for each in (text, f"{text} the")]


def test_a_tokenizer_of_another_kind_is_left_to_itself(tmp_path: Path) -> None:
    changed = library()
    changed.normalizer = Lowercase()
    changed.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, 512, lowercase=False)
    assert ids(tokenizer, ["One two"] * 2) == [changed.encode("One two").ids] * 2
    assert tokenizer.tokenize_known(["One two"], 6) is None


def test_a_text_with_too_much_that_is_new_is_known_after_some_more_like_it() -> None:
    tokenizer = Tokenizer(FOLDER, 512, lowercase=False)
    text = " ".join(f"{first}{second}" for first in "abcdefgh" for second in "abcdefgh")  # 64 words
    assert [tokenizer.tokenize_known([text], 0) is None for _ in range(5)] == [True] * 4 + [False], (
        "a quarter each time"
    )


def test_words_that_can_not_be_kept_keep_no_others_from_being_learnt() -> None:
    odd, plain = [f"{number}" * MOST_IDS for number in range(1000, 1500)], ["wine"]
    known = Words(lambda word: [0] * len(word), [])
    while not known:  # of 501 words sixteen at a time
        known.learn([*odd, "w" * (LONGEST_WORD + 1), *plain])
    assert set(known) == {"wine"}


def test_a_new_word_counts_each_time_that_it_would_be_asked_for() -> None:
    assert Words(length_of, []).new_characters(["B07XJ8C8F5"] * 700) == 7_000


def test_a_known_word_is_not_tokenized_again() -> None:
    asked: list[str] = []

    def encode(word: str) -> list[int]:
        asked.append(word)
        return [len(word)]

    known = Words(encode, ["[MASK]"])
    text = known.split("one, two\tone")
    assert text == ["one", ",", "two", "one"]
    assert known.new_characters(text) == 3 + 1 + 3 + 3
    assert known.ids(text) == [3, 1, 3, 3] == known.ids(text)
    assert known.new_characters(text) == 0
    assert asked == ["one", ",", "two"]


@pytest.mark.parametrize("text", ["naïve", "a\x00b", "a\x7f", "\x0b", "a [MASK] b", "[mask]", "中"])
def test_what_is_not_plain_is_left_to_the_tokenizer(text: str) -> None:
    assert Words(length_of, ["[MASK]"]).split(text) is None


def test_what_is_not_reserved_is_words() -> None:
    assert Words(length_of, []).split("a [MASK] b") == ["a", "[", "MASK", "]", "b"]


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    known = Words(length_of, [])
    assert known.ids(["a", "b", "c", "d" * (LONGEST_WORD + 1)]) == [1, 1, 1, LONGEST_WORD + 1]
    assert set(known) == {"a", "b", "c"}
    assert known.ids(["e", "a"]) == [1, 1]
    assert set(known) == {"e", "a"}
    many = Words(lambda word: [1] * len(word), [])
    assert many.ids(["a" * MOST_IDS, "a" * (MOST_IDS + 1)]) == [1] * (2 * MOST_IDS + 1)
    assert set(many) == {"a" * MOST_IDS}


def test_a_tokenizer_travels_without_its_words() -> None:
    tokenizer = Tokenizer(FOLDER, 512, lowercase=False)
    texts = ["how long does red wine keep"]
    expected = ids(tokenizer, texts)
    state = tokenizer.__getstate__()
    assert "_words" not in state  # a replica of older code neither has them nor knows their file
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.tokenize_known(texts, 1) is None
    assert ids(copy, texts) == expected
