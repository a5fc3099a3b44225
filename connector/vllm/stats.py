"""Counters of one side of the connector, in the form that vLLM logs and exports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvstrata.core.events import Why

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Every counter there is, with its help text. A name that is not here is a bug.
COUNTERS = {
    "lookups": "Lookups that the node store answered",
    "lookups_cut_short": "Of these, lookups that ended at a chunk which was just being written",
    "slow_lookups": "Lookups given up because the answer came too late",
    "unasked_lookups": "Times that a request could not be looked up because no node store was in reach",
    "bypassed_requests": "Requests that cannot be cached",
    "loaded_tokens": "Prompt tokens loaded instead of computed",
    "loads_handed_over": "Loads whose requests went on before their last bytes had come",
    "failed_loads": "Loads that failed; their requests were recomputed",
    "corrupt_chunks": "Stored chunks refused because their bytes failed the check",
    "saved_chunks": "Chunks copied to the host pool",
    "failed_saves": "Chunks that could not be copied",
    "unpackable_chunks": "Chunks whose numbers are spread too widely to be packed: they are stored raw",
    "lost_saves": "Chunks whose blocks were reused before they had a slot",
    "saves_out_of_reach": "Chunks given up because the node store went out of reach",
    "bytes_loaded": "Bytes copied from the host pool",
    "bytes_saved": "Bytes copied to the host pool",
    "chunks_moved_by_cpu": "Chunks copied by the processor, engines on CPUs",
    "chunks_moved_by_cuda": "Chunks copied by kernels and the copy engine, through staging memory",
    "load_seconds": "Seconds spent copying from the host pool",
    "save_seconds": "Seconds spent copying to the host pool",
    **{f"lookup_{why.value}": f"Lookups that the node store refused: {why.value}" for why in Why},
    **{f"save_{why.value}": f"Chunks that got no slot: {why.value}" for why in Why},
}


@dataclass
class Stats(KVConnectorStats):
    """Counters since the last `take`."""

    data: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, amount: float = 1) -> None:
        if name not in COUNTERS:
            raise KeyError(name)
        self.data[name] = self.data.get(name, 0) + amount

    def take(self) -> Stats | None:
        """What was counted since the last call; None if nothing was."""
        if not self.data:
            return None
        taken, self.data = Stats(self.data), {}
        return taken

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, amount in other.data.items():
            self.data[name] = self.data.get(name, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(amount, 4) for name, amount in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


class PromMetrics(KVConnectorPromMetrics):
    """`kvstrata_<counter>_total` on vLLM's own /metrics, by engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._by_engine: dict[int, dict[str, Any]] = {engine: {} for engine in per_engine_labelvalues}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(name=f"kvstrata_{name}", documentation=text, labelnames=labelnames)
            for engine, values in per_engine_labelvalues.items():
                self._by_engine[engine][name] = counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, amount in transfer_stats_data.items():
            self._by_engine[engine_idx][name].inc(amount)
