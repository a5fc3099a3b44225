"""The negative control: planners and connectors that break one promise each, and are caught.

Without it, hundreds of quiet seeds would prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from kvstrata.connector.books import Outbox, Save
from kvstrata.connector.lookups import Lookup, LookupBook
from kvstrata.connector.store_link import StoreLink
from kvstrata.connector.vllm.metadata import StepWork, WorkDone
from kvstrata.connector.vllm.scheduler import SchedulerConnector
from kvstrata.controller.client import Answer
from kvstrata.core.catalogue import Catalogue, Cause, Entry
from kvstrata.core.events import Action, ClientStopped, Event, Match, Matched, Refused, Update, Why
from kvstrata.core.planner import Client, Planner
from tests.sim.worker import SimWorker
from tests.sim.world import replay

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

SEEDS = 200

# --- planners ---------------------------------------------------------------------------------------


class FreesWhatIsOverdue(Planner):
    """A deadline gives slots back, as if it could recall a copy in flight."""

    def _mark_overdue(self, now: float) -> None:
        for client in self.clients.values():
            for job, claim in list(client.jobs.items()):
                if claim.deadline < now:
                    self.catalogue.move(client.jobs.pop(job).entries[0], Cause.ABORT)
            for lease, claim in list(client.leases.items()):
                if claim.deadline < now:
                    self._let_go(client.leases.pop(lease))


class FreesAtDisconnect(Planner):
    """The end of a connection counts as the end of its processes."""

    def step(self, event: Event, now: float) -> list[Action]:
        if isinstance(event, ClientStopped):
            self._reclaim(event.client)
            return []
        return super().step(event, now)


class ForgetsReaders(Planner):
    """An evicted chunk's slot is free at once, whoever reads it."""

    def _make_room(self, client: Client, slot_bytes: int, wanted: int, now: float) -> Iterator[bool]:
        for key in list(self.catalogue._orders[slot_bytes].victims()):
            entry = self.catalogue._visible[key]
            if client.can_reach(entry):
                self.catalogue.move(entry, Cause.DROP)
                self.catalogue.move(entry, Cause.DRAINED)
                entry.readers = 0
                yield True


class EagerCatalogue(Catalogue):
    """Finds chunks that are still being written."""

    def match(self, keys: object) -> list[Entry]:
        found = []
        for key in keys:  # type: ignore[attr-defined]
            entry = self._visible.get(key)
            if entry is None:
                break
            found.append(entry)
        return found

    def hold(self, entries: object, now: float = 0.0) -> None:
        for entry in entries:  # type: ignore[attr-defined]
            entry.readers += 1


class PublishesAtReserve(Planner):
    """A chunk is found before its writers have finished."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.catalogue.__class__ = EagerCatalogue


class ListensToTheOvertaken(Planner):
    """A call that comes after a later one is answered, though its sender has given it up."""

    def _heard(self, event: Match | Update) -> Client | Refused:
        client = self.clients.get(event.client)
        if client is None:
            return Refused(Why.UNKNOWN_CLIENT)
        client.seq = max(client.seq, event.seq)
        return client


# --- connectors -------------------------------------------------------------------------------------


class SleepsOnQuestions(StoreLink):
    """Nothing keeps the engine awake for a lease that the store may be granting."""

    def busy(self) -> bool:
        asked = self.lookups
        self.lookups = LookupBook()
        busy = super().busy()
        self.lookups = asked
        return busy


class SleepsOnNews(SchedulerConnector):
    """The store hears the rest when the next request comes."""

    def busy(self) -> bool:
        return False


class OverwritesBlocks(StoreLink):
    """Blocks are reused before they are copied."""

    def flush_overwritten(self, taken: Iterable[int], alone: bool) -> list[int]:
        return []


class LoadsOverSaves(SchedulerConnector):
    """Blocks that a load writes are not looked at."""

    def build_work(self, output: SchedulerOutput) -> StepWork:
        loads, self._new_loads = self._new_loads, []
        work = super().build_work(output)
        return replace(work, loads=loads)


class LoadsSharedBlocks(SchedulerConnector):
    """A load also writes the blocks that the prefix cache has found."""

    def after_alloc(self, request: Request, blocks: list[int], external: int) -> None:
        before = len(self._new_loads)
        super().after_alloc(request, blocks, external)
        if len(self._new_loads) > before:
            request_id, load = self._new_loads.pop()
            number = self._loading[load.job].first_chunk
            (first, *rest), per_chunk = load.chunks, self._chunk_tokens // self._block_tokens
            own = blocks[number * per_chunk : (number + 1) * per_chunk]
            shared = next(i for i, block in enumerate(first.blocks) if block >= 0)
            first = replace(first, blocks=(*own[:shared], *first.blocks[shared:]))
            self._new_loads.append((request_id, replace(load, chunks=(first, *rest))))


class KeepsOldBlocks(SchedulerConnector):
    """A request that was preempted is believed to have its old blocks."""

    def _note_scheduled(self, output: SchedulerOutput) -> None:
        output.scheduled_cached_reqs.resumed_req_ids.clear()
        super()._note_scheduled(output)


class QueuesWithLeases(StoreLink):
    """A request keeps its lease for as long as it queues."""

    def expire_lookups(self) -> None:
        pass


class IgnoresLateAnswers(StoreLink):
    """A lease that came too late is kept."""

    def _match_answered(self, epoch: bytes, call: Match, answer: Answer) -> None:
        wanted = call.lease in self.lookups._wanted
        super()._match_answered(epoch, call, answer if wanted else Matched((), being_written=False))


class AbortsInSilence(StoreLink):
    """A slot for a save that was given up is never given back."""

    def _give_up(self, save: Save, why: str = "") -> None:
        self.saves.drop(save.job)


class CommitsWhatFailed(SchedulerConnector):
    """A chunk that some rank could not write becomes visible."""

    def work_done(self, done: WorkDone) -> None:
        done.unsaved.clear()
        super().work_done(done)


class ForgetsNothing(SchedulerConnector):
    """After a reset it finds what other weights have computed."""

    def reset(self) -> None:
        pass


class KeepsItsKeys(SchedulerConnector):
    """Requests that were under way at a reset are still saved, under keys of the weights before it."""

    def reset(self) -> None:
        self._identity.new_generation()


class SavesAgainAfterAReset(StoreLink):
    """What does not fit packed is copied once more, when its blocks may hold anything."""

    def forget_saves(self) -> None:
        super().forget_saves()
        for save in self.saves.saves.values():
            save.flushed = False


class MissesTheRestart(StoreLink):
    """Another store is spoken to as if it were the one before."""

    def _meet(self, epoch: bytes | None) -> None:
        if self._epoch is None or epoch is None:
            super()._meet(epoch)


class OutboxThatLoses(Outbox):
    """What was in an Update that got lost is not said again."""

    def take_back(self, update: Update) -> None:
        pass


class LosesUpdates(SchedulerConnector):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._link.outbox = OutboxThatLoses()


class GivesUpForGood(StoreLink):
    """Once the store was out of reach it is not asked again."""

    _gone = False

    def _meet(self, epoch: bytes | None) -> None:
        self._gone = self._gone or epoch is None
        super()._meet(epoch)

    def ask(self, request_id: str, keys: Sequence[bytes], now: float) -> Lookup | None:
        return None if self._gone else super().ask(request_id, keys, now)


def using(link: type[StoreLink]) -> type[SchedulerConnector]:
    """A scheduler side with such a link."""

    class Connector(SchedulerConnector):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._link.__class__ = link

    return Connector


# --- and how they are caught -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planner", "symptom"),
    [
        (FreesWhatIsOverdue, " read "),
        (FreesAtDisconnect, " at once"),
        (ForgetsReaders, " read "),
        (PublishesAtReserve, " read "),
        (ListensToTheOvertaken, "still holds"),
    ],
)
def test_a_planner_that_breaks_a_promise_is_caught(planner: type[Planner], symptom: str) -> None:
    for seed in range(SEEDS):
        if any(symptom in sentence for sentence in caught(seed, planner=planner)):
            return
    pytest.fail(f"{planner.__name__} went unnoticed in {SEEDS} runs")


@pytest.mark.parametrize(
    ("breaks", "symptom"),
    [
        (SleepsOnQuestions, "slept with leases"),
        (SleepsOnNews, "slept with leases"),
        (OverwritesBlocks, "saved other bytes"),
        (LoadsOverSaves, "saved other bytes"),
        (LoadsSharedBlocks, "on wrong KV"),
        (KeepsOldBlocks, "saved other bytes"),
        (QueuesWithLeases, "queues with lease"),
        (IgnoresLateAnswers, "still holds"),
        (AbortsInSilence, "still holds"),
        (CommitsWhatFailed, "commits"),
        (ForgetsNothing, "the key of another KV"),
        (KeepsItsKeys, "saved other bytes"),
        (SavesAgainAfterAReset, "saved other bytes"),
        (MissesTheRestart, "does not come to rest"),
        (LosesUpdates, "still holds"),
        (GivesUpForGood, "computed in peace"),
    ],
)
def test_a_connector_that_breaks_a_promise_is_caught(
    breaks: type[SchedulerConnector | StoreLink], symptom: str
) -> None:
    connector = using(breaks) if issubclass(breaks, StoreLink) else breaks
    for seed in range(SEEDS):
        if any(symptom in sentence for sentence in caught(seed, connector=connector)):
            return
    pytest.fail(f"{breaks.__name__} went unnoticed in {SEEDS} runs")


def test_a_step_that_does_not_come_after_loads_that_were_handed_over_is_caught() -> None:
    with patch.object(SimWorker, "_followed", lambda worker, step: set()):
        for seed in range(SEEDS):
            if any("on wrong KV" in sentence for sentence in caught(seed)):
                return
    pytest.fail(f"it went unnoticed in {SEEDS} runs")


def caught(
    seed: int,
    planner: type[Planner] = Planner,
    connector: type[SchedulerConnector] = SchedulerConnector,
) -> list[str]:
    """What went wrong, but for what the audit says: the bytes must tell by themselves."""
    try:
        wrong = replay(seed, planner, connector).wrong
    except (ValueError, KeyError, AssertionError):
        return []  # its books broke first: another seed will show the bytes
    return [sentence for sentence in wrong if not sentence.startswith("audit")]
