"""Connectors that do wrong on purpose, so that tests and the demo can show that it would be seen.

Never serve with these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvstrata.connector.transfer import Copier
from kvstrata.connector.vllm.connector import KVStrataConnector
from kvstrata.connector.vllm.worker import WorkerConnector


class _ZeroedLoads:
    """Verifies and copies as it should, then zeroes what it copied."""

    def __init__(self, copier: Copier, caches: Mapping[str, torch.Tensor]) -> None:
        self._copier, self._caches = copier, caches

    def gather(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None:
        self._copier.gather(slot_address, block_ids, key)

    def scatter(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None:
        self._copier.scatter(slot_address, block_ids, key)
        for cache in self._caches.values():
            for block in block_ids:
                if block >= 0:
                    cache[block].zero_()


class _ZeroingWorker(WorkerConnector):
    def make_copier(self, caches: Mapping[str, torch.Tensor], layers: Mapping[str, Any]) -> Copier:
        return _ZeroedLoads(super().make_copier(caches, layers), caches)


class ZeroedLoadsConnector(KVStrataConnector):
    """Negative control: every hit loads zeros. Answers must change, or equality tests prove nothing."""

    worker_class = _ZeroingWorker
