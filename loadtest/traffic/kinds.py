"""Who uses the service: what each kind of user asks for, how long they pause, and how late an answer may come.

A script is an endless iterator of requests, a pure function of its random source: the same users ask for the same texts
in every run. What the pause counts from, and what sends the requests, is told in users.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from loadtest.workload import SEED, WORDS

# All texts come from these and from PASSAGES, so that each comes again, in other company and at another place, and its
# vector can be held against the one that it had before.
QUERIES = (
    "how do i return shoes that do not fit",
    "change delivery address after ordering",
    "is the garden open in winter",
    "cheap trains to the mountains on friday",
    "recipe for blueberry cake without eggs",
    "reset password without access to email",
    "quiet dishwasher for a small kitchen",
    "when does the night market close",
    "learn to ride a bicycle as an adult",
    "doctor appointment on saturday morning",
    "waterproof coat for children",
    "send a letter from abroad",
    "invoice for last month missing",
    "best book on the history of science",
    "library opening hours during holidays",
    "noise cancelling headphones for travel",
    "plants that grow without much light",
    "rent a house near the river",
    "refund for a cancelled concert",
    "cancel my subscription",
)
KEYS_BEFORE_FIRST_QUERY = 3  # fewer letters say nothing, and no search box asks for them
# Seconds between keys: 0.24 on average, log-normal. Dhakal et al., "Observations on Typing from 136 Million
# Keystrokes" (CHI 2018), mean inter-key interval of 168,000 people.
KEY_S, KEY_SIGMA = 0.24, 0.4


@dataclass(frozen=True, slots=True)
class Step:
    """One request, and the pause in seconds before the same user's next."""

    texts: list[str]
    pause_s: float


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of user; `weight` is its share among the users, `p99_ms` the objective unless another one is given."""

    name: str
    weight: int
    p99_ms: float
    script: Callable[[Random], Iterator[Step]]


def between(source: Random, fewest: int, most: int) -> int:
    """A whole number, log-uniform: as many below the geometric middle as above it."""
    return int(math.exp(source.uniform(math.log(fewest), math.log(most + 1))))


def _passages() -> tuple[str, ...]:
    source = Random(f"{SEED} passages")
    return tuple(" ".join(source.choices(WORDS, k=between(source, 2, 200))) for _ in range(600))


PASSAGES = _passages()
# Asked for alone and one by one before the load, so that what is held against them doesn't rest on lists.
KNOWN = (*QUERIES[:8], *PASSAGES[:8])


def of_words(fewest: int, most: int) -> list[str]:
    """The passages of so many words."""
    return [text for text in PASSAGES if fewest <= text.count(" ") + 1 <= most]


def autocomplete(source: Random) -> Iterator[Step]:
    """Somebody types a query: a request a key, then they read what was found."""
    while True:
        query = source.choice(QUERIES)
        for typed in range(KEYS_BEFORE_FIRST_QUERY, len(query)):
            pause_s = source.lognormvariate(math.log(KEY_S) - KEY_SIGMA**2 / 2, KEY_SIGMA)
            yield Step([query[:typed]], pause_s)
        yield Step([query], source.uniform(2, 6))


def rag(source: Random) -> Iterator[Step]:
    """An application that answers from documents: a question and the passages that it ranks, in one request."""
    passages = of_words(40, 160)
    while True:
        found = source.sample(passages, source.randint(4, 8))
        yield Step([source.choice(QUERIES), *found], source.expovariate(1 / 3))


def indexer(source: Random) -> Iterator[Step]:
    """A bulk job: big lists of chunks, and between them the time to store one and to read the next."""
    chunks = of_words(16, 128)
    while True:
        yield Step(source.sample(chunks, source.randint(64, 128)), source.uniform(4, 8))


def mixed(source: Random) -> Iterator[Step]:
    """A tenant behind a gateway, where everything comes: from one short text to a list of long ones."""
    while True:
        yield Step(source.sample(PASSAGES, between(source, 1, 16)), source.expovariate(1 / 2))


def notebook(source: Random) -> Iterator[Step]:
    """A program with OpenAI's client: a handful of sentences at a time."""
    sentences = of_words(8, 32)
    while True:
        yield Step(source.sample(sentences, source.randint(1, 8)), source.expovariate(1))


KINDS = {
    kind.name: kind
    for kind in (
        # What two cores keep to, where a query may wait behind a whole list of an indexer.
        Kind("autocomplete", 12, 1_000, autocomplete),
        Kind("rag", 3, 1_500, rag),
        Kind("indexer", 1, 5_000, indexer),
        Kind("mixed", 2, 2_000, mixed),
        Kind("openai", 2, 1_500, notebook),
    )
}
