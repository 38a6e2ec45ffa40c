"""Text to vector against sentence-transformers in float32: token counts exactly, cosines as stated."""

import random
from functools import cache

import numpy as np
import pytest
import tokenizers
from sentence_transformers import SentenceTransformer

from serve_app.engines import bert
from serve_app.engines.openvino import OpenVinoEngine
from serve_app.packing import Float32
from serve_app.tokens import Tokenizer
from tests.model import FOLDER

MAX_TOKENS = 512  # the model's position embeddings; its own default of 256 would leave half of them untested
WORDS = [
    "how",
    "do",
    "I",
    "reset",
    "my",
    "password",
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "quarterly",
    "revenue",
    "antidisestablishmentarianism",
    "photosynthesis",
    "naïve",
    "café",
    "Zürich",
    "refund",
    "order",
    "shipping",
    "invoice",
    "kubernetes",
    "pods",
    "latency",
    "3.14159",
    "2026-11-23",
    "C++",
    "e.g.",
]


@cache
def texts() -> tuple[str, ...]:
    """241 texts: 1 to over 512 tokens, many scripts, code, and what is nearly empty."""
    pick = random.Random(384)
    odd = [
        *[
            ".",
            " ",
            "\n",
            "\t \n",
            "a",
            "A",
            "I",
            "é",
            "e\u0301",
            "ß",
            "İ",
            "ﬁ",
            "\x00",
            "\x07bell",
            "\u200b",
            "\ufeff",
        ],
        *[
            "日本語のテキスト",
            "中文句子\uff0c没有空格",
            "한국어 문장입니다",
            "العربية",
            "עברית",
            "हिन्दी वाक्य",
            "ไทย",
            "Ελληνικά",
        ],
        *[
            "русский текст",
            "🙂",
            "👩\u200d👩\u200d👧\u200d👦 family",
            "a\u0300\u0301\u0302b",
            "##ing",
            "don't",
            "U.S.A.",
        ],
        *[
            "x" * 99,
            "x" * 100,
            "x" * 101,
            "x" * 5000,
            "[CLS] [SEP] [MASK] [PAD] [UNK]",
            "http://a.com/b?c=d#e",
            "a@b.co",
        ],
        "def f(x):\n    return {k: v for k, v in x.items() if v is not None}\n",
        *["SELECT * FROM t WHERE a >= 3 AND b LIKE '%x%';", '{"a": [1, 2, {"b": null}]}', "<p class='x'>hi</p>"],
        *["!" * 600, "word " * 700, " " * 20_000 + "late", "中" * 600, "\x01" * 9000 + "after control characters"],
        *["tail " + " " * 9000 + "after spaces", "long line without end " * 800, "\n".join(["line"] * 900)],
    ]
    for count in [*range(1, 130), *range(130, 520, 8), 505, 508, 509, 510, 511, 512, 513, 514, 600, 1000, 4000, 20_000]:
        odd += [" ".join(pick.choice(WORDS) for _ in range(count))]
    return tuple(odd)


@cache
def reference() -> tuple[Float32, list[int]]:
    """sentence-transformers' vectors in float32, and the number of tokens it embeds of each text."""
    model = SentenceTransformer(str(FOLDER), device="cpu")
    model.max_seq_length = MAX_TOKENS
    vectors = model.encode(list(texts()), convert_to_numpy=True, normalize_embeddings=True, batch_size=32)
    counts = [int(model.tokenize([text])["attention_mask"].sum()) for text in texts()]
    return vectors, counts


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(FOLDER, MAX_TOKENS, lowercase=False)


def test_there_are_texts_enough_of_every_length() -> None:
    counts = reference()[1]
    assert len(counts) >= 200
    assert min(counts) == 2 and max(counts) == 512 and len(set(counts)) > 100


def test_token_counts_are_equal_exactly_and_cut_texts_are_known() -> None:
    tokenized = tokenizer().tokenize(texts())
    assert tokenized.packed.lengths.tolist() == reference()[1]
    library = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    full = [len(library.encode(text).ids) for text in texts()]
    assert (tokenized.full_lengths > MAX_TOKENS).tolist() == [length > MAX_TOKENS for length in full]
    assert all(known <= length for known, length in zip(tokenized.full_lengths.tolist(), full, strict=True))


def test_token_ids_are_the_librarys_own() -> None:
    library = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    library.enable_truncation(MAX_TOKENS)
    library.no_padding()
    expected = [token for text in texts() for token in library.encode(text).ids]
    assert tokenizer().tokenize(texts()).packed.ids.tolist() == expected


HUGE = 1 << 18


@pytest.mark.parametrize(
    "text",
    [
        "word " * HUGE,
        "." * HUGE,
        "x" * HUGE,
        "\u4e2d" * HUGE,
        " " * HUGE + "late",
        "\t\r\n " * HUGE + "late",
        "[MASK]" * HUGE,
        ("x" * 99 + ".") * 9999,
        ("x" * 199 + " ") * 9999,
        "the " * 500 + "x" * HUGE + " end",
    ],
    ids=[
        "words",
        "dots",
        "one word",
        "chinese",
        "spaces",
        "white space",
        "special",
        "long words",
        "longer words",
        "late",
    ],
)
def test_a_huge_text_has_the_librarys_ids_though_most_of_it_is_not_tokenized(text: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    library.enable_truncation(MAX_TOKENS)
    library.no_padding()
    assert tokenizer().tokenize([text]).packed.ids.tolist() == library.encode(text).ids


@pytest.mark.parametrize(("precision", "bar"), [("float32", 0.99999), ("auto", 0.9995)])
def test_vectors(precision: str, bar: float) -> None:
    engine = OpenVinoEngine(bert.load(FOLDER, "mean", True), precision, 2)
    if precision == "auto" and engine.precision == "float32":
        pytest.skip("this processor has no bfloat16: `auto` is float32, which is tested by its name")
    tokenized = tokenizer().tokenize(texts())
    together = engine.embed(tokenized.packed)
    lowest = float((together * reference()[0]).sum(1).min())
    alone = np.concatenate([engine.embed(tokenizer().tokenize([text]).packed) for text in texts()])
    alike = float((alone * together).sum(1).min())
    print(f"\n{engine.precision}: lowest cosine to sentence-transformers {lowest:.7f}, alone to together {alike:.7f}")
    assert lowest >= bar
    assert alike >= 0.9999
