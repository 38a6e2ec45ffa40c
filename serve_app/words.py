"""Token ids of the words that were met before, so that a text is looked up word by word instead of tokenized anew."""

import random
import re
from collections.abc import Callable, Sequence
from itertools import chain, filterfalse

# BERT's words: letters and digits in a row, and each mark of punctuation for itself (`BertPreTokenizer` of the
# `tokenizers` library). Of the characters in plain text all others only separate them. Those of other texts may be
# changed or vanish before that.
TYPOGRAPHIC = r"\u2018\u2019\u201c\u201d\u2013\u2014\u2026"  # quotes, dashes, the ellipsis
WORD = re.compile(rf"[A-Za-z0-9]+|[!-/:-@\[-`{{-~{TYPOGRAPHIC}]")
NOT_PLAIN = re.compile(rf"[^\t\n\r -~{TYPOGRAPHIC}]")
# At some 200 bytes each, at most 400. 418,000 words of English manuals had 18,000 different ones.
MOST_WORDS = 65_536
LONGEST_WORD, MOST_IDS = 32, 4
LEARNT_AT_ONCE = 16


class Words(dict[str, list[int]]):
    """Word -> its token ids, for which the tokenizer is asked once; forgets all of them once there are too many.

    The tokenizer's own time goes to where in the text each token came from, which nobody asks for: a text of known
    words takes a sixth of that time, one of new words mostly two to four times as long. Thread-safe.
    """

    def __init__(self, encode: Callable[[str], list[int]], reserved: Sequence[str]) -> None:
        """`reserved`: what the tokenizer knows as one token wherever it stands, as "[MASK]"; ASCII without spaces."""
        super().__init__()
        self._encode = encode
        self._is_reserved = re.compile("|".join(map(re.escape, reserved)) if reserved else "(?!)", re.I).search

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= LONGEST_WORD and len(ids) <= MOST_IDS:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def split(self, text: str) -> list[str] | None:
        """The text's words; None of one that only the tokenizer itself can split."""
        return None if NOT_PLAIN.search(text) or self._is_reserved(text) else WORD.findall(text)

    def new_characters(self, words: Sequence[str]) -> int:
        """How many characters the tokenizer would be asked for."""
        return sum(map(len, filterfalse(self.__contains__, words)))

    def learn(self, words: Sequence[str]) -> None:
        """Ask the tokenizer for some of those that are new, which takes 0.1 ms, or 0.6 of odd ones."""
        new = [word for word in dict.fromkeys(words) if word not in self and len(word) <= LONGEST_WORD]
        # Not always the first: those that turn out to have too many ids are not kept, and would keep the others away.
        for word in random.sample(new, min(LEARNT_AT_ONCE, len(new))):
            self.__missing__(word)

    def ids(self, words: Sequence[str]) -> list[int]:
        """The ids of all of the words, without start and end token."""
        return list(chain.from_iterable(map(self.__getitem__, words)))
