"""What the scheduler side knows of requests that the engine has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstrata.connector.lookups import Lookup
from kvstrata.core.keys import KeyChain

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(slots=True)
class Tracked:
    """What is known of one request while the engine has it."""

    request: Request
    chain: KeyChain
    lookup: Lookup | None = None
    may_load: bool = True  # False once a load has failed: recompute, never try in circles
    preemptions: int = 0  # those after which the store was asked again
    asked: float = 0.0  # when the store was asked last, monotonic seconds
    blocks: list[int] = field(default_factory=list)
    next_save: int = 0  # chunks before this one were found in the store, or are saved or given up


@dataclass(slots=True)
class Loading:
    """A load that the workers have. It outlives an aborted request."""

    request_id: str
    first_chunk: int
    tokens: int
    ranks_ended: int = 0
    in_use: bool = False  # it was handed over, and a step has used its blocks


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What a step does for one request. `afresh`: its earlier blocks are its no more."""

    request_id: str
    blocks: list[int]  # new ones
    afresh: bool
    computed: int  # tokens, once the step is over


def targets_of(blocks: list[int], indices: range, loaded: range) -> tuple[int, ...]:
    """Where a load puts the blocks `indices` of a request: -1 for all but the `loaded`
    ones, as they are shared, or yet to be computed, or not there.
    """
    return tuple(blocks[i] if i in loaded else -1 for i in indices)


def scheduled(output: SchedulerOutput) -> Iterator[Scheduled]:
    """Every request that a step computes."""
    tokens = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        computed = new.num_computed_tokens + tokens[new.req_id]
        yield Scheduled(new.req_id, list(new.block_ids[0]), True, computed)
    cached = output.scheduled_cached_reqs
    for req_id, ids, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        added = list(ids[0]) if ids is not None else []
        yield Scheduled(req_id, added, req_id in cached.resumed_req_ids, computed + tokens[req_id])


def taken_blocks(output: SchedulerOutput, block_tokens: int) -> list[int]:
    """Blocks that a step has given to requests and may overwrite."""
    taken: list[int] = []
    for new in output.scheduled_new_reqs:
        taken += new.block_ids[0][new.num_computed_tokens // block_tokens :]
    cached = output.scheduled_cached_reqs
    for req_id, ids, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if ids is not None:
            resumed = req_id in cached.resumed_req_ids
            taken += ids[0][computed // block_tokens :] if resumed else ids[0]
    return taken
