"""Text to token ids, with the model's own tokenizer; the only file that knows the `tokenizers` library."""

import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from serve_app.errors import WeightsError
from serve_app.packing import Frame, Packed, Tokenized

# Of a long text first this many characters a token that counts are tokenized: English has 4 to 5, so that is enough.
# Else a body of one 16 MB text would cost up to 28 s of work for its first 512 tokens.
CHARACTERS_A_TOKEN = 16
# What can be shortened without changing a token: a run of white space separates words as one space does, and a
# word of over 100 characters is unknown whatever it is (`max_input_chars_per_word` of BERT's WordPiece).
LONG_RUN = re.compile(r"([ \t\r\n])[ \t\r\n]+|([A-Za-z0-9]{200})[A-Za-z0-9]+")
CUT_REACH_TOKENS = 8  # [MASK] cut in two is five tokens at most
# The library's own threads would take all cores for one list, from whoever else wants them; calls side by side do, too,
# but in threads whose niceness is ours.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """A model's tokenizer; thread-safe, and it lets other threads run while it works."""

    def __init__(self, folder: Path, max_tokens: int, lowercase: bool) -> None:
        """`max_tokens` counts the start and end tokens; raises WeightsError if the folder's tokenizer can't be used."""
        try:
            self._library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise WeightsError(f"{folder}: tokenizer.json can't be read: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._lowercase = lowercase
        self._max_characters = max_tokens * CHARACTERS_A_TOKEN
        ends = self._library.encode("", add_special_tokens=True).ids
        if len(ends) != 2:
            raise WeightsError(f"{folder}: tokenizer.json puts {len(ends)} tokens around a text; BERT's puts 2")
        self.frame = Frame(ends[0], ends[1], self._library.get_vocab_size(with_added_tokens=True), max_tokens)

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Token ids of each text, in order, cut to the model's limit.

        Promises the ids of `tokenizers` and `transformers` exactly; a cut text's full length is a lower bound.
        """
        if self._lowercase:
            texts = [text.lower() for text in texts]
        short = [text if len(text) <= self._max_characters else "" for text in texts]
        # Here and below plain lists: for one short text a dozen calls of numpy took twice as long as its tokens.
        rows = [encoding.ids for encoding in self._library.encode_batch_fast(short)]
        for index, text in enumerate(texts):
            if len(text) > self._max_characters:
                rows[index] = [self.frame.start_id, *self._ids_of_long(text), self.frame.end_id]
        full_lengths = np.array(list(map(len, rows)), np.int32)
        ids = np.fromiter(chain.from_iterable(map(self._cut, rows)), np.int32)
        return Tokenized(Packed(ids, np.minimum(full_lengths, self.frame.max_tokens)), full_lengths)

    def _cut(self, row: list[int]) -> list[int]:
        return row if len(row) <= self.frame.max_tokens else [*row[: self.frame.max_tokens - 1], self.frame.end_id]

    def _ids_of_long(self, text: str) -> list[int]:
        """Ids of a long text, or, as soon as they are more than can count, of its head."""
        text, characters = LONG_RUN.sub(r"\1\2", text), self._max_characters
        while True:
            # The fast way does not say which word a token belongs to.
            [head] = self._library.encode_batch([text[:characters]], add_special_tokens=False)
            if characters >= len(text):
                return head.ids
            # No cut behind the head can change more than its last word, and a special token's length before that.
            words = head.word_ids
            certain = words.index(words[-1]) - CUT_REACH_TOKENS if words else 0
            if certain > self.frame.max_tokens:
                return head.ids[:certain]
            characters *= 4
