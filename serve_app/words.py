"""Token ids of the words that were met before, so that a text is looked up word by word instead of tokenized anew."""

import re
from collections.abc import Callable, Sequence
from itertools import chain

# BERT's words in ASCII: letters and digits in a row, and each mark of punctuation for itself (`BertPreTokenizer` of the
# `tokenizers` library). All else in ASCII only separates them, but for control characters, which vanish from a word.
WORD = re.compile(r"[A-Za-z0-9]+|[!-/:-@\[-`{-~]")
NOT_PLAIN = re.compile(r"[^\t\n\r -~]")
# At some 200 bytes each. 418,000 words of English manuals had 18,000 different ones.
MOST_WORDS = 65_536
LONGEST_WORD = 32


class Words(dict[str, list[int]]):
    """Word -> its token ids, as the tokenizer says when it is first asked for; forgets all of them once there are many.

    The tokenizer's own time goes to where in the text each token came from, which nobody asks for: a text of known
    words takes a sixth of that time, one of new words two and a half times as long.
    """

    def __init__(self, encode: Callable[[str], list[int]], reserved: Sequence[str]) -> None:
        """`reserved`: what the tokenizer knows as one token wherever it stands, as "[MASK]"."""
        super().__init__()
        self._encode, self._reserved = encode, reserved
        self._is_reserved = re.compile("|".join(map(re.escape, reserved)) or r"(?!)", re.IGNORECASE).search

    def __reduce__(self) -> tuple[type["Words"], tuple[Callable[[str], list[int]], Sequence[str]]]:
        return Words, (self._encode, self._reserved)  # a copy starts empty: other threads may be adding words

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def ids(self, text: str) -> list[int] | None:
        """The text's ids without start and end token; None of a text that is not plain ASCII, for the tokenizer."""
        if NOT_PLAIN.search(text) or self._is_reserved(text):
            return None
        return list(chain.from_iterable(map(self.__getitem__, WORD.findall(text))))
