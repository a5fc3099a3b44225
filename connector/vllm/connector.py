"""The class that vLLM loads: checks what it is asked to serve, then passes each hook to its side.

The hot path reads in `scheduler.py` and `worker.py`; this file is only the way there.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from kvstrata.connector.vllm.compat import instance_id
from kvstrata.connector.vllm.identity import Identity
from kvstrata.connector.vllm.layout import chunk_layout, single_group
from kvstrata.connector.vllm.metadata import StepWork, WorkDone
from kvstrata.connector.vllm.scheduler import SchedulerConnector
from kvstrata.connector.vllm.settings import load_config, log_like_vllm, read_settings, refuse_unsupported
from kvstrata.connector.vllm.stats import PromMetrics, Stats
from kvstrata.connector.vllm.worker import WorkerConnector
from kvstrata.controller.client import NodeClient
from kvstrata.core.layout import CODEC_PACKED, CODEC_RAW

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("kvstrata.vllm")

_WEIGHTS_WAIT_S = 3.0  # a start may take this longer; hashes several GB


class KVStrataConnector(KVConnectorBase_V1):
    """One object in the engine core (SCHEDULER) and one in each worker (WORKER)."""

    worker_class: type[WorkerConnector] = WorkerConnector

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_like_vllm()
        config = load_config(vllm_config)
        refuse_unsupported(vllm_config)
        # A link to a GPU is worth packing for; a copy in host memory costs more packed than it saves.
        on_gpu = vllm_config.device_config.device_type == "cuda"
        packs = config.client.packing == "on" or (config.client.packing == "auto" and on_gpu)
        codec = CODEC_PACKED if packs else CODEC_RAW
        layout = chunk_layout(kv_cache_config, config.chunk.tokens, codec=codec).ways[0]
        block_tokens = single_group(kv_cache_config).kv_cache_spec.block_size
        if layout.chunk_tokens != config.chunk.tokens and role is KVConnectorRole.SCHEDULER:
            log.info(
                "kvstrata: chunks of %d tokens, the next multiple of vLLM's block size (chunk.tokens is %d)",
                layout.chunk_tokens,
                config.chunk.tokens,
            )
        client = instance_id(vllm_config)
        self._scheduler: SchedulerConnector | None = None
        self._worker: WorkerConnector | None = None
        if role is KVConnectorRole.SCHEDULER:
            identity = Identity(vllm_config, layout, config)
            sizes = tuple(way.slot_bytes for way in layout.ways)
            node = NodeClient(config, client, sizes, workers=1, notify=log.warning)
            identity.wait(_WEIGHTS_WAIT_S)
            self._scheduler = SchedulerConnector(
                node, identity, layout.chunk_tokens, block_tokens, 1, config.client
            )
        else:
            # Ranks of data parallelism compute in step: one that waits for its load would hold up the others.
            alone = vllm_config.parallel_config.data_parallel_size == 1
            self._worker = self.worker_class(client, 0, layout, block_tokens, config, hands_over=alone)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Never. Where CUDA graphs are used vLLM asks before it loads anything: time to find wrong settings.

        Raises:
            ConfigError: see `read_settings`.
        """
        read_settings(extra_config)
        return False

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache owes nobody a delivery: a save that is dropped is a miss later."""
        return False

    # --- scheduler side ----------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        self._on_scheduler.new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._on_scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self._on_scheduler.after_alloc(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._on_scheduler.build_work(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if isinstance(done := connector_output.kv_connector_worker_meta, WorkDone):
            self._on_scheduler.work_done(done)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._on_scheduler.finished(request, block_ids)
        return False, None

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.busy()

    def reset_cache(self) -> bool | None:
        self._on_scheduler.reset()
        return True

    # --- worker side -------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._on_worker.register(kv_caches, self._vllm_config.compilation_config.static_forward_context)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._on_worker.before_step(_step(kv_connector_metadata))

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Loads have started before the forward pass."""

    def has_connector_metadata(self) -> bool:
        """vLLM asks at each attention layer whether to call the two hooks below: there is nothing to do."""
        return False

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are whole requests, outside the batch: no layer ever waits."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Saves are whole chunks, after the step that completed them."""

    def wait_for_save(self) -> None:
        """A step never waits for its saves: blocks are watched until they are copied."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._on_worker.finished_loads(_step(self._get_connector_metadata())) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._on_worker.take_bad_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._on_worker.take_done()

    # --- both --------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> Stats | None:
        side = self._scheduler or self._worker
        return side.stats.take() if side else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats | None:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()

    @property
    def _on_scheduler(self) -> SchedulerConnector:
        assert self._scheduler is not None, "a scheduler hook was called on a worker"
        return self._scheduler

    @property
    def _on_worker(self) -> WorkerConnector:
        assert self._worker is not None, "a worker hook was called on the scheduler"
        return self._worker


def _step(metadata: KVConnectorMetadata) -> StepWork:
    assert isinstance(metadata, StepWork)
    return metadata
