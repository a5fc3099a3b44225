"""What both ends of the control plane must agree on."""

from __future__ import annotations

from typing import cast

from kvstrata.core.events import Why
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb

PROTOCOL = 1

WHY_TO_WIRE = {why: cast("pb.Why", pb.Why.Value(f"WHY_{why.name}")) for why in Why}
_FROM_WIRE: dict[int, Why] = {int(number): why for why, number in WHY_TO_WIRE.items()}


def why_from_wire(number: int) -> Why:
    """The reason; OTHER if a newer version sent one that this one does not know."""
    return _FROM_WIRE.get(number, Why.OTHER)
