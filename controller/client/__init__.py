"""What an engine needs of the node store: calls for the scheduler side, segments for its workers."""

from kvstrata.controller.client.node import Answer, Call, Lost, NodeClient, Session
from kvstrata.controller.client.segments import SegmentMap, worker_segments
from kvstrata.controller.paths import runtime_paths
from kvstrata.storage_backends.host import MappedSegment

__all__ = [
    "Answer",
    "Call",
    "Lost",
    "MappedSegment",
    "NodeClient",
    "SegmentMap",
    "Session",
    "runtime_paths",
    "worker_segments",
]
