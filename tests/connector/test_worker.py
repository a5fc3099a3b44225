"""The worker side: what it tells the engine, and when, with copies that end when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvstrata.connector.jobs import ChunkCopy, Fence, LoadJob, Report, SaveJob
from kvstrata.connector.transfer import Role, Transfer
from kvstrata.connector.vllm.metadata import StepWork
from kvstrata.connector.vllm.worker import LateFailure, WorkerConnector
from kvstrata.core.config import Config
from tests.core.layouts import SMALL

SOON_S = 10.0
IDLE, COMPUTES = StepWork(idle=True), StepWork(idle=False)


class Loads:
    """Hands each load over if it may; ends it when told to."""

    def __init__(self) -> None:
        self.engine_idle = False
        self.hands_over, self.good = True, True
        self.corrupt: bytes | None = None
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.calls: list[str] = []

    def load(self, job: LoadJob, after: Fence | None, handed_over: Callable[[], None] | None) -> Report:
        assert handed_over is not None
        if self.hands_over:
            handed_over()
        self.begun.release()
        assert self.may_end.acquire(timeout=SOON_S)
        return Report(job.job, ok=self.good, corrupt=self.corrupt)

    def save(self, jobs: Sequence[SaveJob], after: Fence | None, covered: Callable[[], None]) -> list[Report]:
        self.calls.append("save")
        return [Report(job.job, ok=True) for job in jobs]

    def hold(self, stream: int) -> None:
        self.calls.append("hold")

    def follow(self, stream: int) -> None:
        self.calls.append("follow")

    def close(self) -> None: ...


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def worker(loads: Loads) -> Iterator[WorkerConnector]:
    made = WorkerConnector("engine", 0, SMALL, 16, Config())
    made._copies, made._transfer = loads, Transfer(loads, [Role.LOADS, Role.SAVES])
    yield made
    loads.may_end.release(100)
    made.close()


def load(job: int, request: str) -> tuple[str, LoadJob]:
    return request, LoadJob(job, b"store", (ChunkCopy(b"k" * 32, 0, 0, 4096, (job,)),), 1e9)


def step(worker: WorkerConnector, work: StepWork) -> set[str]:
    worker.before_step(work)
    return worker.finished_loads(work)


def until_named(worker: WorkerConnector) -> set[str]:
    while not (named := step(worker, IDLE)):
        pass
    return named


def named_after(worker: WorkerConnector, job: tuple[str, LoadJob]) -> set[str]:
    return step(worker, StepWork(loads=[job], idle=True)) or until_named(worker)


def test_a_load_is_named_once_when_it_has_ended(worker: WorkerConnector, loads: Loads) -> None:
    loads.hands_over = False
    assert step(worker, StepWork(loads=[load(1, "a")], idle=True)) == set()
    assert step(worker, COMPUTES) == set(), "a step does not wait for loads that it does not need"
    loads.may_end.release()
    assert until_named(worker) == {"a"}
    done = worker.take_done()
    assert done is not None and done.loaded == {1: 1}
    assert "follow" not in loads.calls


def test_a_load_that_is_handed_over_is_named_before_its_end(worker: WorkerConnector, loads: Loads) -> None:
    assert named_after(worker, load(1, "a")) == {"a"}
    assert worker.take_done() is None, "its lease is still needed"
    assert worker.stats.data["loads_handed_over"] == 1


def test_steps_follow_a_load_that_was_handed_over_and_end_after_it(
    worker: WorkerConnector, loads: Loads
) -> None:
    assert named_after(worker, load(1, "a")) == {"a"}
    worker.before_step(StepWork(saves=[SaveJob(2, b"store", load(2, "")[1].chunks[0])]))
    assert loads.calls[0] == "follow", "before anything else of the step"
    answers: list[set[str]] = []
    thread = threading.Thread(target=lambda: answers.append(worker.finished_loads(COMPUTES)))
    thread.start()
    thread.join(timeout=0.1)
    assert thread.is_alive(), "its answer would be told before the load was checked to its end"
    loads.may_end.release()
    thread.join(timeout=SOON_S)
    assert answers == [set()], "it was named before"
    done = worker.take_done()
    assert done is not None and done.loaded == {1: 1}
    loads.calls.clear()
    step(worker, COMPUTES)
    assert loads.calls == []


@pytest.mark.parametrize("corrupt", [b"key", None])
def test_no_answer_comes_of_a_load_that_was_handed_over_and_failed(
    worker: WorkerConnector, loads: Loads, corrupt: bytes | None
) -> None:
    """Nor of any later step, whoever swallows the error: vLLM may have shared the blocks."""
    loads.good, loads.corrupt = False, corrupt
    assert named_after(worker, load(1, "a")) == {"a"}
    worker.before_step(COMPUTES)
    loads.may_end.release()
    why = "memory and PCIe" if corrupt else "the log says why"
    with pytest.raises(LateFailure, match=rf"engine stops.* request a .*{why}"):
        worker.finished_loads(COMPUTES)
    for work in (COMPUTES, IDLE):
        with pytest.raises(LateFailure):
            worker.before_step(work)
        with pytest.raises(LateFailure):
            worker.finished_loads(work)


def test_ranks_that_compute_in_step_are_handed_nothing(worker: WorkerConnector, loads: Loads) -> None:
    worker._hands_over = False
    step(worker, IDLE)
    assert not loads.engine_idle


def test_a_load_that_fails_before_it_was_handed_over_is_recomputed(
    worker: WorkerConnector, loads: Loads
) -> None:
    loads.hands_over = loads.good = False
    loads.may_end.release()
    assert named_after(worker, load(7, "a")) == {"a"}
    assert worker.take_bad_blocks() == {7}


def test_copies_know_whether_the_engine_is_idle(worker: WorkerConnector, loads: Loads) -> None:
    for idle in (True, False, True):
        step(worker, StepWork(idle=idle))
        assert loads.engine_idle == idle
