"""What the scheduler side knows of requests that the engine has."""

from __future__ import annotations

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
    lease: int
    epoch: bytes
    first_chunk: int
    tokens: int
    ranks_ended: int = 0


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
