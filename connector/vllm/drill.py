"""Connectors that do wrong on purpose, so that tests and the demo can show that it would be seen.

Never serve with these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from kvstrata.connector.jobs import Fence, LoadJob, Report, SaveJob
from kvstrata.connector.transfer import Copies
from kvstrata.connector.vllm.connector import KVStrataConnector
from kvstrata.connector.vllm.worker import WorkerConnector
from kvstrata.cuda_ext.native import EngineCache


class _ZeroedLoads:
    """Verifies and copies as it should, then zeroes what it copied."""

    def __init__(self, copies: Copies, caches: Mapping[str, torch.Tensor]) -> None:
        self._copies, self._caches = copies, caches
        self.engine_idle = False

    def save(self, jobs: Sequence[SaveJob], after: Fence | None, covered: Callable[[], None]) -> list[Report]:
        return self._copies.save(jobs, after, covered)

    def hold(self, stream: int) -> None:
        self._copies.hold(stream)

    def follow(self, stream: int) -> None:
        self._copies.follow(stream)

    def close(self) -> None:
        self._copies.close()

    def load(self, job: LoadJob, after: Fence | None, handed_over: Callable[[], None] | None) -> Report:
        report = self._copies.load(job, after, None)
        blocks = [block for chunk in job.chunks for block in chunk.blocks if block >= 0]
        for cache in self._caches.values():
            cache[blocks] = 0
            if cache.is_cuda:
                torch.cuda.synchronize(cache.device)
        return report


class _ZeroingWorker(WorkerConnector):
    def make_copies(self, cache: EngineCache, caches: Mapping[str, torch.Tensor]) -> Copies:
        return _ZeroedLoads(super().make_copies(cache, caches), caches)


class ZeroedLoadsConnector(KVStrataConnector):
    """Negative control: every hit loads zeros. Answers must change, or equality tests prove nothing."""

    worker_class = _ZeroingWorker
