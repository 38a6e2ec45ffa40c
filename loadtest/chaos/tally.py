"""What became of the requests, as pure functions of plain records."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

Client = Literal["raw", "openai"]
# `right`: the known vectors. `refused`: properly, to be tried again. `failed`: anything else. `wrong`: other vectors.
Outcome = Literal["right", "refused", "failed", "wrong"]

REFUSALS = (429, 503)
# What OpenAI's clients keep to; a longer or a broken one they replace by a guess.
LONGEST_RETRY_AFTER_S = 60
# An answer may be later than before a fault by so much, and still be as usual.
NORMAL_FACTOR, NORMAL_EXTRA_S = 2.0, 0.25


@dataclass(frozen=True, slots=True)
class Record:
    """One request: when it was sent (`time.monotonic()`), how long after that its answer came, and what it was."""

    client: Client
    sent_s: float
    latency_s: float
    outcome: Outcome
    detail: str = ""  # of what is not right; never a text

    @property
    def over_s(self) -> float:
        """When its answer came."""
        return self.sent_s + self.latency_s


def is_refusal(status: int, headers: Mapping[str, str], body: bytes) -> bool:
    """Whether an answer refuses as it should: when to come back in whole seconds, and OpenAI's error object.

    >>> body = b'{"error": {"message": "later", "type": "rate_limit_error", "param": null, "code": "slow_down"}}'
    >>> is_refusal(429, {"retry-after": "2"}, body), is_refusal(429, {}, body), is_refusal(500, {}, body)
    (True, False, False)
    """
    after = headers.get("retry-after", "")
    if status not in REFUSALS or not after.isdecimal() or not 1 <= int(after) <= LONGEST_RETRY_AFTER_S:
        return False
    try:
        error: Any = orjson.loads(body)["error"]
        return {"message", "type", "param", "code"} <= error.keys() and bool(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def words_of(status: int, body: bytes) -> str:
    """What an answer that is no success says: its status, and its error's message, if it has one.

    >>> words_of(504, b'{"error": {"message": "No replica answered in time."}}'), words_of(502, b"<html>")
    ('status 504: No replica answered in time.', 'status 502')
    """
    try:
        return f"status {status}: {orjson.loads(body)['error']['message'][:200]}"
    except (ValueError, KeyError, TypeError):
        return f"status {status}"


def percentile_s(latencies_s: Sequence[float], share: float = 0.99) -> float:
    """The latency that so many of them keep to, by nearest rank; 0.0 where there are none.

    >>> percentile_s([0.1] * 99 + [5.0]), percentile_s([0.1] * 98 + [5.0, 6.0]), percentile_s([])
    (0.1, 5.0, 0.0)
    """
    ranked = sorted(latencies_s)
    return ranked[math.ceil(share * len(ranked)) - 1] if ranked else 0.0


def limit_s(calm: Iterable[Record]) -> float:
    """The p99 up to which the service is as usual, by what it was while nothing happened."""
    return NORMAL_FACTOR * percentile_s([each.latency_s for each in calm]) + NORMAL_EXTRA_S


def is_normal(recent: Iterable[Record], waiting_s: Iterable[float], limit_s: float) -> bool:
    """Whether the last seconds were as usual: their answers, and those still waited for, for as long as that is.

    >>> right = Record("raw", 0.0, 0.1, "right")
    >>> is_normal([right] * 99, [0.2], 0.5), is_normal([right] * 9, [2.0], 0.5), is_normal([], [], 0.5)
    (True, False, False)
    """
    late_s = [each.latency_s if each.outcome == "right" else math.inf for each in recent] + list(waiting_s)
    return bool(late_s) and percentile_s(late_s) <= limit_s


@dataclass(frozen=True, slots=True)
class Tally:
    """The requests of a time, by client and outcome."""

    counts: Counter[tuple[Client, Outcome]]
    longest_s: float  # of the raw client: the other one's include its pauses
    details: Counter[str]  # of what was not right, by client

    def sent(self, client: Client) -> int:
        return sum(count for (whose, _), count in self.counts.items() if whose == client)

    def of(self, client: Client, outcome: Outcome) -> int:
        return self.counts[client, outcome]

    @property
    def wrong(self) -> int:
        """Of both clients."""
        return self.of("raw", "wrong") + self.of("openai", "wrong")

    @property
    def surfaced(self) -> int:
        """Errors that OpenAI's client could not hide from whoever uses it, refusals among them."""
        return self.of("openai", "refused") + self.of("openai", "failed")


def tally(records: Iterable[Record]) -> Tally:
    """Count them."""
    counts: Counter[tuple[Client, Outcome]] = Counter()
    details: Counter[str] = Counter()
    longest_s = 0.0
    for each in records:
        counts[each.client, each.outcome] += 1
        if each.client == "raw":
            longest_s = max(longest_s, each.latency_s)
        if each.outcome != "right":
            details[f"{each.client}: {each.detail}"] += 1
    return Tally(counts, longest_s, details)


def shared_out(records: Iterable[Record], began: Sequence[float]) -> list[list[Record]]:
    """The records of each fault: of the requests that were over after it began and not after the next one did, as what
    is in flight when something is killed is what that costs."""
    shares: list[list[Record]] = [[] for _ in began]
    for each in records:
        if fault := bisect_left(began, each.over_s):
            shares[fault - 1].append(each)
    return shares


@dataclass(frozen=True, slots=True)
class Promise:
    """What holds while a fault happens, in words and in numbers."""

    words: str
    within_s: float  # from the fault until all is as before
    failed_each: float = 0.0  # the raw client's requests that fail each time, at most
    surfaced: float = 0  # errors that OpenAI's client surfaces, at most
    longest_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Seen:
    """A fault as it went: how often it was done, what became of the requests, and the time to recover of each time;
    infinite where it was not over when the wait for it was."""

    tally: Tally
    recovered_s: tuple[float, ...]

    @property
    def times(self) -> int:
        return len(self.recovered_s)


def broken(promise: Promise, seen: Seen) -> list[str]:
    """What of a promise was not kept, a few words each."""
    found = []
    failed = seen.tally.of("raw", "failed")
    if failed > promise.failed_each * seen.times:
        found.append(f"{failed} failed")
    if seen.tally.wrong:
        found.append(f"{seen.tally.wrong} wrong")
    if seen.tally.surfaced > promise.surfaced:
        found.append(f"{seen.tally.surfaced} errors from OpenAI's client")
    if seen.tally.longest_s > promise.longest_s:
        found.append(f"an answer after {seen.tally.longest_s:.1f} s")
    slowest_s = max(seen.recovered_s, default=0.0)
    if slowest_s > promise.within_s:
        found.append(f"recovered after {slowest_s:.0f} s" if math.isfinite(slowest_s) else "did not recover")
    return found
