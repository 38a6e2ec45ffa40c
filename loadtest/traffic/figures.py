"""What a run says in numbers: of each kind over the whole run, and of everything over time."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from loadtest.traffic.checks import WRONG
from loadtest.traffic.kinds import KINDS
from loadtest.traffic.run import Floats, Replicas, Requests, Run, Sample

# So many points are as many as a screen shows apart.
MOST_POINTS = 240
BUCKETS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the requests of one kind, or of all; rates and percentiles count right answers alone.

    Percentiles are infinite where there were requests and no right answer.
    """

    requests: int
    refused: int
    wrong: int
    requests_per_s: float
    texts_per_s: float
    tokens_per_s: float
    p50_ms: float
    p99_ms: float

    @property
    def refused_rate(self) -> float:
        """The share of requests that got no answer; 1 where nothing was asked at all."""
        return self.refused / self.requests if self.requests else 1.0


def figures(run: Run) -> dict[str, Figures]:
    """Figures of each kind, and of all together under ''."""
    parts = {kind: run.requests.where(run.requests.kind == kind) for kind in kinds(run)} | {"": run.requests}
    return {kind: _figures(part, run.elapsed_s) for kind, part in parts.items()}


def kinds(run: Run) -> list[str]:
    """Those that asked for anything, in the order of KINDS."""
    asked = set(run.requests.kind.tolist())
    return [kind for kind in KINDS if kind in asked] + sorted(asked - KINDS.keys())


def _figures(requests: Requests, elapsed_s: float) -> Figures:
    right = requests.where(requests.right)
    wrong = int(is_wrong(requests).sum())
    p50_ms, p99_ms = np.percentile(right.latency_ms, [50, 99]) if len(right) else (np.inf, np.inf)
    per_s = 1 / elapsed_s if elapsed_s else 0.0
    return Figures(
        requests=len(requests),
        refused=len(requests) - len(right) - wrong,
        wrong=wrong,
        requests_per_s=len(right) * per_s,
        texts_per_s=int(right.inputs.sum()) * per_s,
        tokens_per_s=int(right.tokens.sum()) * per_s,
        p50_ms=float(p50_ms),
        p99_ms=float(p99_ms),
    )


def is_wrong(requests: Requests) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Which requests got an answer that was not right."""
    wrong = ~requests.right
    wrong[wrong] = [fault.partition(":")[0] in WRONG for fault in requests.fault[wrong]]
    return wrong


def faults(run: Run) -> list[tuple[str, str, int]]:
    """Kind, reason and number, the most frequent first."""
    failed = run.requests.where(~run.requests.right)
    counted = Counter(zip(failed.kind.tolist(), failed.fault.tolist(), strict=True))
    return [(kind, fault, number) for (kind, fault), number in counted.most_common()]


@dataclass(frozen=True, slots=True)
class Decision:
    """Serve wanted another number of replicas from here on."""

    at_s: float
    deployment: str
    before: int
    after: int


def decisions(samples: Iterable[Sample]) -> list[Decision]:
    """The changes of what Serve wants, from second to second; Serve's API holds no list of them."""
    return [
        Decision(after.at_s, name, before.deployments[name].wanted, replicas.wanted)
        for before, after in pairwise(samples)
        for name, replicas in after.deployments.items()
        if name in before.deployments and before.deployments[name].wanted != replicas.wanted
    ]


@dataclass(frozen=True, slots=True)
class Scaling:
    """How one deployment was scaled over a run."""

    fewest: int
    most: int
    replica_s: float
    decisions: int
    turns: int  # from growing to shrinking, or back


def scaling(run: Run) -> dict[str, Scaling]:
    """Of each deployment; empty where Serve told nothing."""
    found = {}
    for name in deployments(run):
        seen = [(sample.at_s, sample.deployments[name]) for sample in run.samples if name in sample.deployments]
        running = [replicas.running for _, replicas in seen]
        steps = [decision.after - decision.before for decision in decisions(run.samples) if decision.deployment == name]
        found[name] = Scaling(
            fewest=min(running),
            most=max(running),
            replica_s=sum(before.running * (end - start) for (start, before), (end, _) in pairwise(seen)),
            decisions=len(steps),
            turns=sum((before > 0) != (after > 0) for before, after in pairwise(steps)),
        )
    return found


def deployments(run: Run) -> list[str]:
    """Their names."""
    return list(dict.fromkeys(name for sample in run.samples for name in sample.deployments))


@dataclass(frozen=True)
class Timeline:
    """A run over time, in columns [T]: `at_s` are the starts of the buckets, each `bucket_s` long.

    Rates count right answers when they came, percentiles are those of the requests that arrived in the bucket (NaN
    where none did), both by kind and under '' for all. Requests in flight are the bucket's mean, users and replicas
    are as at its end.
    """

    bucket_s: int
    at_s: Floats
    users: Floats
    requests_per_s: dict[str, Floats]
    tokens_per_s: dict[str, Floats]
    p50_ms: dict[str, Floats]
    p99_ms: dict[str, Floats]
    in_flight: Floats
    refused_per_s: Floats
    wrong_per_s: Floats
    running: dict[str, Floats]
    wanted: dict[str, Floats]


def timeline(run: Run, bucket_s: int | None = None) -> Timeline:
    """The run in buckets, of the length that suits its own, unless one is given."""
    elapsed_s = run.elapsed_s
    bucket_s = bucket_s or next((each for each in BUCKETS_S if elapsed_s / each <= MOST_POINTS), BUCKETS_S[-1])
    count = max(1, int(np.ceil(elapsed_s / bucket_s)))
    edges = np.arange(count + 1, dtype=float) * bucket_s

    def rate(requests: Requests, weights: Floats | None = None) -> Floats:
        at = np.minimum(requests.done_s // bucket_s, count - 1).astype(int)
        return np.bincount(at, weights, count) / bucket_s

    def percentile(requests: Requests, percent: float) -> Floats:
        cuts = np.searchsorted(requests.at_s, edges[1:-1])
        buckets = np.split(requests.latency_ms, cuts)
        return np.array([np.percentile(bucket, percent) if bucket.size else np.nan for bucket in buckets])

    right = run.requests.where(run.requests.right)
    wrong = is_wrong(run.requests)
    parts = {kind: right.where(right.kind == kind) for kind in kinds(run)} | {"": right}
    names = deployments(run)
    nobody = Replicas(0, 0)
    last = _last_samples(run.samples, edges[1:])
    return Timeline(
        bucket_s=bucket_s,
        at_s=edges[:-1],
        users=np.array([sample.users for sample in last], float),
        requests_per_s={kind: rate(part) for kind, part in parts.items()},
        tokens_per_s={kind: rate(part, part.tokens.astype(float)) for kind, part in parts.items()},
        p50_ms={kind: percentile(part, 50) for kind, part in parts.items()},
        p99_ms={kind: percentile(part, 99) for kind, part in parts.items()},
        in_flight=np.diff(_spent_s(run.requests, edges)) / bucket_s,
        refused_per_s=rate(run.requests.where(~run.requests.right & ~wrong)),
        wrong_per_s=rate(run.requests.where(wrong)),
        running={name: np.array([s.deployments.get(name, nobody).running for s in last], float) for name in names},
        wanted={name: np.array([s.deployments.get(name, nobody).wanted for s in last], float) for name in names},
    )


def _spent_s(requests: Requests, until_s: Floats) -> Floats:
    """Seconds that all requests together had been on their way, by each of these times."""

    def passed_s(moments: Floats) -> Floats:
        before = np.searchsorted(moments, until_s)
        return np.asarray(before * until_s - np.concatenate([[0.0], np.cumsum(moments)])[before])

    return passed_s(requests.at_s) - passed_s(np.sort(requests.done_s))


def _last_samples(samples: list[Sample], ends: Floats) -> list[Sample]:
    """The last sample before each end."""
    if not samples:
        return [Sample(0.0, 0, {})] * len(ends)
    places = np.searchsorted([sample.at_s for sample in samples], ends, side="right") - 1
    return [samples[max(place, 0)] for place in places]
