"""What a scheduler, its connector and its workers pass to each other: requests, steps, results.

Requests and outputs have those attributes of vLLM's own that `kvstrata.connector.vllm` reads.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvstrata.connector.vllm.metadata import StepWork, WorkDone


class At(enum.Enum):
    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class SimRequest:
    """`script`: its prompt and every token that will be sampled; `truth`: the KV of each position."""

    request_id: str
    script: list[int]
    prompt: int
    truth: list[int]
    longest: int  # tokens it might have had, for all that its engine knows
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    resumable: bool = False
    prompt_embeds: None = None
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    _all_token_ids: list[int] = field(init=False)
    at: At = At.WAITING
    blocks: list[int] = field(default_factory=list)
    drafts: int = 0  # tokens guessed beyond the confirmed ones
    placeholders: int = 0  # tokens that steps in flight will sample
    in_flight: int = 0  # tokens that steps in flight compute
    stale: int = 0  # of these, tokens scheduled before a preemption
    drop_stale: bool = False
    last_step: int = 0  # the last one that computes for it

    def __post_init__(self) -> None:
        self._all_token_ids = self.script[: self.prompt]

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.script[: self.prompt]

    @property
    def num_tokens(self) -> int:
        return len(self._all_token_ids)

    def append(self, count: int) -> None:
        """The next `count` tokens of the script have been sampled."""
        self._all_token_ids += self.script[self.num_tokens : self.num_tokens + count]


# --- a step, as vLLM describes it to a connector ---------------------------------------------------


@dataclass
class NewRequest:
    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


@dataclass
class CachedRequests:
    req_ids: list[str] = field(default_factory=list)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)


@dataclass
class Output:
    scheduled_new_reqs: list[NewRequest] = field(default_factory=list)
    scheduled_cached_reqs: CachedRequests = field(default_factory=CachedRequests)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


# --- a step, as it is computed ----------------------------------------------------------------------


@dataclass
class Scheduled:
    """One request's share of a step: `contents` for its positions from `start` on."""

    request: SimRequest
    blocks: list[int]
    start: int
    contents: list[int]
    truth: list[int]
    admitted: bool  # in this step: everything before `start` must be there by now
    samples: bool
    accepted: int = 0  # drafts
    rejected: int = 0


@dataclass
class Results:
    """What a worker says at the end of a step."""

    loaded: list[str] = field(default_factory=list)  # requests whose load has ended, well or not
    bad_blocks: set[int] = field(default_factory=set)
    done: WorkDone | None = None


@dataclass(eq=False)
class Step:
    output: Output = field(default_factory=Output)
    scheduled: list[Scheduled] = field(default_factory=list)
    work: StepWork = field(default_factory=StepWork)
    results: list[Results] = field(default_factory=list)  # one of each worker that has ended it
