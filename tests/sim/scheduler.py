"""vLLM's scheduler in miniature: queues, blocks, preemption, steps in flight. It drives a real connector.

It calls `SchedulerConnector` where and in the order in which `vllm/v1/core/sched/scheduler.py` calls
its connector, also with async scheduling (`depth` 2), in which a step is planned while the one before
is still computed, and blocks are given back only when the steps that write them have ended.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from random import Random
from typing import Any

from kvstrata.connector.vllm.metadata import WorkDone
from tests.sim.blocks import BLOCK_TOKENS, GARBAGE, BlockPool
from tests.sim.requests import At, NewRequest, Scheduled, SimRequest, Step


@dataclass(frozen=True)
class Traits:
    """How an engine was started."""

    ranks: int
    blocks: int
    running: int  # requests at once
    budget: int  # tokens a step
    depth: int  # steps in flight
    drafts: int  # tokens guessed in a step
    remembers: bool  # prefix caching
    resumed_as_new: bool  # what vLLM's second model runner is told of requests that were preempted

    @classmethod
    def draw(cls, random: Random) -> Traits:
        depth = random.choice([1, 1, 2])
        return cls(
            ranks=random.choice([1, 1, 2]),
            blocks=random.choice([24, 32, 64]),
            running=random.choice([1, 2, 4]),
            budget=random.choice([12, 24, 48]),
            depth=depth,
            drafts=random.choice([0, 2]) if depth == 1 else 0,
            remembers=random.random() < 0.7,
            resumed_as_new=random.random() < 0.5,
        )


class SimScheduler:
    def __init__(
        self,
        connector: Any,  # a SchedulerConnector, to which our requests are as good as vLLM's
        traits: Traits,
        random: Random,
        judge: Callable[[SimRequest], None],
    ) -> None:
        self.connector, self._traits, self._random = connector, traits, random
        self._judge = judge  # is told of each request that is computed to its end
        self.requests: dict[str, SimRequest] = {}
        self.waiting: list[SimRequest] = []
        self.running: list[SimRequest] = []
        self.pool = BlockPool(traits.blocks, traits.remembers)
        self.preempted = 0
        self._finished: list[str] = []  # since the last step
        self._loaded: set[SimRequest] = set()
        self._planned, self._ended = 0, 0  # steps that compute something
        self._deferred: deque[tuple[int, list[int]]] = deque()
        self._ranks_loaded: Counter[str] = Counter()  # of each request's load, the ranks that have ended it
        self._budget = 0

    # --- from outside ------------------------------------------------------------------------

    def has_requests(self) -> bool:
        """Whether the engine must step. If not, it sleeps until somebody wants something."""
        return bool(self.requests or self._finished or self.connector.busy())

    def add(self, request: SimRequest) -> None:
        self.waiting.append(request)
        self.requests[request.request_id] = request
        self.connector.new_request(request)

    def finish(self, request: SimRequest) -> None:
        """It is over, or aborted."""
        if request.at is At.FINISHED:
            return
        still_loading = request.at is At.LOADING and request not in self._loaded
        self._loaded.discard(request)
        (self.running if request.at is At.RUNNING else self.waiting).remove(request)
        request.at = At.FINISHED
        self.connector.finished(request, request.blocks[: _blocks_for(request.num_computed_tokens)])
        self._finished.append(request.request_id)
        if not still_loading:
            self._let_go(request)
            del self.requests[request.request_id]

    def reset(self, running_too: bool, new_weights: Callable[[], None]) -> bool:
        """vLLM's `reset_prefix_cache` with its connector, after the weights were changed.

        Returns whether nothing uses the blocks now.
        """
        while running_too and self.running:
            self._preempt(drop_stale=True)
        if running_too and not self.pool.all_free:
            return False  # vLLM raises: a load is under way
        if self.pool.all_free:
            self.pool.forget()
            new_weights()
        self.connector.reset()
        return self.pool.all_free

    # --- a step is planned -------------------------------------------------------------------

    def schedule(self) -> Step:
        step = Step()
        self._budget = self._traits.budget
        if not self._schedule_running(step):
            self._schedule_waiting(step)
        step.work = self.connector.build_work(step.output)
        self._planned += bool(step.scheduled)
        for scheduled in step.scheduled:
            request, count = scheduled.request, len(scheduled.contents)
            request.num_computed_tokens += count
            request.in_flight += count
            request.last_step = self._planned
            request.placeholders += scheduled.samples and self._traits.depth > 1
        self._finished.clear()
        return step

    def _schedule_running(self, step: Step) -> bool:
        """Returns whether somebody was preempted for it."""
        preempted = False
        for request in list(self.running):
            ends = request.num_computed_tokens + 2 - request.placeholders >= request.longest
            if request.at is not At.RUNNING or (request.placeholders and ends):
                continue
            wanted = request.num_tokens + request.drafts + request.placeholders - request.num_computed_tokens
            count = min(wanted, self._budget)
            if not count:
                continue
            while (blocks := self._grow(request, request.num_computed_tokens + count)) is None:
                if not self._may_free(self.running[-1]):
                    return preempted
                preempted = True
                if self._preempt() is request:
                    return preempted
            cached = step.output.scheduled_cached_reqs
            cached.req_ids.append(request.request_id)
            cached.new_block_ids.append((blocks,) if blocks else None)
            cached.num_computed_tokens.append(request.num_computed_tokens)
            self._compute(step, request, count)
        return preempted

    def _schedule_waiting(self, step: Step) -> None:
        for request in sorted(self.waiting, key=lambda waiting: not waiting.blocks):
            if not self._budget or len(self.running) >= self._traits.running:
                return
            if self._ready(request) and not self._admit(step, request):
                return

    def _ready(self, request: SimRequest) -> bool:
        if request.at is At.LOADING:
            if request not in self._loaded:
                return False
            self._loaded.discard(request)
            request.at = At.WAITING
            if not request.num_computed_tokens:
                self._let_go(request)
            self._remember(request, request.num_computed_tokens)
            assert request.num_computed_tokens < request.num_tokens, "a load leaves a token to compute"
        return not request.stale or request.drop_stale

    def _admit(self, step: Step, request: SimRequest) -> bool:
        """False: there are no blocks for it, nor for those behind it."""
        shared: list[int] = []
        external, loads = 0, False
        computed = request.num_computed_tokens
        if not computed:
            if not request.skip_reading_prefix_cache:
                shared = self.pool.find(request.truth, request.num_tokens - 1)
            computed = len(shared) * BLOCK_TOKENS
            matched, loads = self.connector.matched_tokens(request, computed)
            if matched is None:
                return True  # it is asked again in the next step
            external = matched
            assert not request.skip_reading_prefix_cache or not external
            computed += external
        count = 0 if loads else min(request.num_tokens - computed, self._budget)
        end = max(request.num_tokens, computed + count + self._traits.drafts)
        wanted = _blocks_for(end) - len(request.blocks) - len(shared)
        if not self.pool.room_for(wanted + (self._reserved() if loads else 0), shared):
            return False
        self.pool.share(shared)
        request.blocks += shared
        assert self._grow(request, computed + count, lookahead=not loads) is not None
        self.connector.after_alloc(request, list(request.blocks), external)
        request.num_computed_tokens = computed
        if loads:
            request.at = At.LOADING
            return True
        self.waiting.remove(request)
        self.running.append(request)
        request.at = At.RUNNING
        self._announce(step, request)
        self._compute(step, request, count, admitted=True)
        return True

    def _announce(self, step: Step, request: SimRequest) -> None:
        blocks, computed = list(request.blocks), request.num_computed_tokens
        if not request.num_preemptions or self._traits.resumed_as_new:
            step.output.scheduled_new_reqs.append(NewRequest(request.request_id, (blocks,), computed))
            return
        cached = step.output.scheduled_cached_reqs
        cached.req_ids.append(request.request_id)
        cached.new_block_ids.append((blocks,))
        cached.num_computed_tokens.append(computed)
        cached.resumed_req_ids.add(request.request_id)

    def _compute(self, step: Step, request: SimRequest, count: int, admitted: bool = False) -> None:
        """The step computes `count` more positions; of drafts among them, chance accepts some."""
        start, known = request.num_computed_tokens, request.num_tokens + request.placeholders
        drafts = max(0, start + count - known)
        accepted = min(self._random.randint(0, drafts), len(request.script) - known - 1) if drafts else 0
        right = request.truth[start : min(start + count, known + accepted)]
        step.scheduled.append(
            Scheduled(
                request=request,
                blocks=list(request.blocks),
                start=start,
                contents=right + [GARBAGE] * (count - len(right)),
                truth=request.truth,
                admitted=admitted,
                samples=start + count >= known,
                accepted=accepted,
                rejected=drafts - accepted,
            )
        )
        step.output.num_scheduled_tokens[request.request_id] = count
        self._budget -= count
        self._remember(request, min(start + count, request.num_tokens))

    # --- blocks ------------------------------------------------------------------------------

    def _grow(self, request: SimRequest, tokens: int, lookahead: bool = True) -> list[int] | None:
        """Give it room for `tokens` tokens; returns the new blocks."""
        end = tokens + (self._traits.drafts if lookahead else 0)
        wanted = max(0, _blocks_for(end) - len(request.blocks))
        if wanted > self.pool.free:
            return None
        new = self.pool.take(wanted)
        request.blocks += new
        return new

    def _reserved(self) -> int:
        """Blocks that prompts under way will still need: a load may not take them."""
        loading = [request for request in self.waiting if request.blocks]
        prefilling = [r for r in self.running if r.num_computed_tokens < r.num_tokens]
        return sum(max(0, _blocks_for(r.num_tokens) - len(r.blocks)) for r in loading + prefilling)

    def _remember(self, request: SimRequest, tokens: int) -> None:
        self.pool.remember(request.blocks, request.truth, tokens)

    def _preempt(self, drop_stale: bool = False) -> SimRequest:
        request = self.running.pop()
        self._let_go(request)
        request.at = At.WAITING
        request.num_computed_tokens = request.drafts = request.placeholders = 0
        request.num_preemptions += 1
        request.drop_stale = drop_stale or (request.drop_stale and request.stale > 0)
        request.stale = request.in_flight
        self.waiting.insert(0, request)
        self.preempted += 1
        return request

    def _may_free(self, request: SimRequest) -> bool:
        """Whether no step in flight writes its blocks."""
        return self._traits.depth == 1 or request.last_step <= self._ended

    def _let_go(self, request: SimRequest) -> None:
        if self._may_free(request):
            self.pool.let_go(request.blocks)
        else:
            self._deferred.append((self._planned, request.blocks))
        request.blocks = []

    # --- a step has ended --------------------------------------------------------------------

    def update(self, step: Step) -> None:
        """Take in what the workers have computed, then what they have loaded and saved."""
        self._ended += bool(step.scheduled)
        while self._deferred and self._deferred[0][0] <= self._ended:
            self.pool.let_go(self._deferred.popleft()[1])
        self._note_bad(set().union(*(results.bad_blocks for results in step.results)))
        for scheduled in step.scheduled:
            self._computed(scheduled)
        done = [results.done for results in step.results if results.done is not None]
        if done:
            self.connector.work_done(reduce(WorkDone.aggregate, done))
        for request_id in itertools.chain(*(results.loaded for results in step.results)):
            self._loaded_by_one(self.requests[request_id])

    def _loaded_by_one(self, request: SimRequest) -> None:
        """One rank's load has ended, well or not."""
        self._ranks_loaded[request.request_id] += 1
        if self._ranks_loaded[request.request_id] < self._traits.ranks:
            return
        del self._ranks_loaded[request.request_id]
        if request.at is At.LOADING:
            self._loaded.add(request)
        else:
            self._let_go(request)
            del self.requests[request.request_id]

    def _note_bad(self, bad_blocks: set[int]) -> None:
        """What a failed load has not brought is computed."""
        for request in self.waiting if bad_blocks else ():
            if request.at is At.LOADING:
                loaded = request.blocks[: _blocks_for(request.num_computed_tokens)]
                good = next((i for i, block in enumerate(loaded) if block in bad_blocks), None)
                if good is not None:
                    request.num_computed_tokens = good * BLOCK_TOKENS

    def _computed(self, scheduled: Scheduled) -> None:
        request, stale = scheduled.request, scheduled.request.stale > 0
        request.in_flight -= len(scheduled.contents)
        if stale:
            request.stale -= len(scheduled.contents)
        dropped = stale and request.drop_stale
        if request.at is At.FINISHED or dropped or not scheduled.samples:
            return
        request.append(1 + scheduled.accepted)
        if not stale:
            request.num_computed_tokens -= scheduled.rejected
            request.placeholders -= self._traits.depth > 1
            request.drafts = self._traits.drafts
            self._remember(request, request.num_computed_tokens - request.placeholders)
        if request.num_tokens == len(request.script):
            if not stale:
                self._judge(request)
            self.finish(request)


def _blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
