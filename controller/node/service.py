"""gRPC in, planner events out. Validates everything that comes over the wire."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from kvstrata import __version__
from kvstrata.controller.node.questions import KEYS_MAX, answer, split_keys
from kvstrata.controller.node.store import NodeStore
from kvstrata.controller.wire import PROTOCOL, WHY_TO_WIRE
from kvstrata.core.config import Config, HostConfig, as_tree, build_config
from kvstrata.core.errors import ConfigError
from kvstrata.core.events import ClientOpened, Refused, Update, Updated
from kvstrata.core.keys import KEY_BYTES
from kvstrata.core.layout import ALIGNMENT
from kvstrata.core.slots import Slot
from kvstrata.core.units import format_size
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb
from kvstrata.protos.kvstrata.v1 import node_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

_CLIENT_NAME_MAX = 256
_CONFIG_MAX = 64 << 10
_SIZES_MAX = 4
_WHY_BYTES_MAX = 2000
_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_NOT_NOW = grpc.StatusCode.FAILED_PRECONDITION


class NodeService(node_pb2_grpc.NodeStoreServicer):
    """The control plane of one node store."""

    def __init__(self, store: NodeStore) -> None:
        self._store = store

    async def Open(self, request: pb.OpenRequest, context: Context) -> pb.OpenReply:
        if why := _invalid(request):
            await _refuse(context, *why)
        if not self._store.side.has_scheduler(request.client):
            await _refuse(context, _NOT_NOW, "Open comes after the hello on the side socket")
        try:
            conflicts = _conflicts(request.config_json, self._store.config)
        except ValueError as error:
            await _refuse(context, _INVALID, str(error))
        if conflicts:
            return pb.OpenReply(conflicts=conflicts, version=__version__)
        answers = self._store.apply(ClientOpened(request.client, tuple(request.slot_bytes), request.workers))
        refused = next((answer.why for answer in answers if isinstance(answer, Refused)), None)
        if refused is None:
            self._store.side.client_opened(request.client)
        return pb.OpenReply(
            refused=WHY_TO_WIRE[refused] if refused else pb.WHY_UNSPECIFIED,
            store_epoch=self._store.epoch,
            pool_bytes=self._store.planner.limits.pool_bytes,
            version=__version__,
            slot_bytes_max=self._store.planner.slot_bytes_max(),
        )

    async def Match(self, request: pb.MatchRequest, context: Context) -> pb.MatchReply:
        try:
            return answer(self._store.apply, request, request.client, request.seq)
        except ValueError as error:
            await _refuse(context, _INVALID, str(error))

    async def Update(self, request: pb.UpdateRequest, context: Context) -> pb.UpdateReply:
        used = [split_keys(prefix) for prefix in request.used]
        keys = [r.key for r in request.reserve] + list(request.corrupt)
        if None in used or len(request.reserve) > KEYS_MAX or any(len(key) != KEY_BYTES for key in keys):
            await _refuse(context, _INVALID, f"keys in Update are 32 bytes each, up to {KEYS_MAX}")
        event = Update(
            client=request.client,
            seq=request.seq,
            reserve=tuple((r.job, r.key, r.nbytes) for r in request.reserve),
            committed=tuple(request.committed),
            aborted=tuple(request.aborted),
            released=tuple(request.released),
            corrupt=tuple(request.corrupt),
            used=tuple(prefix for prefix in used if prefix is not None),
            leases_held=request.leases_held,
            jobs_held=request.jobs_held,
            drawn=request.drawn,
        )
        (updated,) = self._store.apply(event)
        if isinstance(updated, Refused):
            return pb.UpdateReply(refused=WHY_TO_WIRE[updated.why])
        assert isinstance(updated, Updated)
        return pb.UpdateReply(
            grants=[
                pb.Grant(slot=_slot(grant)) if isinstance(grant, Slot) else pb.Grant(why=WHY_TO_WIRE[grant])
                for grant in updated.grants
            ]
        )

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsReply:
        return pb.StatsReply(json=json.dumps(self._store.stats()))

    async def Check(self, request: pb.CheckRequest, context: Context) -> pb.CheckReply:
        return pb.CheckReply(problems=self._store.problems(), json=json.dumps(self._store.stats()))

    async def Shutdown(self, request: pb.ShutdownRequest, context: Context) -> pb.ShutdownReply:
        ending = request.force or not self._store.side.lives.serves
        if ending:
            self._store.ending.set()
        return pb.ShutdownReply(ending=ending)


def _invalid(request: pb.OpenRequest) -> tuple[grpc.StatusCode, str] | None:
    """What is wrong with an Open, whoever sends it."""
    if request.protocol != PROTOCOL:
        return (
            _NOT_NOW,
            f"the engine's kvstrata {request.version} speaks protocol {request.protocol}, "
            f"the running node store {__version__} speaks {PROTOCOL}: "
            "stop it with `kvstrata node --stop --force` and let the engine start its own",
        )
    if not 0 < len(request.client) <= _CLIENT_NAME_MAX or not request.slot_bytes or not request.workers:
        return _INVALID, "Open needs client, slot_bytes and workers"
    if len(request.slot_bytes) > _SIZES_MAX or len(set(request.slot_bytes)) < len(request.slot_bytes):
        return _INVALID, f"Open.slot_bytes has up to {_SIZES_MAX} sizes that differ"
    if any(
        not size or size % ALIGNMENT for size in request.slot_bytes
    ):  # as of every chunk; a list of all bytes of a segment would not fit
        return _INVALID, f"Open.slot_bytes is a multiple of {ALIGNMENT}"
    return None


async def _refuse(context: Context, code: grpc.StatusCode, why: str) -> NoReturn:
    """End the call with `why`, which may quote what the client sent.

    gRPC drops an answer of more than 8 KiB of text (percent-encoded: 3 for a byte) and never sends one
    that is not Unicode.
    """
    text = why.encode(errors="backslashreplace")[:_WHY_BYTES_MAX].decode(errors="ignore")
    await context.abort(code, text)
    raise AssertionError("abort raises")


def _slot(slot: Slot) -> pb.Slot:
    return pb.Slot(segment=slot.segment, offset=slot.offset, nbytes=slot.nbytes)


def _conflicts(config_json: str, held: Config) -> list[str]:
    """Settings of the node store that a later client set otherwise than the one that started it.

    Raises:
        ValueError: `config_json` is not a configuration; the text says why.
    """
    if not config_json:
        return []
    try:
        if len(config_json) > _CONFIG_MAX:
            raise ValueError(f"it has more than {_CONFIG_MAX} characters")
        tree = json.loads(config_json)
        if not isinstance(tree, dict):
            raise ValueError("it must be a JSON object")
        wanted = build_config(("the engine's configuration", tree)).host
    except (ConfigError, ValueError, RecursionError) as error:  # of a number, or a nesting, without end
        raise ValueError(f"Open.config_json: {error}") from None
    default, said = HostConfig(), as_tree(held)["host"]  # says "auto" where the fields hold AUTO
    return [
        f"host.{field.name} is {_told(said[field.name])} in the running node store "
        f"and {_told(getattr(wanted, field.name))} in this engine's configuration"
        for field in dataclasses.fields(HostConfig)
        if getattr(wanted, field.name) not in (getattr(default, field.name), getattr(held.host, field.name))
    ]


def _told(value: object) -> str:
    """A setting as a user would write it."""
    return f"{format_size(value)} ({value} bytes)" if isinstance(value, int) else repr(value)
