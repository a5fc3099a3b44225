"""What the two sides of the connector tell each other, once a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstrata.connector.jobs import LoadJob, SaveJob


@dataclass
class StepWork(KVConnectorMetadata):
    """Scheduler -> workers: what to copy in this step.

    `flush` names saves, of this step or earlier, whose blocks this step overwrites: they come first.
    """

    loads: list[tuple[str, LoadJob]] = field(default_factory=list)  # (request id, job)
    saves: list[SaveJob] = field(default_factory=list)
    flush: list[int] = field(default_factory=list)
    idle: bool = False  # nothing is computed in this step: the worker may wait a moment for its copies


@dataclass
class WorkDone(KVConnectorWorkerMetadata):
    """Workers -> scheduler: jobs that ended, with how many ranks said so."""

    saved: dict[int, int] = field(default_factory=dict)  # job -> ranks that have ended it, well or not
    unsaved: set[int] = field(default_factory=set)  # of these, jobs that some rank could not write
    unpackable: set[int] = field(default_factory=set)  # of these, jobs whose chunk does not fit packed
    loaded: dict[int, int] = field(default_factory=dict)  # job -> ranks that have ended it, well or not
    failed_from: dict[int, int] = field(default_factory=dict)  # load -> first chunk that is not there
    corrupt: set[bytes] = field(default_factory=set)  # keys whose bytes failed their check

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkDone:
        """Both ranks' news as one."""
        assert isinstance(other, WorkDone)
        for mine, theirs in ((self.saved, other.saved), (self.loaded, other.loaded)):
            for job, ranks in theirs.items():
                mine[job] = mine.get(job, 0) + ranks
        for job, index in other.failed_from.items():
            self.failed_from[job] = min(index, self.failed_from.get(job, index))
        self.unsaved |= other.unsaved
        self.unpackable |= other.unpackable
        self.corrupt |= other.corrupt
        return self

    def __bool__(self) -> bool:
        return bool(self.saved or self.loaded)
