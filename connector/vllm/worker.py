"""The worker side: runs what the scheduler side planned, reports what became of it.

Each step: before_step, the engine's forward pass, finished_loads, take_bad_blocks, take_done.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from kvstrata.connector.device_copies import DeviceCopies, DeviceRegistration, open_pipes
from kvstrata.connector.host_copies import HostCopies
from kvstrata.connector.jobs import Fence, HandedOver, LoadJob, Report
from kvstrata.connector.transfer import Copies, Role, Transfer
from kvstrata.connector.vllm.layout import engine_cache
from kvstrata.connector.vllm.metadata import StepWork, WorkDone
from kvstrata.connector.vllm.stats import Stats
from kvstrata.controller.client import SegmentMap, worker_segments
from kvstrata.core.config import Config
from kvstrata.core.errors import KVStrataError
from kvstrata.core.layout import ChunkLayout
from kvstrata.core.units import format_size
from kvstrata.cuda_ext.native import CopyEngine, EngineCache

log = logging.getLogger("kvstrata.vllm")

_IDLE_WAIT_S = 0.001
_SAVES_AT_ONCE = 4  # a flush waits for so many that are on their way


class LateFailure(KVStrataError):
    """A load that was handed over has failed: the engine may have computed with its blocks.

    No answer may come of that, and vLLM cannot take such a step back. Every later step raises it again.
    """

    def __init__(self, request_id: str, corrupt: bool) -> None:
        why = (
            "was verified in host memory and came to the device changed: check this host's memory and PCIe"
            if corrupt
            else "could not be copied to the device to its end: the log says why"
        )
        super().__init__(
            f"the engine stops, or it would give a wrong answer: KV for request {request_id} {why}"
        )


class WorkerConnector:
    """Runs in each worker process. Every method is called on the model runner's thread.

    Args:
        client: the engine's name on the side socket, the same as on the scheduler side.
        rank: of this worker.
        hands_over: whether requests may go on before the last bytes of their loads have come.
    """

    def __init__(
        self,
        client: str,
        rank: int,
        layout: ChunkLayout,
        block_tokens: int,
        config: Config,
        hands_over: bool = True,
    ) -> None:
        self._layout, self._block_tokens, self._config = layout, block_tokens, config
        self._client, self._rank, self._hands_over = client, rank, hands_over
        self._segments: SegmentMap | None = None
        self._transfer: Transfer | None = None
        self._copies: Copies | None = None
        self._device = torch.device("cpu")
        self._moved = "chunks_moved_by_cpu"  # counts what the copies of this device do
        self._loads: dict[int, tuple[str, LoadJob]] = {}
        self._handed_over: set[int] = set()  # of these
        self._late: LateFailure | None = None
        self._told = False  # whether the last step named requests whose load has ended
        self._done = WorkDone()
        self._bad_blocks: set[int] = set()
        self.stats = Stats()

    def register(self, caches: Mapping[str, torch.Tensor], layers: Mapping[str, Any]) -> None:
        """The engine's KV cache is there: from now on it can be copied.

        Raises:
            UnsupportedModel: it is not laid out as it should be.
        """
        cache = engine_cache(self._layout, caches, layers, self._block_tokens)
        self._device = next(iter(caches.values())).device
        copies = self.make_copies(cache, caches)
        self._copies = copies
        self._moved = f"chunks_moved_by_{self._device.type}"
        if self._device.type == "cpu":
            self._transfer = Transfer(copies, [Role.ANY] * self._config.client.copy_threads)
        else:  # each second thread has the next job ready while the first waits for its last bytes
            threads = [Role.LOADS, Role.LOADS, Role.SAVES, Role.SAVES]
            self._transfer = Transfer(copies, threads, _SAVES_AT_ONCE, flushes_itself=False)

    def make_copies(self, cache: EngineCache, caches: Mapping[str, torch.Tensor]) -> Copies:
        """What moves chunks between the engine's cache and slots."""
        node, ways = self._config.node, self._layout.ways
        if self._device.type == "cpu":
            log.info("kvstrata: copies by the processor, %d at a time", self._config.client.copy_threads)
            self._segments = worker_segments(node, self._client, self._rank)
            return HostCopies({way.slot_bytes: CopyEngine(way, cache) for way in ways}, self._segments)
        device, staging = self._device.index or 0, self._config.client.staging
        library, loads, saves = open_pipes(self._layout, cache, device, staging)
        log.info(
            "kvstrata: copies by %s through %s of staging memory each way, KV stored %.2f times smaller",
            torch.cuda.get_device_name(device),
            format_size(staging),
            self._layout.raw.slot_bytes / self._layout.slot_bytes,
        )
        registration = DeviceRegistration(library, device)
        self._segments = worker_segments(node, self._client, self._rank, registration)
        return DeviceCopies(loads, saves, self._segments, ways)

    def _fence(self) -> Fence | None:
        """What the engine has asked of its device so far."""
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record()
        return Fence(event.cuda_event, event)

    def _stream(self) -> int:
        """The one that the engine computes on; 0: there is no device."""
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0

    def before_step(self, work: StepWork) -> None:
        """Start copies; wait for saves whose blocks this step, or a load, overwrites.

        Loads start here and not in vLLM's own hook for it, which comes after the forward pass: their
        requests wait outside the batch, and their blocks are nobody else's.

        Raises:
            LateFailure: a load that was handed over failed after all.
        """
        if self._transfer is None or self._copies is None:
            return
        self._stop_if_too_late()
        self._copies.engine_idle = work.idle and self._hands_over
        if self._handed_over:  # before all fences of this step
            self._copies.follow(self._stream())
        if work.saves:
            self._transfer.submit(saves=work.saves, after=self._fence())
        if work.flush:
            self._transfer.flush(work.flush)
            self._copies.hold(self._stream())  # the engine goes on once they have read their blocks
        if work.loads:
            self._loads.update((load.job, (request_id, load)) for request_id, load in work.loads)
            self._transfer.submit(loads=[load for _, load in work.loads], after=self._fence())

    def finished_loads(self, work: StepWork) -> set[str]:
        """Requests whose load has ended, well or not, or was handed over.

        Raises:
            LateFailure: a load that was handed over failed after all.
        """
        if self._transfer is None:
            return set()
        followed = set(self._handed_over)  # a step that computes may have used their blocks
        waits = work.idle and not self._told  # what was told last comes to the scheduler after this step
        requests = self._take_reports(_IDLE_WAIT_S if waits else 0.0)
        while followed & self._handed_over and not work.idle:
            requests |= self._take_reports(_IDLE_WAIT_S)
        self._stop_if_too_late()
        self._told = bool(requests)
        return requests

    def _take_reports(self, wait_s: float) -> set[str]:
        assert self._transfer is not None
        requests: set[str] = set()
        for news in self._transfer.poll(wait_s):
            if isinstance(news, HandedOver):
                self._handed_over.add(news.job)
                self.stats.count("loads_handed_over")
                requests.add(self._loads[news.job][0])
            elif news.job in self._loads:
                requests |= self._load_ended(news)
            else:
                self._save_ended(news)
        return requests

    def _stop_if_too_late(self) -> None:
        if self._late is not None:
            raise self._late

    def _load_ended(self, report: Report) -> set[str]:
        """The request that waits for it, if it still does."""
        request_id, load = self._loads.pop(report.job)
        was_handed_over = report.job in self._handed_over
        self._handed_over.discard(report.job)
        if was_handed_over and not report.ok:
            self._late = LateFailure(request_id, report.corrupt is not None)
        self._done.loaded[report.job] = 1
        self.stats.count(self._moved, len(load.chunks) if report.ok else report.failed_from)
        self.stats.count("bytes_loaded", report.nbytes)
        self.stats.count("load_seconds", report.seconds)
        if not report.ok:
            self._done.failed_from[report.job] = report.failed_from
            missing = load.chunks[report.failed_from :]
            self._bad_blocks.update(block for chunk in missing for block in chunk.blocks if block >= 0)
        if report.corrupt is not None:
            self._done.corrupt.add(report.corrupt)
        return set() if was_handed_over else {request_id}

    def _save_ended(self, report: Report) -> None:
        self._done.saved[report.job] = 1
        if not report.ok:
            self._done.unsaved.add(report.job)
        if report.does_not_fit:
            self._done.unpackable.add(report.job)
            self.stats.count("unpackable_chunks")
        self.stats.count(self._moved, report.ok)
        self.stats.count("bytes_saved", report.nbytes)
        self.stats.count("save_seconds", report.seconds)

    def take_bad_blocks(self) -> set[int]:
        """Blocks that a failed load left without their KV."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_done(self) -> WorkDone | None:
        """News for the scheduler side."""
        if not self._done:
            return None
        done, self._done = self._done, WorkDone()
        return done

    def close(self) -> None:
        """Finish the copies that were begun, then say bye to the store."""
        if self._transfer is not None:
            self._transfer.close()
        if self._segments is not None:
            self._segments.close()
