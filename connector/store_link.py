"""The scheduler side's line to the node store, for any engine: what it asked, holds, and has yet to tell.

Calls are posted to the client; answers are collected where the engine calls in. The books here are about one
store process, known by its epoch: when another one answers, what the old one held is void.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from kvstrata.connector.books import Outbox, Save, SaveBook, Stage
from kvstrata.connector.lookups import Lookup, LookupBook
from kvstrata.controller.client import Answer, Call, Lost, NodeClient
from kvstrata.core.config import ClientConfig
from kvstrata.core.events import Match, Matched, Refused, Update, Updated, Why
from kvstrata.core.slots import Slot

log = logging.getLogger("kvstrata.store_link")

_UNANSWERED_MAX = 32  # lookups under way; more would only wait for each other, and Updates for them
_ALONE_FACTOR = 5  # a step that nobody needs may wait for so many times `client.lookup_wait`
_KEYS_MAX = 1 << 16  # chunks of a prompt, as many as the store takes in one question
_AWAKE_S = 10.0  # an engine with news for a store that went out of reach stays awake for so long


class StoreLink:
    """Every method is called on the engine's thread. Times are monotonic seconds.

    Args:
        client: carries calls and answers.
        ranks: workers that each copy a part of every chunk.
        count: counts what the user may want to know of, by name and amount.
    """

    def __init__(
        self, client: NodeClient, config: ClientConfig, ranks: int, count: Callable[..., None]
    ) -> None:
        self._client, self._config, self._ranks, self._count = client, config, ranks, count
        self.lookups = LookupBook()
        self.saves = SaveBook()
        self.outbox = Outbox()
        self._loads: dict[int, tuple[int, bytes]] = {}  # by job: its lease, and the epoch of its store
        self._update: Update | None = None  # the one that is under way
        self._epoch: bytes | None = None  # of the store that the books are about
        self._reached = 0.0  # when that store was in reach last
        self._numbers = itertools.count(1)
        self._waited_s = 0.0  # for the store, in this step

    @property
    def in_reach(self) -> bool:
        """Whether the store that the books are about answers."""
        session = self._client.session
        return session is not None and session.epoch == self._epoch

    # --- lookups -----------------------------------------------------------------------------

    def ask(self, request_id: str, keys: Sequence[bytes], now: float) -> Lookup | None:
        """Ask for the longest stored prefix of `keys`. None: the store is out of reach."""
        session = self._client.session
        if session is None:
            self._count("unasked_lookups")
            return None
        self._meet(session.epoch)
        lookup = self.lookups.ask(next(self._numbers), session.epoch, request_id, now)
        call = Match(self._client.client, self._client.next_seq(), lookup.lease, tuple(keys[:_KEYS_MAX]))
        self._client.post(session, call)
        return lookup

    @property
    def asks_enough(self) -> bool:
        """Whether as many lookups are under way as may be."""
        return self._client.session is not None and self.lookups.unanswered >= _UNANSWERED_MAX

    def answers_soon(self) -> bool:
        """Whether it still asks enough once all answers are taken in, and has not waited long for them."""
        self.collect(None)
        waits = time.monotonic() - self.lookups.oldest_question
        return self.asks_enough and waits < self._config.call_deadline

    def end(self, lookup: Lookup) -> None:
        """Nobody wants it any more; an answer that is still to come finds nobody."""
        if self.lookups.end(lookup) and lookup.epoch == self._epoch:
            self.outbox.released.append(lookup.lease)

    def expire_lookups(self) -> None:
        """Give back what queued requests have held for half of a load's time; they will ask again."""
        for lookup in self.lookups.held_since(time.monotonic() - self._config.load_deadline / 2):
            self.end(lookup)

    # --- loads -------------------------------------------------------------------------------

    def begin_load(self, lookup: Lookup) -> int:
        """The lookup's lease is the load's now; returns the load's job."""
        self.lookups.end(lookup)
        job = next(self._numbers)
        self._loads[job] = lookup.lease, lookup.epoch
        return job

    def end_load(self, job: int) -> None:
        """All workers are done with its slots."""
        lease, epoch = self._loads.pop(job)
        if epoch == self._epoch:
            self.outbox.released.append(lease)

    # --- saves -------------------------------------------------------------------------------

    def save(self, key: bytes, blocks: tuple[int, ...], raw: bool = False) -> None:
        """Want a slot for the chunk in `blocks`, unless one is wanted already. The store must be in reach."""
        if key in self.saves:
            return
        assert self._epoch is not None
        nbytes = self._client.slot_sizes[-1 if raw else 0]
        save = Save(next(self._numbers), key, nbytes, blocks, self._epoch)
        self.saves.want(save)
        self.outbox.reserve.append(save.reservation)

    def flush_overwritten(self, taken: Iterable[int], alone: bool) -> list[int]:
        """Saves (jobs) whose blocks are overwritten now: they go first. Those without a slot are given up."""
        flush = []
        for save in self.saves.overwritten(taken):
            if save.stage is Stage.WANTED and self._update and save.reservation in self._update.reserve:
                self.collect(alone, until=save)
            if save.stage is Stage.WANTED:
                self._give_up(save)
            elif save.stage is not Stage.OVER:
                save.flushed = True
                flush.append(save.job)
        return flush

    def saved(self, job: int, ranks: int, failed: bool, unpackable: bool) -> None:
        """So many more workers are done with it, well or not: a chunk is whole, or not a chunk."""
        save = self.saves.saves.get(job)
        if save is None:
            return
        save.ranks_ended += ranks
        save.failed = save.failed or failed
        save.unpackable = save.unpackable or unpackable
        if save.ranks_ended >= self._ranks:
            self._end_save(save)

    def _end_save(self, save: Save) -> None:
        """What did not fit packed is saved once more, raw."""
        self.saves.drop(save.job)
        if save.epoch == self._epoch:
            (self.outbox.aborted if save.failed else self.outbox.committed).append(save.job)
        if not save.unpackable or save.nbytes == self._client.slot_sizes[-1] or not self.in_reach:
            self._count("failed_saves" if save.failed else "saved_chunks")
        elif save.flushed or save.epoch != self._epoch:  # others have its blocks, or its store is gone
            self._count("lost_saves")
        else:  # its blocks are still watched, as they were until now
            self.save(save.key, save.blocks, raw=True)

    def forget_saves(self) -> None:
        """The engine's cache is reset: nothing of what is being saved may be found later."""
        for save in self.saves.forget():
            self._give_up(save)

    def _give_up(self, save: Save, why: str = "lost_saves") -> None:
        self.saves.drop(save.job)
        if save.reservation in self.outbox.reserve:
            self.outbox.reserve.remove(save.reservation)
        else:
            self.outbox.aborted.append(save.job)
        self._count(why)

    # --- each step ---------------------------------------------------------------------------

    def begin_step(self, alone: bool, idle: bool) -> None:
        """Take in what has come, and find out who is there. `idle`: the step computes nothing.

        What a step may wait is for this call and for the lookups until the next one.
        """
        self._waited_s = 0.0
        session = self._client.session  # another thread sets it
        self._meet(session.epoch if session else None)
        self.expire_lookups()
        for save in self.saves.ask_again(time.monotonic()):
            self.outbox.reserve.append(save.reservation)
        waits = idle and (self._update or self.lookups.leases or self.saves.postponed or self.outbox)
        self.collect(alone if waits else None)

    def send(self) -> None:
        """One message with all the news, unless one is under way."""
        session = self._client.session
        if session is None or self._update or not self.outbox or not self.in_reach:
            return
        leases, jobs = self._held()
        client, seq, drawn = self._client.client, self._client.next_seq(), next(self._numbers)
        self._update = self.outbox.take(client, seq, leases, jobs, drawn)
        self._client.post(session, self._update)

    def _held(self) -> tuple[int, int]:
        """Leases and jobs that the store may have on its books, for lookups without an answer too."""
        leases = self.lookups.leases + sum(epoch == self._epoch for _, epoch in self._loads.values())
        jobs = sum(s.stage is not Stage.WANTED and s.epoch == self._epoch for s in self.saves.saves.values())
        return leases, jobs

    def busy(self) -> bool:
        """Whether the engine must keep stepping: copies, news for the store, or leases that it may grant.

        Also for a while after the store went out of reach: one lost call is enough for that, and the
        store that comes back still holds what this engine had from it. Nothing wakes an idle engine.
        """
        if self._client.session is None and time.monotonic() - self._reached > _AWAKE_S:
            return self.saves.copying > 0 or bool(self._loads)
        books = self.saves, self._loads, self._update, self.outbox, self.lookups.unanswered
        return any(books)

    def _meet(self, epoch: bytes | None) -> None:
        """The store with `epoch` answers; None: none does."""
        if epoch is None:  # what the workers do not have yet will not be saved
            for save in self.saves.of_other_stores(None):
                self._give_up(save, "saves_out_of_reach")
            return
        self._reached = time.monotonic()
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self.outbox.clear()
        self._update = None
        for save in self.saves.of_other_stores(epoch):
            self.saves.drop(save.job)
        self.lookups.end_all()

    def close(self) -> None:
        """Say bye to the store."""
        self._client.close()

    # --- the store's answers -----------------------------------------------------------------

    def collect(self, alone: bool | None, until: Lookup | Save | None = None) -> None:
        """Take in answers, and wait for one, or for that to `until`, for as long as this step still may.

        `alone`: no request runs, so that nobody has to wait with it; None: do not wait.
        """
        allowed = self._config.lookup_wait * (_ALONE_FACTOR if alone else 1)
        wait_s = 0.0 if alone is None else max(0.0, allowed - self._waited_s)
        deadline = time.monotonic() + wait_s
        came = False
        while True:
            left = deadline - time.monotonic()
            waiting = left > 0 and (not came if until is None else until.is_open)
            item = self._client.collect(left if waiting else 0.0)
            if item is None:
                break
            session, call, answer = item
            self._answered(session.epoch, call, answer)
            came = True  # take what else is there; wait no more, unless for `until`
        if wait_s > 0:
            self._waited_s += wait_s - max(0.0, deadline - time.monotonic())

    def _answered(self, epoch: bytes, call: Call, answer: Answer) -> None:
        if isinstance(call, Match):
            self._match_answered(epoch, call, answer)
            return
        if call is self._update:
            self._update = None
        if epoch != self._epoch:
            return
        if isinstance(answer, Updated):
            for (job, _, _), grant in zip(call.reserve, answer.grants, strict=True):
                if grant is Why.NOT_READY and self.saves.postpone(job, time.monotonic()):
                    continue
                if not isinstance(grant, Slot):
                    self.saves.drop(job)
                    self._count(f"save_{grant.value}")
                elif not self.saves.grant(job, grant):
                    log.debug("job %d was given up meanwhile; its abort is on the way", job)
        else:
            self.outbox.take_back(call)
            for job, _, _ in call.reserve:
                if self.saves.drop(job):
                    self._count("saves_out_of_reach")

    def _match_answered(self, epoch: bytes, call: Match, answer: Answer) -> None:
        slots = answer.slots if isinstance(answer, Matched) else ()
        lookup = self.lookups.answer(call.lease, slots)
        # If the call got lost, the store may still have leased something.
        if epoch == self._epoch and (isinstance(answer, Lost) or (lookup is None and slots)):
            self.outbox.released.append(call.lease)
        if lookup is None:
            return
        if isinstance(answer, Refused):
            self._count(f"lookup_{answer.why.value}")
        if isinstance(answer, Matched):
            self._count("lookups")
            self._count("lookups_cut_short", answer.being_written)
