"""What the chaos run makes of answers: judged by real clients against a server that answers what it is told to."""

import base64
import doctest
import math
import threading
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import orjson
import pytest
import uvicorn

from loadtest.chaos import soak, tally
from loadtest.chaos.faults import FAULTS, SHORT
from loadtest.chaos.load import LIST, LONG, OPENAI_EVERY, Load, known_vectors, texts_of
from loadtest.chaos.table import COLUMNS, table
from loadtest.chaos.tally import Promise, Record, Seen, broken, is_refusal
from loadtest.traffic.kinds import QUERIES
from serve_app.pipeline import NEW_CHARACTERS

ERROR = orjson.dumps({"error": {"message": "later", "type": "rate_limit_error", "param": None, "code": "slow_down"}})


def record(outcome: tally.Outcome = "right", client: tally.Client = "raw", latency_s: float = 0.1) -> Record:
    return Record(client, 0.0, latency_s, outcome, "" if outcome == "right" else "why")


def seen(*records: Record, recovered_s: tuple[float, ...] = (3.0,)) -> Seen:
    return Seen(tally.tally(records), recovered_s)


def test_what_is_in_flight_when_something_is_killed_is_what_that_costs() -> None:
    before, during, after = (record(latency_s=latency_s) for latency_s in (9.0, 10.5, 20.5))  # all sent at 0
    assert tally.shared_out([before, during, after], [10.0, 20.0]) == [[during], [after]]


def test_the_examples_in_the_docstrings_hold() -> None:
    for module in (tally, soak):
        ran = doctest.testmod(module)
        assert ran.attempted > 0 and ran.failed == 0


def test_a_soak_shows_what_the_processes_held_that_lived_for_long() -> None:
    grows = [soak.Sample(minute / 60, 100 + minute / 60, 20 + minute % 2) for minute in range(30)]
    rows = soak.held({("ingress", 1): grows, ("ingress", 2): grows[:5], ("model", 3): grows[:2]}).splitlines()
    assert rows[2:] == ["| ingress | 2 | 1 | 100, 100 | +1.0, +1.0 | 20, 21, 21 |", "| model | 1 | 0 | | | |"]


@pytest.mark.parametrize(
    ("status", "after", "body", "expected"),
    [
        (429, "1", ERROR, True),
        (503, "60", ERROR, True),
        (503, "61", ERROR, False),
        (503, "0", ERROR, False),
        (503, "1.5", ERROR, False),
        (500, "1", ERROR, False),
        (429, "1", b"", False),
        (429, "1", b"[]", False),
        (429, "1", b'{"error": "later"}', False),
        (429, "1", b'{"error": {"message": "later"}}', False),
    ],
)
def test_a_refusal_says_when_to_come_back_and_has_the_error_object(
    status: int, after: str, body: bytes, expected: bool
) -> None:
    assert is_refusal(status, {"retry-after": after}, body) is expected


def test_each_client_is_counted_apart_and_the_longest_wait_is_the_raw_one() -> None:
    found = tally.tally(
        [
            *(record(), record("failed", latency_s=2.0), record("refused")),
            *(record("right", "openai", 9.0), record("failed", "openai"), record("refused", "openai")),
            record("wrong", "openai"),
        ]
    )
    assert (found.sent("raw"), found.sent("openai"), found.surfaced, found.wrong) == (3, 4, 2, 1)
    assert found.longest_s == 2.0
    assert found.details == {"raw: why": 2, "openai: why": 3}


STRICT = Promise("nothing", within_s=10.0, longest_s=1.0)


@pytest.mark.parametrize(
    ("promise", "found", "expected"),
    [
        (STRICT, seen(record(), record("refused")), []),
        (STRICT, seen(record(), record("failed")), ["1 failed"]),
        (STRICT, seen(record("wrong")), ["1 wrong"]),
        (STRICT, seen(record("wrong", "openai")), ["1 wrong"]),
        (STRICT, seen(record("refused", "openai")), ["1 errors from OpenAI's client"]),
        (STRICT, seen(record(latency_s=1.0)), []),
        (STRICT, seen(record(latency_s=1.1)), ["an answer after 1.1 s"]),
        (STRICT, seen(record(), recovered_s=(1.0, 10.0)), []),
        (STRICT, seen(record(), recovered_s=(11.0, 1.0)), ["recovered after 11 s"]),
        (STRICT, seen(record(), recovered_s=(math.inf,)), ["did not recover"]),
        (Promise("few", 10.0, failed_each=1), seen(*[record("failed")] * 2, recovered_s=(1.0, 1.0)), []),
        (Promise("few", 10.0, failed_each=1), seen(*[record("failed")] * 2), ["2 failed"]),
    ],
)
def test_a_promise_is_kept_up_to_its_limits(promise: Promise, found: Seen, expected: list[str]) -> None:
    assert broken(promise, found) == expected


def test_the_table_has_a_cell_for_each_column() -> None:
    some = seen(record(), record("failed"), recovered_s=(2.0, 4.0, math.inf))
    lines = table({"model": some, "node": seen(record())}, {"head": "no redis"}, some.tally).splitlines()
    assert [line.count("|") for line in lines] == [len(COLUMNS) + 1] * 6
    assert "**no**: 1 failed; did not recover" in lines[2] and lines[2].endswith("| 4.0, not |")
    assert "| yes |" in lines[3] and "skipped: no redis" in lines[4]


def test_the_short_form_is_some_of_the_faults() -> None:
    assert set(SHORT) < set(FAULTS)
    assert all(each.promise.words and each.a_round >= 1 for each in FAULTS.values())


def test_the_load_has_short_texts_pairs_and_those_that_the_tokenizers_get() -> None:
    source = Random(1)
    asked = [texts_of(number, source) for number in range(960)]
    assert {text for texts in asked for text in texts} == {*QUERIES, *LONG} == set(known_vectors())
    assert sum(len(texts) == 2 for texts in asked) == 96
    left = [text for [text, *_] in asked if len(text) > NEW_CHARACTERS and not text.isascii()]
    assert len(left) == 24
    assert sum(len(texts) == LIST for texts in asked) == 4


class Told:
    """An embeddings server that answers as `how` says."""

    how = "right"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        asked = orjson.loads((await receive())["body"])
        texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
        status, headers, body = 200, [(b"content-type", b"application/json")], b""
        if self.how in ("right", "wrong"):
            # Wrong: the vector of another text.
            vectors = [known_vectors()[text if self.how == "right" else LONG[text == LONG[0]]] for text in texts]
            data = [
                {"object": "embedding", "index": place, "embedding": base64.b64encode(np.asarray(vector)).decode()}
                for place, vector in enumerate(vectors)
            ]
            usage = {"prompt_tokens": 1, "total_tokens": 1}
            body = orjson.dumps({"object": "list", "model": "m", "data": data, "usage": usage})
        elif self.how == "refused":
            status, body = 429, ERROR
            headers.append((b"retry-after", b"1"))
        else:
            status, body = 500, b"oh"
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def told() -> Iterator[tuple[Told, str]]:
    app = Told()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(
    ("how", "raw", "openai", "detail"),
    [
        ("right", "right", "right", ""),
        ("wrong", "wrong", "wrong", "vector: "),
        ("refused", "refused", "refused", "status 429"),
        ("broken", "failed", "failed", "status 500"),
    ],
)
def test_answers_are_judged(told: tuple[Told, str], how: str, raw: str, openai: str, detail: str) -> None:
    app, url = told
    app.how = how
    with Load(url, rate=60) as load:
        time.sleep(1.0)
    outcomes = {(each.client, each.outcome) for each in load.records}
    assert outcomes == {("raw", raw), ("openai", openai)}
    assert all(each.detail.startswith(detail) for each in load.records)
    assert len(load.records) >= 20


def test_a_connection_that_is_refused_is_a_failure() -> None:
    with Load("http://127.0.0.1:9", rate=40) as load:
        while len(load.records) + len(load.waiting_s()) < 2 * OPENAI_EVERY:
            time.sleep(0.01)
    assert {(each.client, each.outcome) for each in load.records} == {("raw", "failed"), ("openai", "failed")}
