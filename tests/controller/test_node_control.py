"""The control plane of a real node store: what it answers to engines, and to whatever else comes along."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstrata.controller.node.launch import start_node
from kvstrata.controller.side import PROTOCOL as SIDE_PROTOCOL
from kvstrata.controller.wire import PROTOCOL, WHY_TO_WIRE, why_from_wire
from kvstrata.core.errors import NodeUnavailable
from kvstrata.core.events import Matched, Why
from kvstrata.protos.kvstrata.v1 import node_pb2 as pb
from tests.controller.stores import SLOT, Engine, RunningStore, config_for, key, wait_for

StartEngine = Callable[..., Engine]


@pytest.fixture
def store(shared_store: RunningStore) -> Iterator[RunningStore]:
    """After every test it lives, its books are right, and no client is left on them."""
    pid = shared_store.pid
    yield shared_store
    assert shared_store.facts()["pid"] == pid
    wait_for("clients to be forgotten", lambda: shared_store.facts()["clients"] == [])
    assert shared_store.problems() == []
    assert "Traceback" not in shared_store.log, shared_store.log


@pytest.fixture
def engine(store: RunningStore, engines: StartEngine) -> Engine:
    """Closed before `store` looks around, because fixtures end in the reverse order."""
    return engines(store.config, "engine")


# ------------------------------------------------------------------------------------- engines


def test_an_engine_finds_what_another_has_stored(store: RunningStore, engines: StartEngine) -> None:
    writer = engines(store.config, "writer")
    reader = engines(store.config, "reader", workers=2)
    slots = writer.save(key(1), key(2))
    assert len(set(slots)) == 2
    assert all(slot.nbytes == SLOT for slot in slots)
    reader.reserve(key(90))  # its workers have registered the pool
    assert reader.match(key(1), key(2), key(3)) == Matched(tuple(slots), being_written=False)
    assert writer.reserve(key(3))
    again = reader.match(key(1), key(2), key(3))
    assert isinstance(again, Matched)
    assert again.being_written
    booked = store.engine("reader")
    assert booked is not None
    assert (booked["leases"], booked["jobs"]) == (2, 1)
    reader.update(released=reader.leases, aborted=list(reader.jobs))
    booked = store.engine("reader")
    assert booked is not None
    assert (booked["leases"], booked["jobs"]) == (0, 0)
    assert store.problems() == []


def test_every_reason_survives_the_wire(store: RunningStore, engine: Engine) -> None:
    assert {why_from_wire(WHY_TO_WIRE[why]) for why in Why} == set(Why)
    assert why_from_wire(999) is Why.OTHER
    engine.reserve(key(10))
    assert engine.update(reserve=[key(10)]) == [Why.EXISTS]
    said, engine.client._seq = engine.client._seq, 0
    assert engine.update() == [Why.STALE]
    engine.client._seq = said
    late = store.call("Match", pb.MatchRequest(client=engine.name, seq=1, lease=999, keys=key(1)))
    assert late.refused == pb.WHY_STALE


def test_numbers_as_large_as_the_wire_carries_are_fine(engine: Engine) -> None:
    engine.numbers = 2**64 - 3
    engine.save(key(20))
    engine.numbers = 2**64 - 2
    engine.match(key(20))
    assert engine.leases == {2**64 - 1}
    engine.update(released=engine.leases)


def test_opening_twice_is_harmless(store: RunningStore, engine: Engine) -> None:
    engine.reserve(key(30))
    request = opening(engine.name)
    assert store.call("Open", request).refused == pb.WHY_UNSPECIFIED
    assert store.call("Open", request).store_epoch == engine.session().epoch
    booked = store.engine(engine.name)
    assert booked is not None
    assert booked["jobs"] == 1


def test_people_are_told_sizes_and_counters(store: RunningStore, engine: Engine) -> None:
    engine.save(key(40))
    facts = store.facts()
    assert facts["pool"]["configured_bytes"] == store.config.host.size
    assert 0 < facts["pool"]["made_bytes"] <= facts["pool"]["configured_bytes"]
    assert facts["pool"]["slots"] == facts["pool"]["made_bytes"] // SLOT
    assert facts["counters"]["committed_chunks"] >= 1
    assert facts["chunks"]["ready"] >= 1
    assert json.loads(store.call("Check", pb.CheckRequest()).json)["pid"] == facts["pid"]


def test_it_does_not_end_while_somebody_is_connected(store: RunningStore, engine: Engine) -> None:
    engine.session()
    assert not store.call("Shutdown", pb.ShutdownRequest()).ending


# ------------------------------------------------------------------------------- sockets and settings


def test_sockets_are_for_the_owner_alone(store: RunningStore) -> None:
    for path in (store.paths.control, store.paths.side):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.paths.folder.stat().st_mode) == 0o700


def test_a_second_start_ends_quietly(store: RunningStore) -> None:
    pid = store.pid
    start_node(store.config)
    wait_for("the second start", lambda: "another node store serves" in store.log)
    assert store.facts()["pid"] == pid


def test_a_store_that_cannot_start_says_why(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o755)
    with pytest.raises(NodeUnavailable, match="is open to other users"):
        start_node(config_for(runtime_dir))


def test_an_engine_with_another_pool_size_is_told_both(store: RunningStore, engines: StartEngine) -> None:
    folder = store.paths.folder
    engine = engines(config_for(folder, host={"size": "16MiB", "segment_size": "auto"}), "other")
    (trouble,) = wait_for("a word about it", lambda: engine.troubles)
    ours, theirs = f"16.0 MiB ({16 << 20} bytes)", f"8.0 MiB ({8 << 20} bytes)"
    assert f"host.size is {theirs} in the running node store and {ours} in this engine's" in trouble
    assert "host.segment_size" not in trouble
    assert engine.client.session is None


def test_a_size_that_the_store_chose_itself_is_told_as_auto(runtime_dir: Path, engines: StartEngine) -> None:
    host = {"size": "auto", "segment_size": "auto"}
    store = RunningStore.start(config_for(runtime_dir, host=host))
    try:
        engine = engines(config_for(runtime_dir, host={**host, "size": "16MiB"}), "other")
        (trouble,) = wait_for("a word about it", lambda: engine.troubles)
        assert "host.size is 'auto' in the running node store and 16.0 MiB" in trouble
    finally:
        store.stop()


def test_an_engine_whose_chunks_do_not_fit_is_told_so(store: RunningStore, engines: StartEngine) -> None:
    engine = engines(store.config, "large", slot_bytes=9 * SLOT)
    (trouble,) = wait_for("a word about it", lambda: engine.troubles)
    assert (
        "one chunk of this model needs 9.0 MiB, the host pool has 8.0 MiB: "
        "raise host.size or lower chunk.tokens" in trouble
    )


# --------------------------------------------------------------------------------- malformed calls


def opening(client: str = "engine", **change: Any) -> pb.OpenRequest:
    fields = {"protocol": PROTOCOL, "client": client, "slot_bytes": [SLOT], "workers": 1, "version": "0"}
    return pb.OpenRequest(**{**fields, **change})


def refusal(store: RunningStore, name: str, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        store.call(name, request)
    assert isinstance(caught.value, grpc.Call)
    return caught.value.code(), caught.value.details() or ""


BAD_CALLS: list[tuple[str, Any, grpc.StatusCode, str]] = [
    ("Open", opening(protocol=PROTOCOL + 1), grpc.StatusCode.FAILED_PRECONDITION, "speaks protocol 2"),
    ("Open", opening(client=""), grpc.StatusCode.INVALID_ARGUMENT, "needs client"),
    ("Open", opening(client="x" * 257), grpc.StatusCode.INVALID_ARGUMENT, "needs client"),
    ("Open", opening(slot_bytes=[0]), grpc.StatusCode.INVALID_ARGUMENT, "slot_bytes"),
    ("Open", opening(slot_bytes=[1]), grpc.StatusCode.INVALID_ARGUMENT, "multiple of 4096"),
    ("Open", opening(workers=0), grpc.StatusCode.INVALID_ARGUMENT, "workers"),
    ("Open", opening("nobody"), grpc.StatusCode.FAILED_PRECONDITION, "after the hello"),
    ("Match", pb.MatchRequest(client="a", seq=1, keys=b"x" * 33), grpc.StatusCode.INVALID_ARGUMENT, "32"),
    (
        "Update",
        pb.UpdateRequest(client="a", seq=1, reserve=[pb.Reservation(job=1, key=b"x" * 31)]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "32 bytes",
    ),
    ("Update", pb.UpdateRequest(client="a", seq=1, corrupt=[b""]), grpc.StatusCode.INVALID_ARGUMENT, "32"),
    ("Update", pb.UpdateRequest(client="a", seq=1, used=[b"x"]), grpc.StatusCode.INVALID_ARGUMENT, "32"),
]


@pytest.mark.parametrize(
    ("name", "request_", "code", "words"),
    BAD_CALLS,
    ids=[f"{call[0]}{i}" for i, call in enumerate(BAD_CALLS)],
)
def test_a_malformed_call_is_refused_in_words(
    store: RunningStore, name: str, request_: Any, code: grpc.StatusCode, words: str
) -> None:
    found, details = refusal(store, name, request_)
    assert found is code
    assert words in details


NO_CONFIGURATIONS = [
    "{",
    "[]",
    "7",
    "null",
    '{"host": 7}',
    '{"host": {"sise": 1}}',
    '{"host": {"size": "big"}}',
    '{"host": {"size": 1e999}}',
    '{"host": {"size": 1' + "0" * 5000 + "}}",
    '{"a": {}}',
    r'{"\ud800": {}}',  # half a character: no text that can be sent
    '{"' + "ä" * 30_000 + '": {}}',
    '{"' + "x" * 100_000 + '": {}}',
    "[" * 30_000,
    '{"host":' * 8000,
    '{"host": {"policy": ' + "[" * 400 + "]" * 400 + "}}",
]


@pytest.mark.parametrize("text", NO_CONFIGURATIONS, ids=range(len(NO_CONFIGURATIONS)))
def test_a_configuration_that_is_none_is_refused(store: RunningStore, engine: Engine, text: str) -> None:
    engine.session()
    code, details = refusal(store, "Open", opening(config_json=text))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("Open.config_json: ")


def test_a_foreign_protocol_is_told_both_versions_and_the_remedy(store: RunningStore) -> None:
    _, details = refusal(store, "Open", opening(protocol=99, version="9.9"))
    assert "kvstrata 9.9 speaks protocol 99" in details
    assert "`kvstrata node --stop --force`" in details


@pytest.mark.parametrize("version", ["v" * 20_000, "\U0001f600" * 10_000])
def test_a_refusal_that_quotes_much_still_arrives(store: RunningStore, version: str) -> None:
    code, details = refusal(store, "Open", opening(protocol=99, version=version))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details.startswith(f"the engine's kvstrata {version[:400]}")


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("Open", opening(config_json="x" * (5 << 20))),
        ("Match", pb.MatchRequest(client="a", seq=1, keys=b"k" * (5 << 20))),
        ("Update", pb.UpdateRequest(client="a", seq=1, used=[b"k" * (5 << 20)])),
    ],
)
def test_a_message_of_five_mebibytes_is_refused(store: RunningStore, name: str, request_: Any) -> None:
    code, _ = refusal(store, name, request_)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_messages_just_below_the_limit_are_answered(store: RunningStore, engine: Engine) -> None:
    engine.session()
    keys = [key(number) for number in range(60_000)]
    match = pb.MatchRequest(client=engine.name, seq=1, lease=1, keys=b"".join(keys))
    assert store.call("Match", match).refused == pb.WHY_UNSPECIFIED
    update = pb.UpdateRequest(
        client=engine.name,
        seq=2,
        reserve=[pb.Reservation(job=number, key=each) for number, each in enumerate(keys)],
        corrupt=keys[:20_000],
        used=[b"".join(keys[:20_000])],
    )
    assert update.ByteSize() > 3_700_000
    assert len(store.call("Update", update).grants) == len(keys)


@pytest.mark.parametrize(
    "keys", [[key(number) for number in range(70_000)], [key(1), key(2), key(1)]], ids=["many", "repeated"]
)
def test_more_keys_than_a_prompt_has_are_refused(
    store: RunningStore, engine: Engine, keys: list[bytes]
) -> None:
    code, why = refusal(store, "Match", pb.MatchRequest(client=engine.name, seq=1, keys=b"".join(keys)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "up to 65536 keys that all differ" in why


def test_what_is_no_message_is_refused(node_store: Callable[..., RunningStore]) -> None:
    store = node_store()  # of its own: gRPC writes a traceback into the log
    pid = store.pid
    with grpc.insecure_channel(f"unix:{store.paths.control}") as channel:
        for name in ("Open", "Match", "Update", "Stats", "Check", "Shutdown", "Nothing"):
            call = channel.unary_unary(f"/kvstrata.v1.NodeStore/{name}")  # sends bytes as they are
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff\xff no message", timeout=10)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)
    assert store.facts()["pid"] == pid


@pytest.mark.parametrize("client", ["nobody", "", "x" * 10_000])
def test_an_unknown_client_gets_nothing(store: RunningStore, client: str) -> None:
    match = store.call("Match", pb.MatchRequest(client=client, seq=1, lease=1, keys=key(1)))
    assert (match.refused, list(match.segments)) == (pb.WHY_UNKNOWN_CLIENT, [])
    update = pb.UpdateRequest(client=client, seq=1, reserve=[pb.Reservation(job=1, key=key(1))])
    answer = store.call("Update", update)
    assert (answer.refused, list(answer.grants)) == (pb.WHY_UNKNOWN_CLIENT, [])


def test_a_match_of_nothing_finds_nothing(store: RunningStore, engine: Engine) -> None:
    assert engine.match() == Matched((), being_written=False)


def test_noise_on_the_control_socket_does_no_harm(store: RunningStore) -> None:
    noise = random.Random(1)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(store.paths.control))
            sock.sendall(noise.randbytes(noise.choice([1, 100, 5000])))
    assert store.stats()


# ------------------------------------------------------------------------------ malformed side messages

HELLO = {"client": "noise", "role": "scheduler", "rank": 0, "protocol": SIDE_PROTOCOL}


class Side:
    """A process that talks on the side socket without knowing how."""

    def __init__(self, store: RunningStore) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.sock.connect(str(store.paths.side))

    def send(self, message: Any, fds: list[int] | None = None) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        socket.send_fds(self.sock, [data], fds or [])

    def hello(self, **change: Any) -> dict[str, Any]:
        pidfd = os.pidfd_open(os.getpid())
        self.send({"hello": {**HELLO, **change}}, [pidfd])
        os.close(pidfd)
        welcome: dict[str, Any] = json.loads(self.sock.recv(4096))
        return welcome

    def hung_up(self) -> bool:
        try:
            return self.sock.recv(4096) == b""
        except ConnectionResetError:
            return True


@pytest.fixture
def side(store: RunningStore) -> Iterator[Side]:
    side = Side(store)
    yield side
    side.sock.close()


@pytest.fixture
def pidfd() -> Iterator[int]:
    fd = os.pidfd_open(os.getpid())
    yield fd
    os.close(fd)


def descriptors(store: RunningStore) -> int:
    return len(list(Path(f"/proc/{store.pid}/fd").iterdir()))


NOISE: list[Any] = [
    b"\x00\xff" * 100,
    b"{",
    b"[" * 4000,
    b"x" * 8000,
    [1, 2],
    {},
    {"hello": None},
    {"hello": {}},
    {"hello": {**HELLO, "role": "admin"}},
    {"hello": {**HELLO, "protocol": 7}},
    {"hello": {**HELLO, "client": ["x"]}},
    {"registered": 0},
    {"segment": {"id": 1, "nbytes": 1}},
    {"welcome": {}},
]


@pytest.mark.parametrize("noise", NOISE, ids=range(len(NOISE)))
@pytest.mark.parametrize("with_descriptor", [False, True])
def test_noise_on_the_side_socket_is_hung_up_on(
    store: RunningStore, pidfd: int, noise: Any, with_descriptor: bool
) -> None:
    before = descriptors(store)
    side = Side(store)
    side.send(noise, [pidfd] if with_descriptor else None)
    assert side.hung_up()
    side.sock.close()
    wait_for("its descriptors to be closed", lambda: descriptors(store) <= before)


def test_an_empty_packet_keeps_no_descriptor(store: RunningStore, pidfd: int) -> None:
    before = descriptors(store)
    side = Side(store)
    side.send(b"", [pidfd])
    assert side.hung_up()
    side.sock.close()
    wait_for("its descriptors to be closed", lambda: descriptors(store) <= before)


@pytest.mark.parametrize("count", [0, 2])
def test_a_hello_brings_one_pidfd(store: RunningStore, side: Side, pidfd: int, count: int) -> None:
    side.send({"hello": HELLO}, [pidfd] * count)
    assert side.hung_up()
    assert "a hello brings exactly one pidfd" in store.log


@pytest.mark.parametrize("what", ["file", "device", "pipe"])
def test_a_hello_with_another_descriptor_is_hung_up_on(store: RunningStore, what: str) -> None:
    before = descriptors(store)
    reading, writing = os.pipe()
    file, device = os.open(__file__, os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)
    side = Side(store)
    side.send({"hello": HELLO}, [{"file": file, "device": device, "pipe": reading}[what]])
    assert side.hung_up()
    side.sock.close()
    wait_for("its descriptors to be closed", lambda: descriptors(store) <= before)
    for fd in (reading, writing, file, device):
        os.close(fd)


def test_a_second_hello_ends_the_connection(side: Side, pidfd: int) -> None:
    side.hello()
    side.send({"hello": HELLO}, [pidfd])
    assert side.hung_up()


@pytest.mark.parametrize("segment", ["x", None, [], {}, b'{"registered": Infinity}', b'{"registered": NaN}'])
def test_a_registration_of_nothing_ends_the_connection(side: Side, segment: Any) -> None:
    side.hello(role="worker")
    side.send(segment if isinstance(segment, bytes) else {"registered": segment})
    assert side.hung_up()


@pytest.mark.parametrize("segment", [0, 99, -1, 10**30, True])
def test_a_registration_by_nobody_s_worker_grants_nothing(
    store: RunningStore, side: Side, segment: int
) -> None:
    side.hello(role="worker")
    side.send({"registered": segment})
    side.send({"bye": True})
    assert side.hung_up()
    assert store.engine("noise") is None


def test_a_bye_counts_though_an_offer_was_left_unread(store: RunningStore, engine: Engine) -> None:
    """Closing a socket with unread data resets it, and a reset is told before what was sent earlier."""
    engine.reserve(key(50))
    worker = Side(store)
    worker.hello(client=engine.name, role="worker", rank=1)
    assert select.select([worker.sock], [], [], 10)[0], "a segment is offered"
    os.kill(store.pid, signal.SIGSTOP)
    worker.send({"bye": True})
    worker.sock.close()
    os.kill(store.pid, signal.SIGCONT)
    engine.close()
    wait_for("the engine to be forgotten", lambda: store.engine(engine.name) is None, 3.0)


def test_who_hangs_up_right_after_the_hello_does_no_harm(store: RunningStore, pidfd: int) -> None:
    for _ in range(20):
        side = Side(store)
        side.send({"hello": HELLO}, [pidfd])
        side.sock.close()
    assert store.stats()


def test_random_packets_do_no_harm(store: RunningStore, pidfd: int) -> None:
    noise = random.Random(2)
    before = descriptors(store)
    for _ in range(50):
        side = Side(store)
        side.send(noise.randbytes(noise.randrange(1, 4000)), [pidfd] * noise.randrange(4))
        side.sock.close()
    wait_for("its descriptors to be closed", lambda: descriptors(store) <= before)
