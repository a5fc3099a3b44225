"""A Match, however it came: what is valid, and how the answer is written."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError

from kvstrata.controller.wire import WHY_TO_WIRE
from kvstrata.core.events import Action, Event, Match, Matched, Refused
from kvstrata.core.keys import KEY_BYTES
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb

KEYS_MAX = 1 << 16  # of one prompt, and reservations of one step: more would hold up everybody else

Apply = Callable[[Event], list[Action]]


def split_keys(data: bytes) -> tuple[bytes, ...] | None:
    """Concatenated keys; None if that cannot be."""
    if len(data) % KEY_BYTES or len(data) > KEYS_MAX * KEY_BYTES:
        return None
    return tuple(data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES))


def answer(apply: Apply, request: pb.MatchRequest, client: str, seq: int) -> pb.MatchReply:
    """Raises ValueError: the keys are none."""
    keys = split_keys(request.keys)
    if keys is None or len(set(keys)) < len(keys):
        raise ValueError(
            f"Match.keys is a multiple of {KEY_BYTES} bytes, up to {KEYS_MAX} keys that all differ"
        )
    (found,) = apply(Match(client, seq, request.lease, keys))
    if isinstance(found, Refused):
        return pb.MatchReply(refused=WHY_TO_WIRE[found.why], lease=request.lease)
    assert isinstance(found, Matched)
    return pb.MatchReply(
        being_written=found.being_written,
        lease=request.lease,
        segments=[slot.segment for slot in found.slots],
        offsets=[slot.offset for slot in found.slots],
        nbytes=[slot.nbytes for slot in found.slots],
    )


def answer_packet(apply: Apply, client: str, packet: bytes) -> bytes:
    """A question that `client` sent over the side socket, where nothing is lost or overtaken.

    Raises:
        ValueError: it is none.
    """
    try:
        request = pb.MatchRequest.FromString(packet)
    except DecodeError as error:
        raise ValueError("not a MatchRequest") from error
    return answer(apply, request, client, seq=0).SerializeToString()
