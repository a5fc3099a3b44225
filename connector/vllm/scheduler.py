"""The scheduler side: match, load, save. One request's way through it, from top to bottom.

    new_request -> matched_tokens -> after_alloc -> (build_work each step) -> finished

Calls are posted to the client, answers are collected where the engine calls in; a step waits for those
that it needs no longer than `client.lookup_wait`. While the node store is absent, everything is a miss.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvstrata.connector.books import Outbox, Save, SaveBook, Stage
from kvstrata.connector.jobs import ChunkCopy, LoadJob
from kvstrata.connector.lookups import Lookup, LookupBook, LookupStage
from kvstrata.connector.vllm.compat import all_tokens, is_streaming_input, prompt_tokens, skips_prefix_cache
from kvstrata.connector.vllm.identity import Identity
from kvstrata.connector.vllm.metadata import StepWork, WorkDone
from kvstrata.connector.vllm.requests import Loading, Tracked, scheduled, taken_blocks, targets_of
from kvstrata.connector.vllm.stats import Stats
from kvstrata.controller.client import Answer, Call, Lost, NodeClient
from kvstrata.core.config import ClientConfig
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.events import Match, Matched, Refused, Update, Updated, Why
from kvstrata.core.keys import KeyChain
from kvstrata.core.slots import Slot

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvstrata.vllm")

_ASK_AGAIN_S = 1.0
_UNANSWERED_MAX = 32  # lookups under way; more would only wait for each other, and Updates for them
_USED_EVERY = 32  # chunks
_ALONE_FACTOR = 5  # a step that nobody needs may wait for so many times `client.lookup_wait`
_KEYS_MAX = 1 << 16  # chunks of a prompt, as many as the store takes in one question
_PATIENCE_S = 10.0  # an engine with news for a store that went out of reach stays awake for so long


class SchedulerConnector:
    """Runs in the engine core. Every method is called by vLLM's scheduler, on its thread."""

    def __init__(
        self,
        client: NodeClient,
        identity: Identity,
        chunk_tokens: int,
        block_tokens: int,
        ranks: int,
        config: ClientConfig,
    ) -> None:
        self._client, self._identity, self._config = client, identity, config
        self._chunk_tokens, self._block_tokens, self._ranks = chunk_tokens, block_tokens, ranks
        self._tracked: dict[str, Tracked] = {}
        self._loading: dict[int, Loading] = {}
        self._lookups = LookupBook()
        self._saves = SaveBook()
        self._outbox = Outbox()
        self._update: Update | None = None  # the one that is under way
        self._epoch: bytes | None = None  # of the store that the books are about
        self._reached = 0.0  # when that store was in reach last, monotonic seconds
        self._numbers = itertools.count(1)
        self._new_loads: list[tuple[str, LoadJob]] = []
        self._waited_s = 0.0  # for the store, in this step
        self._begun: set[str] = set()  # requests that were given a step and are not finished
        self.stats = Stats()

    # --- 1. arrives: hash the prompt, ask the store ------------------------------------------

    def new_request(self, request: Request) -> None:
        """Start looking before the request is first considered for a step."""
        tokens = prompt_tokens(request)
        if tokens is None or is_streaming_input(request):
            self.stats.count("bypassed_requests")
            return
        try:
            chain = self._chain(request, tokens)
        except (UnsupportedModel, OverflowError, TypeError, ValueError, OSError) as error:
            log.warning("request %s is not cached: %s", request.request_id, error)
            chain = None
        if chain is None:
            self.stats.count("bypassed_requests")
            return
        tracked = self._tracked[request.request_id] = Tracked(request, chain)
        tracked.may_load = self._config.load and not skips_prefix_cache(request)
        self._look_up(tracked)

    def _chain(self, request: Request, tokens: Sequence[int]) -> KeyChain | None:
        """The keys of its prompt; None while the weights are not identified yet."""
        namespace = self._identity.namespace(request)
        if namespace is None:
            return None
        chain = KeyChain(namespace, self._chunk_tokens, self._identity.extras(request, self._chunk_tokens))
        chain.extend(tokens)
        return chain

    def _look_up(self, tracked: Tracked) -> None:
        session = self._client.session
        keys = tracked.chain.keys
        tracked.asked = time.monotonic()
        if not tracked.may_load or not keys:
            return
        if session is None:
            self.stats.count("unasked_lookups")
            return
        self._follow(session.epoch)
        if self._lookups.unanswered >= _UNANSWERED_MAX:
            tracked.asked = 0.0  # it is asked for when the engine considers it
            return
        lease = next(self._numbers)
        tracked.lookup = self._lookups.ask(lease, session.epoch, tracked.request.request_id, tracked.asked)
        call = Match(self._client.client, self._client.next_seq(), lease, tuple(keys[:_KEYS_MAX]))
        self._client.post(session, call)

    # --- 2. matched: how many tokens the store can give --------------------------------------

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond `computed` that can be loaded, or None to be asked again next step."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not tracked.may_load:
            return 0, False
        if self._outdated(tracked):
            if self._asked_enough():
                return None, False
            self._release(tracked)
            tracked.preemptions = request.num_preemptions
            tracked.chain.extend(all_tokens(request))
            self._look_up(tracked)
        lookup = tracked.lookup
        if lookup is None:
            return 0, False
        if lookup.stage is LookupStage.ASKED:
            self._collect(self._may_wait(), until=lookup)
        if lookup.stage is LookupStage.ASKED:
            if time.monotonic() - lookup.asked < self._config.call_deadline:
                return None, False
            self._release(tracked)  # the store is slow: do without
            self.stats.count("slow_lookups")
            return 0, False
        tokens = self._loadable(tracked) - computed
        if tokens <= 0:
            self._release(tracked)
            return 0, False
        return tokens, True

    def _outdated(self, tracked: Tracked) -> bool:
        """Whether to ask (again): after a preemption; after queueing for a while without all it wants, as the
        store may have more by now; with a lease whose load would have too little time left.
        """
        if tracked.preemptions < tracked.request.num_preemptions:
            return True
        lookup, age = tracked.lookup, time.monotonic() - tracked.asked
        if lookup is None or lookup.stage is LookupStage.OVER:
            return age > _ASK_AGAIN_S
        if lookup.stage is LookupStage.ASKED:
            return False
        has_all = len(lookup.slots) == len(tracked.chain.keys)
        return age > self._config.load_deadline / 2 or (
            age > _ASK_AGAIN_S and not has_all and self._in_reach()  # or it would lose what it has
        )

    def _asked_enough(self) -> bool:
        """Whether the lookups under way are as many as may be, and will be answered soon."""
        if self._lookups.unanswered < _UNANSWERED_MAX:
            return False
        self._collect(0.0)
        patient = time.monotonic() - self._lookups.oldest_question < self._config.call_deadline
        return self._lookups.unanswered >= _UNANSWERED_MAX and patient

    def _loadable(self, tracked: Tracked) -> int:
        """Tokens, from the start, that the lookup found; whole blocks, and never the last token."""
        lookup = tracked.lookup
        if lookup is None or lookup.stage is not LookupStage.HELD:
            return 0
        last: int = tracked.request.num_tokens - 1
        return min(len(lookup.slots) * self._chunk_tokens, last - last % self._block_tokens)

    # --- 3. loaded: hand blocks and slots to the workers -------------------------------------

    def after_alloc(self, request: Request, blocks: list[int], external: int) -> None:
        """The engine has allocated `blocks`; the last `external` computed tokens are ours to load."""
        tracked = self._tracked.get(request.request_id)
        lookup = tracked.lookup if tracked else None
        if tracked is None or lookup is None or lookup.stage is not LookupStage.HELD:
            return  # nothing was offered: `external` is 0
        if external == 0:
            self._release(tracked)
            return
        end = self._loadable(tracked)
        start = end - external
        first_chunk = start // self._chunk_tokens
        keys, per_chunk = tracked.chain.keys, self._chunk_tokens // self._block_tokens
        loaded = range(-(-start // self._block_tokens), end // self._block_tokens)
        chunks = []
        for i in range(first_chunk, -(-end // self._chunk_tokens)):
            slot, of_chunk = lookup.slots[i], range(i * per_chunk, (i + 1) * per_chunk)
            targets = targets_of(blocks, of_chunk, loaded)
            chunks.append(ChunkCopy(keys[i], slot.segment, slot.offset, slot.nbytes, targets))
        job = next(self._numbers)
        load = LoadJob(job, lookup.epoch, tuple(chunks), lookup.asked + self._config.load_deadline)
        self._new_loads.append((request.request_id, load))
        self._loading[job] = Loading(request.request_id, lookup.lease, lookup.epoch, first_chunk, external)
        self._lookups.end(lookup)
        tracked.lookup = None

    # --- 4. each step: save what is complete, protect what is under way ----------------------

    def build_work(self, output: SchedulerOutput) -> StepWork:
        """The workers' work of this step, and one message to the store."""
        self._waited_s = 0.0  # what is left is for this call and the next step's lookups
        idle = not output.total_num_scheduled_tokens
        session = self._client.session  # another thread sets it
        self._follow(session.epoch if session else None)
        self._expire_lookups()
        for save in self._saves.ask_again(time.monotonic()):
            self._outbox.reserve.append(save.reservation)
        waits = idle and (self._update or self._lookups.leases or self._saves.postponed or self._outbox)
        self._collect(self._may_wait() if waits else 0.0)
        loaded = [block for _, load in self._new_loads for chunk in load.chunks for block in chunk.blocks]
        flush = self._flush_overwritten(taken_blocks(output, self._block_tokens) + loaded)
        self._note_scheduled(output)
        work = StepWork(self._new_loads, self._saves.dispatch(), flush, idle)
        self._new_loads = []
        self._send_update()
        return work

    def _note_scheduled(self, output: SchedulerOutput) -> None:
        """Follow every scheduled request's blocks and tokens; want saves for what this step completes."""
        self._begun.update(output.num_scheduled_tokens)
        for loading in self._loading.values():
            loading.in_use = loading.in_use or loading.request_id in output.num_scheduled_tokens
        for step in scheduled(output):
            if tracked := self._tracked.get(step.request_id):
                if step.afresh:
                    tracked.blocks.clear()
                tracked.blocks += step.blocks
                self._save_complete(tracked, step.computed)

    def _save_complete(self, tracked: Tracked, computed: int) -> None:
        """Want a save for every chunk that is complete once `computed` tokens are.

        Only confirmed tokens count: drafts and placeholders are computed too, but not in the
        request's token list yet.
        """
        tokens = all_tokens(tracked.request)
        full = min(computed, len(tokens)) // self._chunk_tokens
        if full <= tracked.next_save or not self._config.save or not self._in_reach():
            return
        keys = tracked.chain.extend(tokens) if full > len(tracked.chain.keys) else tracked.chain.keys
        per_chunk = self._chunk_tokens // self._block_tokens
        assert self._epoch is not None
        for chunk in range(tracked.next_save, full):
            if keys[chunk] not in self._saves:
                blocks = tuple(tracked.blocks[chunk * per_chunk : (chunk + 1) * per_chunk])
                save = Save(next(self._numbers), keys[chunk], self._client.slot_sizes[0], blocks, self._epoch)
                self._saves.want(save)
                self._outbox.reserve.append(save.reservation)
        if full // _USED_EVERY > tracked.next_save // _USED_EVERY:
            self._outbox.used.append(tuple(keys[:full]))  # or a long prompt would push out its own head
        tracked.next_save = full

    def _flush_overwritten(self, taken: Iterable[int]) -> list[int]:
        """Saves whose blocks this step overwrites: copied first, or given up if they have no slot yet."""
        flush = []
        for save in self._saves.overwritten(taken):
            if save.stage is Stage.WANTED and self._update and save.reservation in self._update.reserve:
                self._collect(self._may_wait(), until=save)
            if save.stage is Stage.WANTED:
                self._give_up(save)
            elif save.stage is not Stage.OVER:
                save.flushed = True
                flush.append(save.job)
        return flush

    def _give_up(self, save: Save, why: str = "lost_saves") -> None:
        self._saves.drop(save.job)
        if save.reservation in self._outbox.reserve:
            self._outbox.reserve.remove(save.reservation)
        else:
            self._outbox.aborted.append(save.job)
        self.stats.count(why)

    # --- 5. finished: the last chunk ---------------------------------------------------------

    def finished(self, request: Request, blocks: list[int]) -> None:
        """The engine lets go of the request. Its blocks may be reused; their bytes stay until then."""
        self._begun.discard(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return
        self._release(tracked)
        if blocks and request.num_computed_tokens and not self._is_loading(request.request_id):
            tracked.blocks = list(blocks)
            self._save_complete(tracked, min(request.num_computed_tokens, request.num_tokens - 1))
        if tracked.next_save and self._client.session is not None:
            self._outbox.used.append(tuple(tracked.chain.keys[: tracked.next_save]))

    def _is_loading(self, request_id: str) -> bool:
        return any(
            loading.request_id == request_id and not loading.in_use for loading in self._loading.values()
        )

    # --- the workers' reports ----------------------------------------------------------------

    def work_done(self, done: WorkDone) -> None:
        """What the workers report."""
        for job, ranks in done.saved.items():
            save = self._saves.saves.get(job)
            if save is None:
                continue
            save.ranks_ended += ranks
            save.failed = save.failed or job in done.unsaved  # some rank's part is missing: not a chunk
            save.unpackable = save.unpackable or job in done.unpackable
            if save.ranks_ended >= self._ranks:
                self._save_ended(save)
        for job, ranks in done.loaded.items():
            loading = self._loading.get(job)
            if loading is None:
                continue
            loading.ranks_ended += ranks
            if job in done.failed_from:
                self._load_failed(loading, done.failed_from[job])
            if loading.ranks_ended >= self._ranks:
                del self._loading[job]
                if job not in done.failed_from:
                    self.stats.count("loaded_tokens", loading.tokens)
                if loading.epoch == self._epoch:
                    self._outbox.released.append(loading.lease)
        self._outbox.corrupt += sorted(done.corrupt)  # a set has another order in every process
        if done.corrupt:
            self.stats.count("corrupt_chunks", len(done.corrupt))

    def _save_ended(self, save: Save) -> None:
        self._saves.drop(save.job)
        if save.epoch == self._epoch:
            (self._outbox.aborted if save.failed else self._outbox.committed).append(save.job)
        sizes = self._client.slot_sizes
        if not save.unpackable or save.nbytes == sizes[-1] or not self._in_reach():
            self.stats.count("failed_saves" if save.failed else "saved_chunks")
        elif save.flushed or save.epoch != self._epoch:  # others have its blocks, or its store is gone
            self.stats.count("lost_saves")
        else:  # its blocks are still watched, as they were until now
            again = Save(next(self._numbers), save.key, sizes[-1], save.blocks, save.epoch)
            self._saves.want(again)
            self._outbox.reserve.append(again.reservation)

    def _load_failed(self, loading: Loading, failed_from: int) -> None:
        self.stats.count("failed_loads")
        if tracked := self._tracked.get(loading.request_id):
            tracked.may_load = False
            tracked.next_save = min(tracked.next_save, loading.first_chunk + failed_from)

    # --- the store's answers -----------------------------------------------------------------

    def _may_wait(self) -> float:
        """Seconds that this step may still wait. While no request runs, nobody has to wait with it."""
        allowed = self._config.lookup_wait * (1 if self._begun else _ALONE_FACTOR)
        return max(0.0, allowed - self._waited_s)

    def _collect(self, wait_s: float, until: Lookup | Save | None = None) -> None:
        """Take in answers; wait at most `wait_s`, all calls of a step together, for the one that matters."""
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
                if grant is Why.NOT_READY and self._saves.postpone(job, time.monotonic()):
                    continue
                if not isinstance(grant, Slot):
                    self._saves.drop(job)
                    self.stats.count(f"save_{grant.value}")
                elif not self._saves.grant(job, grant):
                    log.debug("job %d was given up meanwhile; its abort is on the way", job)
        else:
            self._outbox.take_back(call)
            for job, _, _ in call.reserve:
                if self._saves.drop(job):
                    self.stats.count("saves_out_of_reach")

    def _match_answered(self, epoch: bytes, call: Match, answer: Answer) -> None:
        slots = answer.slots if isinstance(answer, Matched) else ()
        lookup = self._lookups.answer(call.lease, slots)
        # If the call got lost, the store may still have leased something.
        if epoch == self._epoch and (isinstance(answer, Lost) or (lookup is None and slots)):
            self._outbox.released.append(call.lease)
        if lookup is None:
            return
        if isinstance(answer, Refused):
            self.stats.count(f"lookup_{answer.why.value}")
        if isinstance(answer, Matched):
            tracked = self._tracked.get(lookup.request_id)
            if tracked is not None and tracked.lookup is lookup:
                tracked.next_save = len(slots)  # fewer than before if some were evicted since
            self.stats.count("lookups")
            self.stats.count("lookups_cut_short", answer.being_written)

    def _release(self, tracked: Tracked) -> None:
        """The request's lookup is of no use any more; an answer that is still to come finds nobody."""
        if tracked.lookup is not None:
            self._end(tracked.lookup)
            tracked.lookup = None

    def _end(self, lookup: Lookup) -> None:
        if self._lookups.end(lookup) and lookup.epoch == self._epoch:
            self._outbox.released.append(lookup.lease)

    def _expire_lookups(self) -> None:
        """Give back what queued requests have held for half of a load's time; they will ask again."""
        for lookup in self._lookups.held_since(time.monotonic() - self._config.load_deadline / 2):
            self._end(lookup)

    def _follow(self, epoch: bytes | None) -> None:
        """The books are about one store process. When another one answers, what the old one held is void."""
        if epoch is None:  # out of reach: what the workers do not have yet will not be saved
            for save in self._saves.of_other_stores(None):
                self._give_up(save, "saves_out_of_reach")
            return
        self._reached = time.monotonic()
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._outbox.clear()
        self._update = None
        for save in self._saves.of_other_stores(epoch):
            self._saves.drop(save.job)
        self._lookups.end_all()

    def _in_reach(self) -> bool:
        """Whether the store that the books are about answers."""
        session = self._client.session
        return session is not None and session.epoch == self._epoch

    def _send_update(self) -> None:
        session = self._client.session
        if session is None or self._update or not self._outbox or not self._in_reach():
            return
        leases, jobs = self._held()
        client, seq, drawn = self._client.client, self._client.next_seq(), next(self._numbers)
        self._update = self._outbox.take(client, seq, leases, jobs, drawn)
        self._client.post(session, self._update)

    def _held(self) -> tuple[int, int]:
        """Leases and jobs that the store may have on its books, for lookups without an answer too."""
        leases = self._lookups.leases + sum(
            loading.epoch == self._epoch for loading in self._loading.values()
        )
        jobs = sum(s.stage is not Stage.WANTED and s.epoch == self._epoch for s in self._saves.saves.values())
        return leases, jobs

    def busy(self) -> bool:
        """Whether the engine must keep stepping: copies, news for the store, or leases that it may grant.

        Also for a while after the store went out of reach: one lost call is enough for that, and the
        store that comes back still holds what this engine had from it. Nothing wakes an idle engine.
        """
        if self._client.session is None and time.monotonic() - self._reached > _PATIENCE_S:
            return self._saves.copying > 0 or bool(self._loading)
        books = self._saves, self._loading, self._update, self._outbox, self._lookups.unanswered
        return any(books)

    def reset(self) -> None:
        """Forget the cache: nothing stored so far is found again by this engine.

        Requests that are under way were keyed before: they go on without the store.
        """
        for tracked in self._tracked.values():
            self._release(tracked)
        self._tracked.clear()
        for save in self._saves.forget():
            self._give_up(save)
        self._identity.new_generation()

    def close(self) -> None:
        self._client.close()
