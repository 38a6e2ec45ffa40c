"""The engine's benchmark: its grid and texts, its count of operations, and a quick run on this machine's CPU."""

import doctest
import os
import re

import numpy as np
import pytest
import torch

from loadtest import gpu
from loadtest.gpu import Cell, Limits, Speed
from serve_app.engines import bert
from serve_app.tokens import Tokenizer
from tests.model import FOLDER

MEASURED = ("product", "copy", "operations", "one 9-word", "the same, p99", "engine at", "our tokenizer", "tokenizer c")


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU; what the script sets in the environment is undone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fields(table: str) -> list[list[str]]:
    """The fields of each line of a Markdown table below its head."""
    return [[field.strip() for field in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def number(field: str) -> float:
    """The first number of a field."""
    return float(field.replace(",", "").split()[0].rstrip("%"))


@pytest.mark.usefixtures("no_cuda")
def test_a_quick_run_fills_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--quick", "--seconds", "0.01"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("`python -m loadtest.gpu --device cpu --quick --seconds 0.01`\n")
    assert "Device cpu" in text and f"torch {torch.__version__}" in text
    grid, measured = map(fields, re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE))
    assert [row[:2] for row in grid] == [[f"{cell.texts:,}", cell.words] for cell in gpu.cells(quick=True)]
    for row in grid:
        assert len(row) == 9 and all(number(field) > 0 for field in row)
        assert row[3] == row[4], "a CPU has one lane"
    assert len(measured) == len(MEASURED)
    for (label, value), start in zip(measured, MEASURED, strict=True):
        assert label.startswith(start) and number(value) > 0


@pytest.mark.usefixtures("no_cuda")
def test_without_a_device_it_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "no CUDA device" in err


def test_the_full_grid_has_short_middle_long_and_mixed_texts() -> None:
    grid = [(cell.texts, cell.words) for cell in gpu.cells(quick=False)]
    short = [(1, "9"), (8, "9"), (64, "9"), (512, "9")]
    middle = [(1, "64"), (8, "64"), (64, "64"), (256, "64")]
    long = [(1, "510"), (8, "510"), (64, "510")]
    assert grid == [*short, *middle, *long, (64, "4 to 500"), (2048, "16")]


def test_texts_have_as_many_words_as_asked_and_about_1_1_tokens_each() -> None:
    assert [len(text.split()) for text in gpu.write(Cell(3, 9, 9))] == [9, 9, 9]
    assert gpu.write(Cell(3, 9, 9)) == gpu.write(Cell(3, 9, 9))
    words = np.array([len(text.split()) for text in gpu.write(Cell(2000, 4, 500))])
    assert words.min() == 4 and 480 < words.max() <= 500
    # Log-uniform: half of the texts are under the geometric mean of 4 and 501.
    assert 0.45 < (words < 44.8).mean() < 0.55
    tokens = Tokenizer(FOLDER, 512, lowercase=False).tokenize(gpu.write(Cell(64, 64, 64))).packed.tokens
    assert 1.05 < (tokens - 2 * 64) / (64 * 64) < 1.2


def test_the_operations_are_those_counted_by_hand() -> None:
    network = bert.load(FOLDER, "mean", normalize=True)
    # A layer: qkv 442,368 + 1,152; out 147,456 + 384; up 589,824 + 1,536; down 589,824 + 384; two norms of 768.
    assert gpu.parameters(network) == 6 * 1_774_464 == 10_646_784
    # Five tokens by 21,293,568, and 4 x 384 x 6 = 9,216 by 2 x 2 + 3 x 3.
    assert gpu.flops(network, np.array([2, 3], np.int32)) == 5 * 21_293_568 + 9_216 * 13 == 106_587_648


def test_rates_and_shares_follow_from_calls_a_second() -> None:
    speed = Speed(Cell(2, 9, 9), tokens=24, flops=5e8, one_caller=100, all_lanes=200, whole=50, peer=None)
    [row] = fields(gpu.head(2) + "\n" + gpu.show(speed, Limits(1e12, 1e9, 512, 1024)))
    assert row == ["2", "9", "24", "2,400", "4,800", "1,200", "can't be imported", "0.1", "10.00%"]


def test_the_tokenizer_is_held_to_one_core_only_for_its_own_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "true"):
        if before is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        with gpu.one_core():
            assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_the_examples_in_the_docstrings_hold() -> None:
    ran = doctest.testmod(gpu)
    assert ran.attempted > 0 and ran.failed == 0
