"""The scheduler side: match, load, save. One request's way through it, from top to bottom.

    new_request -> matched_tokens -> after_alloc -> (build_work each step) -> finished

Calls are posted to the client, answers are collected where the engine calls in; a step waits for those
that it needs no longer than `client.lookup_wait`. While the node store is absent, everything is a miss.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstrata.connector.jobs import ChunkCopy, LoadJob
from kvstrata.connector.lookups import Lookup, LookupStage
from kvstrata.connector.store_link import StoreLink
from kvstrata.connector.vllm.compat import all_tokens, is_streaming_input, prompt_tokens, skips_prefix_cache
from kvstrata.connector.vllm.identity import Identity
from kvstrata.connector.vllm.metadata import StepWork, WorkDone
from kvstrata.connector.vllm.requests import Loading, Tracked, scheduled, taken_blocks, targets_of
from kvstrata.connector.vllm.stats import Stats
from kvstrata.controller.client import NodeClient
from kvstrata.core.config import ClientConfig
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.keys import KeyChain

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvstrata.vllm")

_ASK_AGAIN_S = 1.0
_USED_EVERY = 32  # chunks


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
        self._identity, self._config = identity, config
        self._chunk_tokens, self._block_tokens, self._ranks = chunk_tokens, block_tokens, ranks
        self._tracked: dict[str, Tracked] = {}
        self._loading: dict[int, Loading] = {}  # by job
        self._new_loads: list[tuple[str, LoadJob]] = []
        self._begun: set[str] = set()  # requests that were given a step and are not finished
        self.stats = Stats()
        self._link = StoreLink(client, config, ranks, self.stats.count)

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
        tracked.asked = time.monotonic()
        if not tracked.may_load or not tracked.chain.keys:
            return
        if self._link.asks_enough:
            tracked.asked = 0.0  # it is asked for when the engine considers it
            return
        tracked.lookup = self._link.ask(tracked.request.request_id, tracked.chain.keys, tracked.asked)

    # --- 2. matched: how many tokens the store can give --------------------------------------

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond `computed` that can be loaded, or None to be asked again next step."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not tracked.may_load:
            return 0, False
        if self._outdated(tracked):
            if self._link.asks_enough and self._link.answers_soon():
                return None, False
            self._release(tracked)
            tracked.preemptions = request.num_preemptions
            tracked.chain.extend(all_tokens(request))
            self._look_up(tracked)
        lookup = tracked.lookup
        if lookup is None:
            return 0, False
        if lookup.stage is LookupStage.ASKED:
            self._link.collect(not self._begun, until=lookup)
        if lookup.stage is LookupStage.ASKED:
            if time.monotonic() - lookup.asked < self._config.call_deadline:
                return None, False
            self._release(tracked)  # the store is slow: do without
            self.stats.count("slow_lookups")
            return 0, False
        tracked.next_save = lookup.found  # fewer than before if some were evicted since
        tokens = self._loadable(request, lookup) - computed
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
            age > _ASK_AGAIN_S and not has_all and self._link.in_reach  # or it would lose what it has
        )

    def _loadable(self, request: Request, lookup: Lookup) -> int:
        """Tokens, from the start, that the lookup found; whole blocks, and never the last token."""
        last: int = request.num_tokens - 1
        return min(lookup.found * self._chunk_tokens, last - last % self._block_tokens)

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
        end = self._loadable(request, lookup)
        start = end - external
        first_chunk = start // self._chunk_tokens
        keys, per_chunk = tracked.chain.keys, self._chunk_tokens // self._block_tokens
        loaded = range(-(-start // self._block_tokens), end // self._block_tokens)
        chunks = []
        for i in range(first_chunk, -(-end // self._chunk_tokens)):
            slot, of_chunk = lookup.slots[i], range(i * per_chunk, (i + 1) * per_chunk)
            targets = targets_of(blocks, of_chunk, loaded)
            chunks.append(ChunkCopy(keys[i], slot.segment, slot.offset, slot.nbytes, targets))
        job, tracked.lookup = self._link.begin_load(lookup), None
        load = LoadJob(job, lookup.epoch, tuple(chunks), lookup.asked + self._config.load_deadline)
        self._new_loads.append((request.request_id, load))
        self._loading[job] = Loading(request.request_id, first_chunk, external)

    # --- 4. each step: save what is complete, protect what is under way ----------------------

    def build_work(self, output: SchedulerOutput) -> StepWork:
        """The workers' work of this step, and one message to the store."""
        idle = not output.total_num_scheduled_tokens
        alone = not self._begun  # no request waits with this step
        self._link.begin_step(alone, idle)
        loaded = [block for _, load in self._new_loads for chunk in load.chunks for block in chunk.blocks]
        taken = taken_blocks(output, self._block_tokens) + loaded
        flush = self._link.flush_overwritten(taken, alone)
        self._note_scheduled(output)
        work = StepWork(self._new_loads, self._link.saves.dispatch(), flush, idle)
        self._new_loads = []
        self._link.send()
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
        if full <= tracked.next_save or not self._config.save or not self._link.in_reach:
            return
        keys = tracked.chain.extend(tokens) if full > len(tracked.chain.keys) else tracked.chain.keys
        per_chunk = self._chunk_tokens // self._block_tokens
        for chunk in range(tracked.next_save, full):
            blocks = tracked.blocks[chunk * per_chunk : (chunk + 1) * per_chunk]
            self._link.save(keys[chunk], tuple(blocks))
        if full // _USED_EVERY > tracked.next_save // _USED_EVERY:
            self._link.outbox.used.append(tuple(keys[:full]))  # or a long prompt would push out its own head
        tracked.next_save = full

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
        if tracked.next_save and self._link.in_reach:
            self._link.outbox.used.append(tuple(tracked.chain.keys[: tracked.next_save]))

    def _is_loading(self, request_id: str) -> bool:
        return any(
            loading.request_id == request_id and not loading.in_use for loading in self._loading.values()
        )

    # --- the workers' reports ----------------------------------------------------------------

    def work_done(self, done: WorkDone) -> None:
        """What the workers report."""
        for job, ranks in done.saved.items():
            self._link.saved(job, ranks, failed=job in done.unsaved, unpackable=job in done.unpackable)
        for job, ranks in done.loaded.items():
            loading = self._loading.get(job)
            if loading is None:
                continue
            loading.ranks_ended += ranks
            if job in done.failed_from:
                self._load_failed(loading, done.failed_from[job])
            if loading.ranks_ended >= self._ranks:
                del self._loading[job]
                self._link.end_load(job)
                if job not in done.failed_from:
                    self.stats.count("loaded_tokens", loading.tokens)
        self._link.outbox.corrupt += sorted(done.corrupt)  # a set has another order in every process
        if done.corrupt:
            self.stats.count("corrupt_chunks", len(done.corrupt))

    def _load_failed(self, loading: Loading, failed_from: int) -> None:
        self.stats.count("failed_loads")
        if tracked := self._tracked.get(loading.request_id):
            tracked.may_load = False
            tracked.next_save = min(tracked.next_save, loading.first_chunk + failed_from)

    def _release(self, tracked: Tracked) -> None:
        """The request's lookup is of no use any more."""
        if tracked.lookup is not None:
            self._link.end(tracked.lookup)
            tracked.lookup = None

    def busy(self) -> bool:
        """Whether the engine must keep stepping though it has no request."""
        return self._link.busy()

    def reset(self) -> None:
        """Forget the cache: nothing stored so far is found again by this engine.

        Requests that are under way were keyed before: they go on without the store.
        """
        for tracked in self._tracked.values():
            self._release(tracked)
        self._tracked.clear()
        self._link.forget_saves()
        self._identity.new_generation()

    def close(self) -> None:
        self._link.close()
