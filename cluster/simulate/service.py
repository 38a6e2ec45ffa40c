"""The service, event by event: ingress replicas that hold requests, and model replicas that take what waits.

The rules are serve_app's own: when an ingress sends what waits as a call, when a replica takes what waits as a batch,
and how much of it (scheduler.Slots). A call goes to the replica that has the least of this ingress's work (pool.py).
"""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise
from random import Random
from typing import Any, NamedTuple

import numpy as np

from cluster.simulate.arrivals import Arrivals
from serve_app.pipeline import FULL_CALLS_A_LANE
from serve_app.rate import Rate
from serve_app.scheduler import Slots

# Outdated entries of an ingress's heap for each replica, over which it is built anew.
OUTDATED_ENTRIES = 8
# A request of more than this is a list of texts, and can be cut between them.
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Costs:
    """What things take: of a batch, of a replica's start, and of a request besides."""

    launch_s: float = 0.005
    token_s: float = 0.001
    batch_tokens: int = 1280
    lanes: int = 1  # batches that one replica runs at once, each in the time given here
    lane_tokens: int = 1  # least tokens of a batch that runs beside another
    start_s: float = 10.0  # from the decision until a replica takes calls
    notice_s: float = 1.0  # until every ingress knows of it
    request_s: float = 0.003  # in the ingress and on the way
    ingresses: int = 1

    def batch_s(self, tokens: int) -> float:
        """How long the engine takes for a batch."""
        return self.launch_s + self.token_s * tokens

    @property
    def rate(self) -> float:
        """Tokens/s of one replica that always has a full batch."""
        return self.lanes * self.batch_tokens / self.batch_s(self.batch_tokens)


class Ingress:
    """One ingress replica, with its own view of which model replica has the least work."""

    __slots__ = (
        "asked", "heap", "in_flight", "in_flight_tokens", "loads", "partial", "slots", "unsent", "waiting",
        "waiting_tokens",
    )  # fmt: skip

    def __init__(self, costs: Costs) -> None:
        self.slots = Slots(costs.batch_tokens, lanes=costs.lanes, lane_cost=costs.lane_tokens)
        self.waiting: deque[tuple[int, int]] = deque()  # requests, or pieces of them, each with its tokens
        self.waiting_tokens = 0
        self.asked = 0  # tokens that ever came
        self.in_flight = 0  # calls
        self.in_flight_tokens = 0
        self.partial = 0  # of these, the ones that are not full
        self.unsent: deque[Call] = deque()  # of these, the ones for which there is no replica
        self.loads: dict[Replica, int] = {}  # tokens of this ingress's calls
        self.heap: list[tuple[int, float, int, Replica]] = []  # the same, some of it outdated


class Replica:
    """One model replica."""

    __slots__ = ("is_leaving", "number", "partial", "rate", "running", "slots", "tokens", "waiting", "waiting_tokens")

    def __init__(self, number: int, costs: Costs) -> None:
        self.number = number
        self.slots = Slots(costs.batch_tokens, lanes=costs.lanes, lane_cost=costs.lane_tokens)
        self.waiting: deque[Call] = deque()
        self.waiting_tokens = 0
        self.running = 0  # batches
        self.partial = 0  # of these, the ones that are not full
        self.tokens = 0  # of all calls that it has
        self.is_leaving = False
        self.rate = Rate(costs.batch_tokens)
        for _ in range(costs.lanes):  # side by side
            self.rate.record(costs.batch_tokens, -costs.batch_s(costs.batch_tokens) / costs.lanes, 0.0)


@dataclass(slots=True)
class Call:
    """What an ingress sends to a replica at a time."""

    ingress: Ingress
    requests: list[int]
    tokens: int
    is_full: bool


class Batch(NamedTuple):
    """What a replica computes at a time."""

    replica: Replica
    calls: list[Call]
    tokens: int
    is_full: bool
    started: float


class Service:
    """Replays arrivals; replicas come and go as `start` and `stop` say, which are called by what `every` calls."""

    def __init__(self, costs: Costs, arrivals: Arrivals, replicas: int, seed: int = 0) -> None:
        self.costs = costs
        self.now = 0.0
        self.ingresses = [Ingress(costs) for _ in range(costs.ingresses)]
        self.replicas: list[Replica] = []  # that take calls
        self.starting: dict[Replica, float] = {}  # -> when it began
        self.replica_s = 0.0  # of the replicas that have ended
        self.latency_s = np.full(len(arrivals), np.nan)
        self.unanswered_requests = 0
        self.batches = 0  # that were done
        self.batch_tokens = 0  # in them
        self._arrivals = arrivals
        self._pieces = [1] * len(arrivals)  # of each request, that are not answered
        self._random = Random(seed)
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = count()
        self._numbers = count()
        self._began: dict[Replica, float] = {}
        for _ in range(replicas):
            replica = self._new_replica()
            self._add(replica)
            self._notice(replica)

    def at(self, time_s: float, act: Callable[[Any], None], what: Any = None) -> None:
        """Call `act(what)` at that time."""
        heapq.heappush(self._events, (time_s, next(self._order), act, what))

    def run(self, until_s: float) -> None:
        """Replay all arrivals, and go on until that time, and until every request is answered."""
        times, sizes = self._arrivals.at_s.tolist(), self._arrivals.tokens.tolist()
        events, ingresses = self._events, self.ingresses
        upcoming, total = 0, len(times)
        next_s = times[0] if times else math.inf
        while events or upcoming < total:
            if upcoming < total and (not events or next_s <= events[0][0]):
                self.now = next_s
                self._arrive(ingresses[upcoming % len(ingresses)], upcoming, sizes[upcoming])
                upcoming += 1
                next_s = times[upcoming] if upcoming < total else math.inf
                continue
            time_s, _, act, what = heapq.heappop(events)
            if time_s > until_s and upcoming == total and not self.unanswered_requests:
                break
            self.now = time_s
            act(what)
        self.now = max(self.now, until_s)

    def start(self) -> None:
        """Start one replica, which takes a while."""
        replica = self._new_replica()
        self.starting[replica] = self.now
        self.at(self.now + self.costs.start_s, self._started, replica)

    def stop(self) -> None:
        """Stop one replica as Serve chooses it: one that is only starting, or the newest. It finishes what it has."""
        if self.starting:
            replica, _ = self.starting.popitem()
            self._end(replica)
            return
        replica = self.replicas.pop()
        replica.is_leaving = True
        for ingress in self.ingresses:
            ingress.loads.pop(replica, None)
        if not replica.running:
            self._end(replica)

    def held_tokens(self, ingress: Ingress) -> int:
        """What an ingress holds that no replica has."""
        return ingress.waiting_tokens + sum(call.tokens for call in ingress.unsent)

    def replica_seconds(self) -> float:
        """Of all replicas until now, from the decision to start one to its end."""
        return self.replica_s + sum(self.now - began for began in self._began.values())

    def _new_replica(self) -> Replica:
        replica = Replica(next(self._numbers), self.costs)
        self._began[replica] = self.now
        return replica

    def _started(self, replica: Replica) -> None:
        if self.starting.pop(replica, None) is not None:  # else it was stopped meanwhile
            self._add(replica)
            self.at(self.now + self._random.uniform(0, self.costs.notice_s), self._notice, replica)

    def _add(self, replica: Replica) -> None:
        self.replicas.append(replica)

    def _notice(self, replica: Replica) -> None:
        if replica.is_leaving:
            return
        for ingress in self.ingresses:
            self._weigh(ingress, replica, 0)
            while ingress.unsent:
                self._send(ingress, ingress.unsent.popleft())
            self._dispatch(ingress)

    def _end(self, replica: Replica) -> None:
        self.replica_s += self.now - self._began.pop(replica)

    def _arrive(self, ingress: Ingress, request: int, tokens: int) -> None:
        self.unanswered_requests += 1
        ingress.asked += tokens
        ingress.waiting_tokens += tokens
        budget = self.costs.batch_tokens
        if tokens > (text_tokens := min(TEXT_TOKENS, budget)):
            texts, least = math.ceil(tokens / text_tokens), math.ceil(tokens / budget)
            self._pieces[request] = pieces = min(texts, max(least, ingress.slots.pieces(tokens)))
            edges = [tokens * number // pieces for number in range(pieces + 1)]
            ingress.waiting.extend((request, after - before) for before, after in pairwise(edges))
        else:
            ingress.waiting.append((request, tokens))
        self._dispatch(ingress)

    def _dispatch(self, ingress: Ingress) -> None:
        slots, waiting = ingress.slots, ingress.waiting
        slots.workers = max(1, len(ingress.loads))
        slots.full_concurrency = slots.workers * slots.lanes * FULL_CALLS_A_LANE
        while waiting and slots.may_start(ingress.waiting_tokens, ingress.in_flight, ingress.partial):
            share = slots.share(ingress.waiting_tokens, ingress.partial, ingress.in_flight_tokens)
            request, spent = waiting.popleft()
            requests = [request]
            while waiting and spent + waiting[0][1] <= share:
                request, tokens = waiting.popleft()
                requests.append(request)
                spent += tokens
            is_full = share >= slots.budget
            ingress.waiting_tokens -= spent
            ingress.in_flight += 1
            ingress.in_flight_tokens += spent
            ingress.partial += not is_full
            self._send(ingress, Call(ingress, requests, spent, is_full))

    def _send(self, ingress: Ingress, call: Call) -> None:
        heap, loads = ingress.heap, ingress.loads
        while heap:
            load, _, _, replica = heapq.heappop(heap)
            if loads.get(replica) == load:
                self._weigh(ingress, replica, load + call.tokens)
                replica.waiting.append(call)
                replica.waiting_tokens += call.tokens
                replica.tokens += call.tokens
                self._begin(replica)
                return
        ingress.unsent.append(call)

    def _weigh(self, ingress: Ingress, replica: Replica, load: int) -> None:
        loads, heap = ingress.loads, ingress.heap
        loads[replica] = load
        if len(heap) > OUTDATED_ENTRIES * (len(loads) + 1):
            heap[:] = [(known, self._random.random(), each.number, each) for each, known in loads.items()]
            heapq.heapify(heap)
        else:
            heapq.heappush(heap, (load, self._random.random(), replica.number, replica))

    def _begin(self, replica: Replica) -> None:
        waiting, slots = replica.waiting, replica.slots
        while waiting and slots.may_start(replica.waiting_tokens, replica.running, replica.partial):
            share = slots.share(replica.waiting_tokens, replica.partial, replica.tokens - replica.waiting_tokens)
            calls = [waiting.popleft()]
            spent = calls[0].tokens
            while waiting and spent + waiting[0].tokens <= share:
                calls.append(waiting.popleft())
                spent += calls[-1].tokens
            batch = Batch(replica, calls, spent, share >= slots.budget, self.now)
            replica.waiting_tokens -= spent
            replica.running += 1
            replica.partial += not batch.is_full
            self.at(self.now + self.costs.batch_s(spent), self._finish, batch)

    def _finish(self, batch: Batch) -> None:
        replica = batch.replica
        replica.tokens -= batch.tokens
        replica.running -= 1
        replica.partial -= not batch.is_full
        self.batches += 1
        self.batch_tokens += batch.tokens
        replica.rate.record(batch.tokens, batch.started, self.now)
        self._begin(replica)
        if replica.is_leaving and not replica.running:
            self._end(replica)
        arrived, pieces = self._arrivals.at_s, self._pieces
        answered_s = self.now + self.costs.request_s
        for call in batch.calls:
            for request in call.requests:
                pieces[request] -= 1
                if not pieces[request]:
                    self.latency_s[request] = answered_s - arrived[request]
                    self.unanswered_requests -= 1
            ingress = call.ingress
            ingress.in_flight -= 1
            ingress.in_flight_tokens -= call.tokens
            ingress.partial -= not call.is_full
            if replica in ingress.loads:
                self._weigh(ingress, replica, ingress.loads[replica] - call.tokens)
            self._dispatch(ingress)
