"""Text to token ids, with the model's own tokenizer; the only file that knows the `tokenizers` library."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as LibraryTokenizer

from serve_app.errors import WeightsError
from serve_app.packing import Frame, Tokenized, enclose

# A text is first cut to this many characters a token that counts: English has 4 to 5, so what lies behind can't count.
# Without that, a body of one 10 MB text would cost seconds of tokenizing for its first 512 tokens.
CHARACTERS_A_TOKEN = 16


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
        heads = [self._head(text) for text in texts]
        encodings = self._encode(heads)
        # A head full of spaces or control characters may hold too few tokens: only then is the whole text needed.
        short = [
            row
            for row, (text, head) in enumerate(zip(texts, heads, strict=True))
            if len(head) < len(text) and len(encodings[row]) <= self.frame.max_tokens - 2
        ]
        for row, encoding in zip(short, self._encode([texts[row] for row in short]), strict=True):
            encodings[row] = encoding
        rows = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        ids = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
        return enclose(ids, lengths, self.frame)

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._library.encode_batch_fast(texts, add_special_tokens=False)

    def _head(self, text: str) -> str:
        """The part of a text that can count, cut at a space or line end, which no token crosses; else all of it."""
        if len(text) <= self._max_characters:
            return text
        edge = max(text.rfind(" ", 0, self._max_characters), text.rfind("\n", 0, self._max_characters))
        return text[:edge] if edge > 0 else text
