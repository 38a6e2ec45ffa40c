"""From inputs to vectors with stages computed by hand: order, coalescing, limits, and names that tell the truth."""

import asyncio
import gc
import time

import numpy as np
import pytest

from serve_app.answers import Embedded
from serve_app.catalog import Catalog
from serve_app.errors import EngineError, InvalidInput, ModelNotFound, ModelUnavailable, Overloaded, TooManyTokens
from serve_app.packing import ClientIds, Packed
from serve_app.pipeline import MAX_HELD_TOKENS, NEW_CHARACTERS, SHORT_CHARACTERS, Answer, Pipeline
from serve_app.settings import ModelSettings
from tests.hand import FRAME, HandStages, served, vector
from tests.model import MODEL as STAND_IN

FAR = time.monotonic() + 3600


def pipeline(stages: HandStages, max_request_tokens: int = 10_000, batch_tokens: int = 64) -> Pipeline:
    return Pipeline(ModelSettings(batch_tokens=batch_tokens, aliases=("ivy",)), stages, max_request_tokens)


async def test_vectors_come_in_the_order_of_the_inputs_across_many_calls() -> None:
    stages = HandStages()
    texts = ["x" * (1 + number % 14) + str(number % 7) for number in range(200)]
    answer = await pipeline(stages).embed(texts, FAR)
    assert np.allclose(answer.vectors, [vector(text) for text in texts])
    assert answer.tokens == sum(min(len(text) + 2, 16) for text in texts)
    assert len(stages.tokens_by_call) > 20 and max(stages.tokens_by_call) <= 64


async def test_requests_that_arrive_while_calls_are_in_flight_leave_together() -> None:
    stages = HandStages()
    shared = pipeline(stages, batch_tokens=4096)
    texts = [f"{number:3} " + "é" * NEW_CHARACTERS for number in range(100)]
    answers = await asyncio.gather(*(shared.embed([text], FAR) for text in texts))
    assert np.allclose(np.concatenate([answer.vectors for answer in answers]), [vector(text) for text in texts])
    # 31 of these texts are a full call, and full calls need no place in flight
    assert len(stages.texts_by_call) <= 5
    assert len(stages.tokens_by_call) <= 5


async def test_who_is_answered_and_asks_again_leaves_with_those_who_waited() -> None:
    began, gate = asyncio.Event(), asyncio.Event()

    class Slow(HandStages):
        async def infer(self, packed: Packed, deadline: float, is_bulk: bool = False) -> Embedded:
            embedded = await super().infer(packed, deadline, is_bulk)
            began.set()
            await gate.wait()
            return embedded

    stages = Slow()
    model = pipeline(stages)
    await model.discover(FAR)

    async def ask_twice() -> None:
        await model.embed(["ab"], FAR)
        await model.embed(["abcd"], FAR)

    asked = [asyncio.create_task(ask_twice()) for _ in range(2)]
    await began.wait()
    waited = asyncio.create_task(model.embed(["abcdef"], FAR))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*asked, waited)
    assert stages.tokens_by_call == [4 + 4, 8 + 6 + 6]


@pytest.mark.parametrize(("character", "limit"), [("x", SHORT_CHARACTERS), ("é", NEW_CHARACTERS)])
async def test_a_short_text_is_tokenized_where_it_arrives_and_a_long_one_by_the_stage(
    character: str, limit: int
) -> None:
    stages = HandStages()
    for characters in (1, limit, limit + 1):
        text = character * characters
        assert np.allclose((await pipeline(stages).embed([text], FAR)).vectors, [vector(text)])
        assert stages.texts_by_call == ([1] if characters > limit else [])


async def test_token_ids_need_no_tokenizer() -> None:
    stages = HandStages()
    sent = ClientIds(np.array([101, 72, 105, 102, 72, 105]), np.array([4, 2], np.int32))
    answer = await pipeline(stages).embed(sent, FAR)
    assert np.allclose(answer.vectors, [vector("Hi")] * 2)
    assert stages.texts_by_call == []


async def test_cut_inputs_are_counted_or_refused() -> None:
    texts = ["fits in", "x" * 14, "x" * 15, "far too long for sixteen tokens"]
    assert (await pipeline(HandStages()).embed(texts, FAR)).truncated == 2
    with pytest.raises(InvalidInput, match="maximum context length is 16 tokens, however input 2 has at least 17"):
        await pipeline(HandStages()).embed(texts, FAR, refuse_truncation=True)
    assert (await pipeline(HandStages()).embed(texts[:2], FAR, refuse_truncation=True)).truncated == 0


@pytest.mark.parametrize(("limit", "fits"), [(29, False), (30, True), (31, True)])
async def test_the_limit_on_tokens_at_its_edges(limit: int, fits: bool) -> None:
    embedding = pipeline(HandStages(), max_request_tokens=limit).embed(["abc"] * 6, FAR)
    if fits:
        assert (await embedding).tokens == 30
    else:
        with pytest.raises(TooManyTokens, match=f"Requested 30 tokens, max {limit}"):
            await embedding


async def test_a_failed_call_fails_its_requests_and_the_next_one_works() -> None:
    stages = HandStages()
    shared = pipeline(stages)
    await shared.embed(["warm"], FAR)
    stages.failure = EngineError("broken")
    with pytest.raises(EngineError, match="broken"):
        await shared.embed(["x" * 14] * 30, FAR)
    stages.failure = None
    assert np.allclose((await shared.embed(["again"], FAR)).vectors, [vector("again")])


async def test_an_answer_is_never_a_mixture_of_two_weights() -> None:
    stages = HandStages()
    texts = [f"text {number}" for number in range(30)]
    stages.weights = ["w8s", "other"]  # a replica of other weights answers one of the first round's calls
    answer = await pipeline(stages).embed(texts, FAR)
    assert np.allclose(answer.vectors, [vector(text) for text in texts])
    stages.weights = ["other"] * 100
    with pytest.raises(ModelUnavailable, match="changing to other weights"):
        await pipeline(stages).embed(texts, FAR)


async def test_ids_of_one_tokenizer_are_never_computed_by_the_model_of_another() -> None:
    stages = HandStages()
    shared = pipeline(stages)
    await shared.embed(["before"], FAR)
    stages.weights, stages.tokenizer = ["other"], "an0ther"  # replicas of another revision take their place
    with pytest.raises(ModelUnavailable, match="changing to other weights"):
        await shared.embed(["during"], FAR)
    assert np.allclose((await shared.embed(["after"], FAR)).vectors, [vector("after")])


async def test_a_text_that_only_tries_it_out_is_not_counted_as_work() -> None:
    stages = HandStages()
    shared = pipeline(stages)
    await asyncio.gather(*(shared.try_out() for _ in range(9)))  # who ask at once share
    assert stages.tokens_by_call == [len("ready?") + 2]
    assert [sum(queue.asked_cost for queue in queues) for queues in shared.queues] == [0, 0]
    await shared.embed(["four"], FAR)
    assert [sum(queue.asked_cost for queue in queues) for queues in shared.queues] == [0, 6]


async def test_all_who_ask_at_once_what_is_served_share_one_question() -> None:
    stages = HandStages()
    shared = pipeline(stages)
    await asyncio.gather(*(shared.embed([f"text {number}"], FAR) for number in range(20)))
    assert stages.descriptions == 1
    await shared.discover(FAR)
    assert stages.descriptions == 2


def catalog(*stages: HandStages) -> Catalog:
    settings = [ModelSettings(aliases=("ivy",), sources=("hub", "embedded")), ModelSettings(id="other/model")]
    return Catalog([Pipeline(model, stage, 1000) for model, stage in zip(settings, stages, strict=False)])


async def test_every_name_finds_its_model_and_only_served_ones_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.catalog.FIRST_WORD_S", 0.0)
    models = catalog(HandStages(), HandStages("other/model"))
    await models.pipelines[0].discover(FAR)
    assert [name for name, _, _ in models.served()] == ["Mihaiii/Ivysaur", "ivy"]
    for name in ("ivy", "Mihaiii/Ivysaur"):
        assert await models.find(name, FAR) == (models.pipelines[0], models.pipelines[0].served)
    with pytest.raises(ModelUnavailable, match="`other/model` is loading"):
        await models.find("other/model", FAR)
    with pytest.raises(
        ModelNotFound, match=r"`gpt` does not exist here. Models that are served: `Mihaiii/Ivysaur`, `ivy`"
    ):
        await models.find("gpt", FAR)


async def test_a_stand_in_answers_to_its_own_name_alone() -> None:
    models = catalog(HandStages(STAND_IN))
    await models.pipelines[0].discover(FAR)
    assert [name for name, _, _ in models.served()] == [STAND_IN]
    assert await models.find(STAND_IN, FAR) == (models.pipelines[0], served(STAND_IN))
    for name in ("Mihaiii/Ivysaur", "ivy"):
        with pytest.raises(ModelNotFound, match=r"all-MiniLM-L6-v2` was loaded in its place .* .setting `sources`"):
            await models.find(name, FAR)


async def test_who_asks_before_the_replicas_have_spoken_waits_for_their_first_word() -> None:
    models = catalog(HandStages(STAND_IN))
    asking = [asyncio.create_task(models.find(name, FAR)) for name in (STAND_IN, "ivy")]
    with pytest.raises(ModelNotFound, match="`gpt` does not exist"):
        await models.find("gpt", FAR)  # nothing may turn out to serve that
    listing = asyncio.create_task(models.listed(FAR))
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in (*asking, listing))
    await models.pipelines[0].discover(FAR)
    found, stood_in = await asyncio.gather(*asking, return_exceptions=True)
    assert found == (models.pipelines[0], served(STAND_IN)) and isinstance(stood_in, ModelNotFound)
    assert [name for name, _, _ in await listing] == [STAND_IN]


async def test_nobody_waits_for_another_models_first_word_or_past_the_deadline() -> None:
    models = catalog(HandStages(), HandStages("other/model"))
    await models.pipelines[0].discover(FAR)
    assert (await models.find("ivy", FAR))[0] is models.pipelines[0]
    started = time.monotonic()
    with pytest.raises(ModelUnavailable, match="`other/model` is loading"):
        await models.find("other/model", started + 0.3)
    assert [name for name, _, _ in await models.listed(started + 0.3)] == ["Mihaiii/Ivysaur", "ivy"]
    assert time.monotonic() < started + 0.3, "no time is left to refuse it as it should be"


def held(shared: Pipeline, tokens: int, tokens_per_s: float, bulk: bool = False) -> None:
    """As if so many tokens waited, and the models did so many a second."""
    queue = shared.queues[1][bulk]
    queue.unfinished_cost = queue._running_cost = tokens
    queue.pace.told = tokens_per_s


async def test_what_would_come_too_late_is_refused_before_any_work_and_says_when_to_come_back() -> None:
    stages = HandStages()
    stages.tokens_per_s = 100.0
    shared = pipeline(stages)
    await shared.embed(["first"], FAR)
    held(shared, 1000, 100.0)
    calls = len(stages.tokens_by_call)
    with pytest.raises(Overloaded, match=r"takes about 10\.0 s, too long .* within 12\.0 s") as refused:
        await shared.embed(["too late"], time.monotonic() + 12)
    assert refused.value.retry_after_s == pytest.approx(1.0, abs=0.1)
    assert len(stages.tokens_by_call) == calls
    await shared.embed(["in time"], time.monotonic() + 14)


def one_by_one(texts: list[str]) -> ClientIds:
    """Texts as the ids of their characters."""
    return ClientIds(
        np.array([ord(each) for text in texts for each in text], np.int64), np.array(list(map(len, texts)))
    )


async def test_a_long_list_that_waits_refuses_no_short_text() -> None:
    stages = HandStages()
    stages.tokens_per_s = 100.0
    shared = pipeline(stages)
    await shared.embed(["first"], FAR)
    held(shared, 10_000, 100.0, bulk=True)
    soon = time.monotonic() + 5
    await shared.embed(["short"], soon)
    for sent in (["x" * 70] * 10, one_by_one(["x" * 17] * 2)):
        with pytest.raises(Overloaded):
            await shared.embed(sent, soon)


@pytest.mark.parametrize("sent", [["x" * 1000], one_by_one(["x" * 1000])], ids=["text", "ids"])
async def test_a_single_text_is_short_however_much_of_it_will_be_cut(sent: list[str] | ClientIds) -> None:
    stages = HandStages()
    stages.tokens_per_s = 100.0
    shared = pipeline(stages)
    await shared.embed(["first"], FAR)
    held(shared, 10_000, 100.0, bulk=True)
    assert (await shared.embed(sent, time.monotonic() + 5)).tokens == FRAME.max_tokens
    held(shared, 10_000, 100.0)
    with pytest.raises(Overloaded):
        await shared.embed(sent, time.monotonic() + 5)


async def test_what_is_held_is_bounded_while_nobody_knows_how_long_it_takes() -> None:
    shared = pipeline(HandStages())
    await shared.embed(["first"], FAR)
    held(shared, MAX_HELD_TOKENS + 1, 0.0)
    with pytest.raises(Overloaded, match=f"the limit is {MAX_HELD_TOKENS}"):
        await shared.embed(["one more"], FAR)


async def test_an_input_without_a_vector_fails_its_own_request_alone() -> None:
    class Poisoned(HandStages):
        async def infer(self, packed: Packed, deadline: float, is_bulk: bool = False) -> Embedded:
            whole = await super().infer(packed, deadline, is_bulk)
            bad = np.isin(np.cumsum(packed.lengths) - packed.lengths, np.flatnonzero(packed.ids == ord("!")) - 1)
            whole.vectors[bad] = np.nan
            return whole

    shared = pipeline(Poisoned())
    answers = await asyncio.gather(*(shared.embed([text], FAR) for text in ("a", "!", "b")), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Answer, EngineError, Answer]


async def test_a_request_that_failed_leaves_nothing_to_the_garbage_collector() -> None:
    """Of several pieces, each of which fails with the same error."""
    stages = HandStages()
    shared = pipeline(stages)
    await shared.embed(["first"], FAR)
    stages.failure = EngineError("it fails at all")
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(EngineError, match="it fails at all"):
            await shared.embed(["x" * 12] * 20, FAR)
        stages.failure = None
        await asyncio.sleep(0.01)
        assert gc.collect() == 0
    finally:
        gc.enable()
