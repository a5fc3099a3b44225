"""What the scheduler side knows of requests that the engine has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstrata.core.keys import KeyChain
from kvstrata.core.slots import Slot

if TYPE_CHECKING:
    from vllm.v1.request import Request


@dataclass(slots=True)
class Lookup:
    """One question to the store. `slots` is None until it has answered."""

    lease: int
    epoch: bytes
    posted: float
    slots: tuple[Slot, ...] | None = None


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
