"""A connector that finds every other chunk too widely spread to be packed. See test_packing.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from kvstrata.connector.device_copies import DeviceCopies
from kvstrata.connector.host_copies import HostCopies
from kvstrata.connector.transfer import Copies
from kvstrata.connector.vllm.connector import KVStrataConnector
from kvstrata.connector.vllm.worker import WorkerConnector
from kvstrata.cuda_ext.device import Chunk, DevicePipe
from kvstrata.cuda_ext.native import CopyEngine, DoesNotFit, EngineCache


class _Picky:
    """Packs what its key says."""

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine

    def gather(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None:
        if key[0] % 2:
            raise DoesNotFit(0)
        self._engine.gather(slot_address, block_ids, key)

    def scatter(self, slot_address: int, block_ids: tuple[int, ...], key: bytes) -> None:
        self._engine.scatter(slot_address, block_ids, key)


class _PickyPipe:
    """The same on a GPU."""

    def __init__(self, pipe: DevicePipe) -> None:
        self._pipe = pipe
        self.hold, self.close = pipe.hold, pipe.close

    def save(
        self, chunks: Sequence[Chunk], after: int, covered: Callable[[], None]
    ) -> list[DoesNotFit | None]:
        fit = [chunk for chunk in chunks if chunk.way or not chunk.key[0] % 2]
        outcome = iter(self._pipe.save(fit, after, covered))
        return [next(outcome) if chunk in fit else DoesNotFit(0) for chunk in chunks]


class _PickyWorker(WorkerConnector):
    def make_copies(self, cache: EngineCache, caches: Mapping[str, torch.Tensor]) -> Copies:
        copies = super().make_copies(cache, caches)
        if isinstance(copies, DeviceCopies):
            vars(copies)["_saves"] = _PickyPipe(copies._saves)
            return copies
        assert self._segments is not None
        packed, raw = self._layout.ways
        copiers = {
            packed.slot_bytes: _Picky(CopyEngine(packed, cache)),
            raw.slot_bytes: CopyEngine(raw, cache),
        }
        return HostCopies(copiers, self._segments)


class MisfitsConnector(KVStrataConnector):
    """Every other chunk is stored raw."""

    worker_class = _PickyWorker
