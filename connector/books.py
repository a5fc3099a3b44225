"""The scheduler side's books: saves under way and what is still to be told to the node store.

Rule of this file: pure bookkeeping, for any engine. A running request protects its own blocks, so
a save needs watching only for blocks that the engine gives to somebody else; `overwritten` says
which saves those are.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvstrata.connector.jobs import ChunkCopy, SaveJob
from kvstrata.core.events import Update
from kvstrata.core.slots import Slot

# Prefixes, and keys in all of them, in one Update: 1 MiB, of the 4 that gRPC takes. They only tell the
# policy what is fresh, so the oldest may be left out.
_USED_MAX = 64
_USED_KEYS_MAX = 32768


# A save that found the pool growing asks again so often, and gives up after so long, in seconds: longer
# than engines may take to map a new segment.
_ASK_EVERY_S = 0.05
_ASK_FOR_S = 12.0


class Stage(enum.Enum):
    WANTED = "wanted"  # a slot was asked for
    GRANTED = "granted"  # it has a slot, the workers do not know yet
    COPYING = "copying"  # the workers have it
    OVER = "over"  # done, refused or given up


@dataclass(slots=True)
class Save:
    """One chunk on its way from engine blocks to a slot."""

    job: int
    key: bytes
    nbytes: int  # of the slot that it wants
    blocks: tuple[int, ...]
    epoch: bytes
    stage: Stage = Stage.WANTED
    slot: Slot | None = None
    ranks_ended: int = 0
    failed: bool = False  # some rank could not write its part, or the cache was reset
    unpackable: bool = False  # some rank's part did not fit packed
    flushed: bool = False  # its blocks were given away since it has read them, or the cache was reset
    postponed_since: float | None = None  # monotonic seconds; None: it was not

    @property
    def is_open(self) -> bool:
        """Whether the store has yet to say if it gets a slot."""
        return self.stage is Stage.WANTED

    @property
    def reservation(self) -> tuple[int, bytes, int]:
        """As an Update says it."""
        return self.job, self.key, self.nbytes


class SaveBook:
    """Saves by job and by block."""

    def __init__(self) -> None:
        self.saves: dict[int, Save] = {}
        self._keys: set[bytes] = set()
        self._granted: list[Save] = []
        self._by_block: dict[int, set[int]] = {}
        self.postponed: list[int] = []  # jobs that ask for a slot again once the pool has grown
        self._ask_at = 0.0

    def __len__(self) -> int:
        return len(self.saves)

    @property
    def copying(self) -> int:
        """Saves that the workers have."""
        return sum(save.stage is Stage.COPYING for save in self.saves.values())

    def __contains__(self, key: bytes) -> bool:
        """Whether a save of the chunk `key` is under way."""
        return key in self._keys

    def want(self, save: Save) -> None:
        self.saves[save.job] = save
        self._keys.add(save.key)
        for block in save.blocks:
            self._by_block.setdefault(block, set()).add(save.job)

    def grant(self, job: int, slot: Slot) -> bool:
        """The store gave a slot. False: the save was dropped meanwhile, give the slot back."""
        save = self.saves.get(job)
        if save is None:
            return False
        save.stage, save.slot = Stage.GRANTED, slot
        self._granted.append(save)
        return True

    def drop(self, job: int) -> Save | None:
        """The save is over, one way or another."""
        save = self.saves.pop(job, None)
        if save is None:
            return None
        save.stage = Stage.OVER
        self._keys.discard(save.key)
        for block in save.blocks:
            jobs = self._by_block[block]
            jobs.discard(job)
            if not jobs:
                del self._by_block[block]
        return save

    def postpone(self, job: int, now: float) -> bool:
        """The pool is growing: ask again soon. False: the save is gone, or has waited for long enough."""
        save = self.saves.get(job)
        if save is None:
            return False
        if save.postponed_since is None:
            save.postponed_since = now
        if now - save.postponed_since > _ASK_FOR_S:
            return False
        self.postponed.append(job)
        return True

    def ask_again(self, now: float) -> list[Save]:
        """Postponed saves, every now and then."""
        if not self.postponed or now < self._ask_at:
            return []
        self._ask_at = now + _ASK_EVERY_S
        jobs, self.postponed = self.postponed, []
        return [self.saves[job] for job in jobs if job in self.saves]

    def dispatch(self) -> list[SaveJob]:
        """Granted saves, for the workers; from now on only they can end them."""
        jobs = []
        for save in self._granted:
            if save.job in self.saves and save.slot is not None:
                save.stage = Stage.COPYING
                slot = save.slot
                copy = ChunkCopy(save.key, slot.segment, slot.offset, slot.nbytes, save.blocks)
                jobs.append(SaveJob(save.job, save.epoch, copy))
        self._granted.clear()
        return jobs

    def overwritten(self, blocks: Iterable[int]) -> list[Save]:
        """Saves whose source the engine is about to overwrite."""
        by_block = self._by_block
        jobs: set[int] = set()
        if by_block:
            jobs.update(*(by_block[block] for block in blocks if block in by_block))
        return [self.saves[job] for job in sorted(jobs)]

    def forget(self) -> list[Save]:
        """The engine's cache is reset, its memory may go: what is being copied fails, others are returned.

        Nothing of it is copied once more, either: the blocks may hold anything by then.
        """
        for save in self.saves.values():
            save.failed = save.flushed = True
        return [save for save in self.saves.values() if save.stage is not Stage.COPYING]

    def of_other_stores(self, epoch: bytes | None) -> list[Save]:
        """Saves not yet with the workers whose slots died with their store."""
        return [s for s in self.saves.values() if s.stage is not Stage.COPYING and s.epoch != epoch]


@dataclass(slots=True)
class Outbox:
    """What the next Update will say. No report is lost when an Update is: see `take_back`."""

    reserve: list[tuple[int, bytes, int]] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    corrupt: list[bytes] = field(default_factory=list)
    used: deque[tuple[bytes, ...]] = field(default_factory=lambda: deque(maxlen=_USED_MAX))

    def __bool__(self) -> bool:
        return bool(
            self.reserve or self.committed or self.aborted or self.released or self.corrupt or self.used
        )

    def take(self, client: str, seq: int, leases_held: int, jobs_held: int, drawn: int) -> Update:
        """An Update with everything in here; the box is empty afterwards."""
        update = Update(
            client=client,
            seq=seq,
            reserve=tuple(self.reserve),
            committed=tuple(self.committed),
            aborted=tuple(self.aborted),
            released=tuple(self.released),
            corrupt=tuple(self.corrupt),
            used=tuple(self._newest_used())[::-1],
            leases_held=leases_held,
            jobs_held=jobs_held,
            drawn=drawn,
        )
        self.clear()
        return update

    def _newest_used(self) -> Iterator[tuple[bytes, ...]]:
        room = _USED_KEYS_MAX
        for keys in reversed(self.used):
            if room <= 0:
                return
            yield keys[:room]
            room -= len(keys)

    def take_back(self, update: Update) -> None:
        """An Update got lost. Say it again; what it may have reserved is given back."""
        self.committed = [*update.committed, *self.committed]
        self.aborted = [*update.aborted, *(job for job, _, _ in update.reserve), *self.aborted]
        self.released = [*update.released, *self.released]
        self.corrupt = [*update.corrupt, *self.corrupt]

    def clear(self) -> None:
        """Forget everything: the store that it was meant for is gone."""
        for box in (self.reserve, self.committed, self.aborted, self.released, self.corrupt):
            box.clear()
        self.used.clear()
