"""The queue's laws: no job waits while the worker is idle, batches grow while it is busy, each is answered once."""

import asyncio
import gc
import time
import weakref
from collections.abc import Sequence
from contextvars import ContextVar

import pytest

from serve_app.errors import CallerGone, DeadlineExceeded, EngineError
from serve_app.scheduler import Entry, Scheduler, Slots

FAR = time.monotonic() + 3600


class Worker:
    """A worker that a test holds open: it records its batches and finishes one each time it is let to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.began = asyncio.Semaphore(0)
        self.may_finish = asyncio.Semaphore(0)
        self.failure: BaseException | None = None

    async def run(self, entries: Sequence[Entry[int, int]]) -> list[int]:
        self.batches.append([entry.job for entry in entries])
        self.began.release()
        await self.may_finish.acquire()
        if self.failure is not None:
            raise self.failure
        return [entry.job * 10 for entry in entries]

    def let_finish(self, batches: int = 1) -> None:
        for _ in range(batches):
            self.may_finish.release()


@pytest.fixture
def worker() -> Worker:
    return Worker()


def submit(scheduler: Scheduler[int, int], *jobs: int, cost: int = 1, deadline: float = FAR) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(scheduler.submit(job, cost, deadline)) for job in jobs]


async def turns() -> None:
    """Let everything that can run now run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_job_starts_at_once_while_the_worker_is_idle(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=100)
    [task] = submit(scheduler, 1)
    await turns()
    assert worker.batches == [[1]]
    worker.let_finish()
    assert await task == 10
    assert repr(scheduler) == "<Scheduler waiting=0 running=0>"


async def test_jobs_of_one_turn_leave_together(worker: Worker) -> None:
    tasks = submit(Scheduler(worker.run, budget=100), 1, 2, 3)
    await worker.began.acquire()
    worker.let_finish()
    assert await asyncio.gather(*tasks) == [10, 20, 30]
    assert worker.batches == [[1, 2, 3]]


async def test_batches_grow_while_the_worker_is_busy_and_start_the_moment_it_is_free(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=100)
    tasks = submit(scheduler, 0)
    await worker.began.acquire()
    for job in range(1, 31):  # thirty turns of the loop, one arrival each: none may start, none may be left behind
        tasks += submit(scheduler, job)
        await turns()
    assert worker.batches == [[0]]
    assert repr(scheduler) == "<Scheduler waiting=30 running=1>"
    worker.let_finish(2)
    assert await asyncio.gather(*tasks) == [job * 10 for job in range(31)]
    assert worker.batches == [[0], list(range(1, 31))]


async def test_no_job_waits_while_the_worker_is_idle() -> None:
    """Over a random load, every moment with a job waiting has the worker at work."""
    idle_with_work = 0
    running = 0

    async def run(entries: Sequence[Entry[int, int]]) -> list[int]:
        nonlocal running
        running += 1
        await asyncio.sleep(0.002)
        running -= 1
        return [entry.job for entry in entries]

    scheduler = Scheduler(run, budget=7)
    tasks: list[asyncio.Task[int]] = []
    for job in range(400):
        tasks += submit(scheduler, job, cost=1 + job % 9)
        await asyncio.sleep(0.0005 if job % 5 else 0.003)
        await turns()
        idle_with_work += bool(scheduler.waiting_cost and not running)
    assert await asyncio.gather(*tasks) == list(range(400))
    assert idle_with_work == 0


@pytest.mark.parametrize(
    ("budget", "sizes"), [(1, [1, 1, 1, 1]), (2, [1, 1, 1, 1]), (4, [2, 2]), (5, [2, 2]), (6, [3, 1]), (8, [4])]
)
async def test_a_batch_holds_what_fits_the_budget(worker: Worker, budget: int, sizes: list[int]) -> None:
    scheduler = Scheduler(worker.run, budget)
    tasks = submit(scheduler, 1, 2, 3, 4, cost=2)
    worker.let_finish(4)
    await asyncio.gather(*tasks)
    assert [len(batch) for batch in worker.batches] == sizes


async def test_workers_bound_the_batches_in_flight(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=1, workers=3)
    tasks = submit(scheduler, 1, 2, 3, 4, 5)
    await turns()
    assert len(worker.batches) == 3
    worker.let_finish(5)
    assert await asyncio.gather(*tasks) == [10, 20, 30, 40, 50]


async def test_full_batches_need_not_wait_for_a_place_but_partial_ones_do(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=2, full_concurrency=3)
    tasks = submit(scheduler, 1)
    await worker.began.acquire()
    tasks += submit(scheduler, 2)  # half a batch: waits
    await turns()
    assert worker.batches == [[1]]
    tasks += submit(scheduler, 3, 4, 5, 6, 7)  # with it three full ones, of which two find a place
    await turns()
    assert worker.batches == [[1], [2, 3], [4, 5]]
    worker.let_finish(5)
    assert await asyncio.gather(*tasks) == [10, 20, 30, 40, 50, 60, 70]
    assert worker.batches == [[1], [2, 3], [4, 5], [6, 7]]
    assert scheduler.waiting_cost == 0


async def test_a_partial_batch_does_not_wait_for_full_ones(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=2, full_concurrency=8)
    bulk = submit(scheduler, *range(6))
    await turns()
    [short] = submit(scheduler, 9)
    await turns()
    assert worker.batches == [[0, 1], [2, 3], [4, 5], [9]]
    [next_short] = submit(scheduler, 10)
    await turns()
    assert worker.batches[4:] == []  # one partial batch at a time
    worker.let_finish(5)
    assert await asyncio.gather(*bulk, short, next_short) == [0, 10, 20, 30, 40, 50, 90, 100]


async def test_what_waits_is_shared_between_all_that_are_free(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=640, workers=2, lanes=2, lane_cost=10)
    tasks = submit(scheduler, *range(8), cost=10)
    await turns()
    assert worker.batches == [[0, 1], [2, 3], [4, 5], [6, 7]]
    worker.let_finish(4)
    assert await asyncio.gather(*tasks) == [job * 10 for job in range(8)]


async def test_a_second_lane_is_for_what_is_worth_a_batch_of_its_own(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=640, lanes=2, lane_cost=10)
    tasks = submit(scheduler, 0)
    await worker.began.acquire()
    assert not scheduler.has_room
    tasks += submit(scheduler, *range(1, 10))  # 9, one less than a lane's
    await turns()
    assert worker.batches == [[0]]
    tasks += submit(scheduler, 10)
    await turns()
    assert worker.batches == [[0], list(range(1, 11))]
    tasks += submit(scheduler, 11, cost=640)  # no lane is left, not even for a full batch
    await turns()
    assert len(worker.batches) == scheduler.running == 2
    worker.let_finish(3)
    assert await asyncio.gather(*tasks) == [job * 10 for job in range(12)]


@pytest.mark.parametrize(("turns_between", "second"), [(0, [2]), (4, [2, 10, 11])])
async def test_who_is_answered_and_asks_again_leaves_with_those_who_waited(
    worker: Worker, turns_between: int, second: list[int]
) -> None:
    scheduler = Scheduler(worker.run, budget=100, turns=turns_between)

    async def ask_twice(job: int) -> int:
        await scheduler.submit(job, 1, FAR)
        return await scheduler.submit(job + 10, 1, FAR)

    tasks = [asyncio.create_task(ask_twice(job)) for job in range(2)]
    await worker.began.acquire()
    tasks += submit(scheduler, 2)
    worker.let_finish()
    await worker.began.acquire()
    assert worker.batches == [[0, 1], second]
    worker.let_finish(2)
    assert await asyncio.gather(*tasks) == [100, 110, 20]


async def test_while_another_batch_runs_the_next_one_waits_for_nobody(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=100, workers=2, turns=4)

    async def ask_twice() -> int:
        await scheduler.submit(0, 1, FAR)
        return await scheduler.submit(10, 1, FAR)

    tasks = [asyncio.create_task(ask_twice())]
    await worker.began.acquire()
    tasks += submit(scheduler, 1)
    await worker.began.acquire()
    tasks += submit(scheduler, 2)
    await turns()
    worker.let_finish()
    await worker.began.acquire()
    assert worker.batches == [[0], [1], [2]]
    worker.let_finish(3)
    assert await asyncio.gather(*tasks) == [100, 10, 20]


@pytest.mark.parametrize(
    ("slots", "waiting", "running", "share"),
    [
        (Slots(1024, lanes=2, lane_cost=128), 300, [], 150),
        (Slots(1024, lanes=2, lane_cost=128), 200, [], 200),  # two lanes would have too little
        (Slots(1024, workers=2, lanes=2, lane_cost=128), 100, [], 50),  # but no worker idles for that
        (Slots(1024, lanes=2, lane_cost=9999), 10, [], 10),  # which is not a full batch
        (Slots(1024, lanes=2, lane_cost=128), 9999, [], 1024),
        (Slots(1024, workers=4), 600, [60, 60, 60], 195),  # a fourth of all, though only one worker is free
        (Slots(1024, workers=4, lane_cost=128), 100, [10, 10, 10], 100),  # a fourth would be too little for a batch
        (Slots(1024, lanes=2, lane_cost=128), 600, [60], 330),  # the lane that is free leaves the other its half
        (Slots(1024, lanes=2, lane_cost=128), 150, [60], 150),  # of which it would make nothing
    ],
)
def test_what_waits_is_shared_as_far_as_it_is_worth_it(
    slots: Slots, waiting: int, running: list[int], share: int
) -> None:
    assert slots.share(waiting, len(running), sum(running)) == share


async def test_the_first_that_is_free_leaves_the_others_their_part(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=100, workers=3)
    tasks = submit(scheduler, 0, 1, 2)
    await turns()
    tasks += submit(scheduler, *range(3, 9))
    worker.let_finish()
    await turns()
    assert worker.batches == [[0], [1], [2], [3, 4, 5]]
    worker.let_finish(4)
    assert await asyncio.gather(*tasks) == [job * 10 for job in range(9)]


@pytest.mark.parametrize(
    ("slots", "cost", "pieces"),
    [
        (Slots(1024, lanes=2, lane_cost=128), 300, 2),
        (Slots(1024, lanes=2, lane_cost=128), 200, 1),
        (Slots(1024, workers=4, lane_cost=1024), 900, 4),  # less than a batch, and yet worth more than one worker
    ],
)
def test_a_job_is_cut_into_pieces_that_are_worth_it(slots: Slots, cost: int, pieces: int) -> None:
    assert slots.pieces(cost) == pieces


async def test_a_job_whose_caller_left_is_never_run(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=100)
    first, second, third = submit(scheduler, 1) + submit(scheduler, 2) + submit(scheduler, 3)
    first_batch = asyncio.create_task(worker.began.acquire())
    await first_batch
    late = submit(scheduler, 4, 5)
    await turns()
    late[0].cancel()
    await turns()
    worker.let_finish(2)
    assert await asyncio.gather(first, second, third, late[1]) == [10, 20, 30, 50]
    assert worker.batches == [[1, 2, 3], [5]]


@pytest.mark.parametrize(("is_gone", "error"), [(True, CallerGone), (False, EngineError)])
async def test_a_job_without_a_result_is_freed_without_the_garbage_collector(
    is_gone: bool, error: type[Exception]
) -> None:
    class Job:
        pass

    async def run(entries: Sequence[Entry[Job, None]]) -> list[None]:
        raise EngineError("it fails at all")

    scheduler = Scheduler(run, budget=100)
    jobs = [Job() for _ in range(3)]
    freed = [weakref.ref(job) for job in jobs]
    gc.collect()
    gc.disable()
    try:
        submitted = [scheduler.submit(jobs.pop(), 1, FAR, is_gone=lambda: is_gone) for _ in range(3)]
        errors = await asyncio.gather(*submitted, return_exceptions=True)
        assert [type(each) for each in errors] == [error] * 3
        del submitted, errors
        await turns()
        assert [job() for job in freed] == [None] * 3
    finally:
        gc.enable()


async def test_a_job_whose_caller_is_gone_when_its_turn_comes_is_never_run(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=100)
    [first] = submit(scheduler, 1)
    await turns()
    gone: list[int] = []
    waiting = {
        job: asyncio.create_task(scheduler.submit(job, 1, FAR, lambda job=job: job in gone))  # type: ignore[misc]
        for job in (2, 3, 4)
    }
    await turns()
    gone.append(3)
    worker.let_finish(2)
    assert [await first, await waiting[2], await waiting[4]] == [10, 20, 40]
    with pytest.raises(CallerGone):
        await waiting[3]
    assert worker.batches == [[1], [2, 4]]


async def test_the_next_batch_begins_before_the_callers_of_the_last_one_go_on() -> None:
    order: list[str] = []

    async def run(entries: Sequence[Entry[int, int]]) -> list[int]:
        order.append(f"batch {[entry.job for entry in entries]}")
        await asyncio.sleep(0)
        return [entry.job for entry in entries]

    scheduler = Scheduler(run, budget=2)

    async def caller(job: int) -> None:
        await scheduler.submit(job, 1, FAR)
        order.append(f"caller {job}")

    await asyncio.gather(*(caller(job) for job in range(4)))
    assert order == ["batch [0, 1]", "batch [2, 3]", "caller 0", "caller 1", "caller 2", "caller 3"]


async def test_a_caller_who_leaves_during_its_batch_costs_the_others_nothing(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=100)
    gone, stays = submit(scheduler, 1, 2)
    await worker.began.acquire()
    gone.cancel()
    worker.let_finish()
    assert await stays == 20
    assert gone.cancelled()


async def test_a_batch_runs_in_no_callers_context() -> None:
    """Serve cancels the calls made in a request's context when its client leaves; a batch holds other clients' jobs."""
    request: ContextVar[int] = ContextVar("request", default=0)
    seen: list[int] = []

    async def run(entries: Sequence[Entry[int, int]]) -> list[int]:
        seen.append(request.get())
        return [entry.job for entry in entries]

    async def caller(scheduler: Scheduler[int, int], number: int) -> int:
        request.set(number)
        return await scheduler.submit(number, 1, FAR)

    scheduler = Scheduler(run, budget=1)
    assert await asyncio.gather(*(caller(scheduler, number) for number in range(1, 6))) == [1, 2, 3, 4, 5]
    assert seen == [0] * 5


async def test_a_job_past_its_deadline_is_refused_and_not_run(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=100)
    [running] = submit(scheduler, 1)
    await worker.began.acquire()
    [late] = submit(scheduler, 2, deadline=time.monotonic() - 1)
    [timely] = submit(scheduler, 3)
    await turns()
    worker.let_finish(2)
    with pytest.raises(DeadlineExceeded):
        await late
    assert await asyncio.gather(running, timely) == [10, 30]
    assert worker.batches == [[1], [3]]


async def test_a_failed_batch_fails_each_of_its_jobs_and_no_other(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=2)
    doomed = submit(scheduler, 1, 2)
    await worker.began.acquire()
    worker.failure = RuntimeError("broken")
    worker.let_finish()
    assert [str(error) for error in await asyncio.gather(*doomed, return_exceptions=True)] == ["broken"] * 2
    worker.failure = None
    [later] = submit(scheduler, 3)
    worker.let_finish()
    assert await later == 30


async def test_a_result_list_of_the_wrong_length_is_an_error_to_all() -> None:
    async def run(entries: Sequence[Entry[int, int]]) -> list[int]:
        return [1]

    tasks = submit(Scheduler(run, budget=9), 1, 2)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[1], ValueError)


async def test_a_cancelled_batch_answers_its_jobs(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=9)
    [task] = submit(scheduler, 1)
    await worker.began.acquire()
    for batch in list(scheduler._running):
        batch.cancel()
    with pytest.raises(DeadlineExceeded, match="cancelled"):
        await task
    assert repr(scheduler) == "<Scheduler waiting=0 running=0>"


async def test_running_s_tells_a_worker_that_hangs(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=9)
    assert scheduler.running_s == 0.0
    [task] = submit(scheduler, 1)
    await worker.began.acquire()
    assert scheduler.running_s > 0.0
    worker.let_finish()
    await task
    await turns()
    assert scheduler.running_s == 0.0


async def test_what_was_asked_and_what_is_not_finished_is_counted(worker: Worker) -> None:
    scheduler = Scheduler(worker.run, budget=10)
    first, second, third = submit(scheduler, 1, 2, 3, cost=6)
    await turns()
    assert (scheduler.asked_cost, scheduler.unfinished_cost, scheduler.waiting_cost) == (18, 18, 12)
    third.cancel()
    await turns()
    assert (scheduler.asked_cost, scheduler.unfinished_cost) == (18, 12)
    worker.let_finish()
    assert await first == 10
    assert (scheduler.asked_cost, scheduler.unfinished_cost) == (18, 6)
    worker.failure = ValueError("broken")
    worker.let_finish()
    with pytest.raises(ValueError, match="broken"):
        await second
    assert (scheduler.asked_cost, scheduler.unfinished_cost) == (18, 0)


async def test_the_pace_is_that_of_batches_while_more_waits_whether_or_not_their_callers_wait_on() -> None:
    gate = asyncio.Semaphore(0)

    async def run(batch: Sequence[Entry[str, str]]) -> list[str]:
        await gate.acquire()
        await asyncio.sleep(0.1)
        return ["" for _ in batch]

    scheduler: Scheduler[str, str] = Scheduler(run, budget=10)
    scheduler.pace.told = 1e6
    tasks = [asyncio.create_task(scheduler.submit("job", 10, time.monotonic() + 60)) for _ in range(6)]
    await turns()
    assert scheduler.wait_s == pytest.approx(60 / 1e6)
    for task in tasks[:2]:
        task.cancel()  # the first of them runs on for nobody
    for _ in tasks:
        gate.release()
    await asyncio.gather(*tasks, return_exceptions=True)
    # four batches that ended with more to do behind the one before, of 10 in a tenth of a second
    assert scheduler.pace.wait_s(100, time.monotonic()) == pytest.approx(1.0, rel=0.5)


async def test_what_waits_for_nothing_says_nothing_of_the_pace() -> None:
    async def run(batch: Sequence[Entry[str, str]]) -> list[str]:
        await asyncio.sleep(0.1)
        return ["" for _ in batch]

    scheduler: Scheduler[str, str] = Scheduler(run, budget=10)
    scheduler.pace.told = 1e6
    for _ in range(4):
        await scheduler.submit("job", 1, time.monotonic() + 60)
    assert scheduler.pace.wait_s(100, time.monotonic()) == pytest.approx(100 / 1e6)
