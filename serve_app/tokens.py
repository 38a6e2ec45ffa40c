"""Text to token ids, with the model's own tokenizer; the only file that knows the `tokenizers` library."""

import os
import re
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from serve_app.errors import WeightsError
from serve_app.packing import Frame, Packed, Tokenized
from serve_app.words import Words

# Of a long text first this many characters a token that counts are tokenized: English has 4 to 5, so that is enough.
# Else a body of one 16 MB text would cost up to 28 s of work for its first 512 tokens.
CHARACTERS_A_TOKEN = 16
# What can be shortened without changing a token: a run of white space separates words as one space does, and a
# word of over 100 characters is unknown whatever it is (`max_input_chars_per_word` of BERT's WordPiece).
LONG_RUN = re.compile(r"([ \t\r\n])[ \t\r\n]+|(?<![A-Za-z0-9])([A-Za-z0-9]{200})[A-Za-z0-9]+")
CUT_REACH_TOKENS = 8  # [MASK] cut in two is five tokens at most
# The library's own threads would take all cores for one list, from whoever else wants them; calls side by side do, too,
# but in threads whose niceness is ours.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """A model's tokenizer; thread-safe."""

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
        self._words = self._new_words()

    def __getstate__(self) -> dict[str, Any]:
        # Without the words: other threads may be adding to them, and a replica of other code may not know of them.
        return {name: value for name, value in self.__dict__.items() if name != "_words"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._words = self._new_words()

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Token ids of each text, in order, cut to the model's limit.

        Promises the ids of `tokenizers` and `transformers` exactly; a cut text's full length is a lower bound.
        """
        tokenized = self.tokenize_known(texts, sys.maxsize)
        assert tokenized is not None, "there are more characters than memory has. This is a bug."
        return tokenized

    def tokenize_known(self, texts: Sequence[str], most_new_characters: int) -> Tokenized | None:
        """The same within some milliseconds: None if more characters than that are of texts or words that are new, of
        which some are known the next time.
        """
        if self._lowercase:
            texts = [text.lower() for text in texts]
        # Here and below plain lists: for one short text a dozen calls of numpy took twice as long as its tokens.
        rows: list[list[int] | None] = []
        new_characters = 0
        for text in texts:
            is_long = len(text) > self._max_characters
            words = None if is_long else self._words.split(text)
            new_characters += len(text) if words is None else self._words.new_characters(words)
            if new_characters > most_new_characters:
                if words is not None:
                    self._words.learn(words)
                return None
            if words is not None:
                rows.append(self._words.ids(words))
            else:
                rows.append(self._ids_of_long(text) if is_long else None)
        left = [text for text, row in zip(texts, rows, strict=True) if row is None]
        encoded = iter(self._library.encode_batch_fast(left, add_special_tokens=False) if left else ())
        whole = [next(encoded).ids if row is None else row for row in rows]
        full_lengths = np.array([2 + len(row) for row in whole], np.int32)
        ids = np.fromiter(chain.from_iterable(map(self._framed, whole)), np.int32)
        return Tokenized(Packed(ids, np.minimum(full_lengths, self.frame.max_tokens)), full_lengths)

    def _framed(self, row: list[int]) -> list[int]:
        return [self.frame.start_id, *row[: self.frame.max_tokens - 2], self.frame.end_id]

    def _new_words(self) -> Words:
        parts = (self._library.normalizer, self._library.pre_tokenizer, self._library.model)
        is_bert = all(map(isinstance, parts, (BertNormalizer, BertPreTokenizer, WordPiece)))
        reserved = [token.content for token in self._library.get_added_tokens_decoder().values()]
        are_plain = all(map(re.compile("[!-~]+").fullmatch, reserved))  # others are found in what a text is changed to
        # With the empty string, which is in every text, all are left to the library.
        return Words(self._ids_of_word, reserved if is_bert and are_plain else [""])

    def _ids_of_word(self, word: str) -> list[int]:
        ids: list[int] = self._library.encode(word, add_special_tokens=False).ids
        return ids

    def _ids_of_long(self, text: str) -> list[int]:
        """Ids of a long text, or, as soon as they are more than can count, of its head."""
        shortened, read, characters = "", 0, self._max_characters
        while True:
            # By pieces, since mostly only the first is needed, and the search lets no other thread run. What is cut
            # between two is still white space, or over 100 characters.
            while len(shortened) < characters and read < len(text):
                shortened += LONG_RUN.sub(r"\1\2", text[read : read + self._max_characters])
                read += self._max_characters
            # The fast way does not say which word a token belongs to.
            [head] = self._library.encode_batch([shortened[:characters]], add_special_tokens=False)
            if characters >= len(shortened) and read >= len(text):
                return head.ids
            # No cut behind the head can change more than its last word, and a special token's length before that.
            words = head.word_ids
            certain = words.index(words[-1]) - CUT_REACH_TOKENS if words else 0
            if certain > self.frame.max_tokens:
                return head.ids[:certain]
            characters *= 4
