"""The scheduler side, one rule at a time; the whole of it runs in the simulator and in real engines."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstrata.connector.vllm.metadata import StepWork, WorkDone
from kvstrata.connector.vllm.scheduler import SchedulerConnector
from kvstrata.controller.client import Answer, Call, Session
from kvstrata.core.config import ClientConfig
from kvstrata.core.events import Match, Matched, Update, Updated
from kvstrata.core.slots import Slot

CHUNK, BLOCK = 256, 16
PROMPT = list(range(4 * CHUNK + 1))
STORE = b"store"


class Client:
    """A node store that answers at once: slots for whatever is asked, and as many hits as `stored` says."""

    client = "engine"

    def __init__(self) -> None:
        self.slot_sizes: tuple[int, ...] = (4096,)
        self.session = Session(STORE)
        self.stored = 0
        self.sent: list[Call] = []
        self._answers: deque[tuple[Session, Call, Answer]] = deque()

    def next_seq(self) -> int:
        return len(self.sent)

    def post(self, session: Session, call: Call) -> None:
        self.sent.append(call)
        answer: Answer = (
            Matched(tuple(Slot(1, i * 4096, 4096) for i in range(min(self.stored, len(call.keys)))), False)
            if isinstance(call, Match)
            else Updated(tuple(Slot(1, job * 4096, 4096) for job, _, _ in call.reserve))
        )
        self._answers.append((session, call, answer))

    def collect(self, wait_s: float = 0.0) -> tuple[Session, Call, Answer] | None:
        return self._answers.popleft() if self._answers else None

    def said(self, what: str) -> list[Any]:
        return [one for call in self.sent if isinstance(call, Update) for one in getattr(call, what)]


class Identity:
    def namespace(self, request: Any) -> bytes:
        return b"n" * 32

    def extras(self, request: Any, chunk_tokens: int) -> dict[int, bytes]:
        return {}

    def new_generation(self) -> None: ...


def scheduler_side(client: Any, **settings: Any) -> SchedulerConnector:
    return SchedulerConnector(client, cast(Any, Identity()), CHUNK, BLOCK, 1, ClientConfig(**settings))


def request(name: str = "one", preemptions: int = 0) -> Any:
    return SimpleNamespace(
        request_id=name,
        prompt_token_ids=PROMPT,
        _all_token_ids=PROMPT,
        num_tokens=len(PROMPT),
        num_computed_tokens=len(PROMPT),
        num_preemptions=preemptions,
        cache_salt=None,
        skip_reading_prefix_cache=False,
        resumable=False,
        sampling_params=None,
        prompt_embeds=None,
        pooling_params=None,
    )


def step(side: SchedulerConnector, asked: Any = None) -> StepWork:
    """A step that computes the whole prompt of `asked`, or an empty one."""
    blocks = list(range(1, len(PROMPT) // BLOCK + 2))
    new = (
        SimpleNamespace(req_id=asked.request_id, num_computed_tokens=0, block_ids=[blocks]) if asked else None
    )
    nothing = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    output = SimpleNamespace(
        num_scheduled_tokens={asked.request_id: len(PROMPT)} if asked else {},
        total_num_scheduled_tokens=len(PROMPT) if asked else 0,
        scheduled_new_reqs=[new] if new else [],
        scheduled_cached_reqs=nothing,
    )
    return side.build_work(cast(Any, output))


@pytest.mark.parametrize("stage", ["wanted", "copying", "copying what does not fit packed"])
def test_nothing_is_kept_of_what_was_being_saved_at_a_reset(stage: str) -> None:
    """An engine that sleeps is reset first, and then its memory goes: a copy may find anything there."""
    copying, fits = stage != "wanted", "not fit" not in stage
    client = Client()
    client.slot_sizes = (4096, 8192)
    side = scheduler_side(client)
    asked = request()
    side.new_request(asked)
    assert side.matched_tokens(asked, 0) == (0, False)
    step(side, asked)
    assert len(client.said("reserve")) == 4
    begun = step(side).saves if copying else []
    assert len(begun) == (4 if copying else 0)

    side.reset()
    later = [save for _ in range(3) for save in step(side).saves]
    unfit = set() if fits else {save.job for save in begun}
    side.work_done(WorkDone(saved={save.job: 1 for save in begun}, unsaved=unfit, unpackable=unfit))
    later += [save for _ in range(3) for save in step(side).saves]
    assert later == []
    assert client.said("committed") == []
    assert sorted(client.said("aborted")) == sorted(job for job, _, _ in client.said("reserve"))
    side.finished(asked, [])
    step(side)
    assert not side.busy()


def test_chunks_that_were_evicted_while_their_request_waited_are_saved_again() -> None:
    client = Client()
    client.stored = 4
    side = scheduler_side(client, load_deadline=1.0)
    asked = request()
    side.new_request(asked)
    assert side.matched_tokens(asked, 0) == (4 * CHUNK, True)
    client.stored = 0
    asked.num_preemptions = 1  # so that it asks again
    assert side.matched_tokens(asked, 0) == (0, False)
    step(side, asked)
    assert len(client.said("reserve")) == 4


@pytest.mark.parametrize("another", [False, True], ids=["same store", "another store"])
def test_a_chunk_that_did_not_fit_packed_is_saved_raw_but_not_for_another_store(another: bool) -> None:
    """Its job would have the former store's epoch: the workers would find no slot, the store keep one."""
    client = Client()
    client.slot_sizes = (4096, 8192)
    side = scheduler_side(client)
    asked = request()
    side.new_request(asked)
    side.matched_tokens(asked, 0)
    step(side, asked)
    begun = step(side).saves
    assert len(begun) == 4
    jobs = {save.job: 1 for save in begun}
    if another:
        client.session = Session(b"other")
        step(side)
    side.work_done(WorkDone(saved=jobs, unsaved=set(jobs), unpackable=set(jobs)))
    step(side)
    again = [nbytes for job, _, nbytes in client.said("reserve") if job not in jobs]
    assert again == ([] if another else [8192] * 4)


@pytest.mark.parametrize("session", [SimpleNamespace(epoch=b"store"), None], ids=["store", "no store"])
def test_an_engine_does_not_sleep_while_a_load_is_under_way(session: object) -> None:
    """Its request may be over: it was handed over, and then aborted. Its end gives the lease back."""
    side = scheduler_side(SimpleNamespace(session=session))
    assert not side.busy()
    side._link._loads[1] = 1, b"store"
    assert side.busy()
