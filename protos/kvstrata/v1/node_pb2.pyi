from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Why(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WHY_UNSPECIFIED: _ClassVar[Why]
    WHY_EXISTS: _ClassVar[Why]
    WHY_FULL: _ClassVar[Why]
    WHY_NOT_READY: _ClassVar[Why]
    WHY_STALE: _ClassVar[Why]
    WHY_UNKNOWN_CLIENT: _ClassVar[Why]
    WHY_STOPPED: _ClassVar[Why]
    WHY_QUARANTINE: _ClassVar[Why]
    WHY_BUSY: _ClassVar[Why]
    WHY_POOL_TOO_SMALL: _ClassVar[Why]
    WHY_OTHER: _ClassVar[Why]
WHY_UNSPECIFIED: Why
WHY_EXISTS: Why
WHY_FULL: Why
WHY_NOT_READY: Why
WHY_STALE: Why
WHY_UNKNOWN_CLIENT: Why
WHY_STOPPED: Why
WHY_QUARANTINE: Why
WHY_BUSY: Why
WHY_POOL_TOO_SMALL: Why
WHY_OTHER: Why

class OpenRequest(_message.Message):
    __slots__ = ("protocol", "client", "slot_bytes", "workers", "config_json", "version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: str
    slot_bytes: _containers.RepeatedScalarFieldContainer[int]
    workers: int
    config_json: str
    version: str
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[str] = ..., slot_bytes: _Optional[_Iterable[int]] = ..., workers: _Optional[int] = ..., config_json: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("refused", "store_epoch", "pool_bytes", "version", "conflicts", "slot_bytes_max")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    STORE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONFLICTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    refused: Why
    store_epoch: bytes
    pool_bytes: int
    version: str
    conflicts: _containers.RepeatedScalarFieldContainer[str]
    slot_bytes_max: int
    def __init__(self, refused: _Optional[_Union[Why, str]] = ..., store_epoch: _Optional[bytes] = ..., pool_bytes: _Optional[int] = ..., version: _Optional[str] = ..., conflicts: _Optional[_Iterable[str]] = ..., slot_bytes_max: _Optional[int] = ...) -> None: ...

class Slot(_message.Message):
    __slots__ = ("segment", "offset", "nbytes")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    segment: int
    offset: int
    nbytes: int
    def __init__(self, segment: _Optional[int] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("client", "seq", "lease", "keys")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    client: str
    seq: int
    lease: int
    keys: bytes
    def __init__(self, client: _Optional[str] = ..., seq: _Optional[int] = ..., lease: _Optional[int] = ..., keys: _Optional[bytes] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ("refused", "being_written", "lease", "segments", "offsets", "nbytes")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    BEING_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    refused: Why
    being_written: bool
    lease: int
    segments: _containers.RepeatedScalarFieldContainer[int]
    offsets: _containers.RepeatedScalarFieldContainer[int]
    nbytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, refused: _Optional[_Union[Why, str]] = ..., being_written: bool = ..., lease: _Optional[int] = ..., segments: _Optional[_Iterable[int]] = ..., offsets: _Optional[_Iterable[int]] = ..., nbytes: _Optional[_Iterable[int]] = ...) -> None: ...

class Reservation(_message.Message):
    __slots__ = ("job", "key", "nbytes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    job: int
    key: bytes
    nbytes: int
    def __init__(self, job: _Optional[int] = ..., key: _Optional[bytes] = ..., nbytes: _Optional[int] = ...) -> None: ...

class UpdateRequest(_message.Message):
    __slots__ = ("client", "seq", "reserve", "committed", "aborted", "released", "corrupt", "used", "leases_held", "jobs_held", "drawn")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    LEASES_HELD_FIELD_NUMBER: _ClassVar[int]
    JOBS_HELD_FIELD_NUMBER: _ClassVar[int]
    DRAWN_FIELD_NUMBER: _ClassVar[int]
    client: str
    seq: int
    reserve: _containers.RepeatedCompositeFieldContainer[Reservation]
    committed: _containers.RepeatedScalarFieldContainer[int]
    aborted: _containers.RepeatedScalarFieldContainer[int]
    released: _containers.RepeatedScalarFieldContainer[int]
    corrupt: _containers.RepeatedScalarFieldContainer[bytes]
    used: _containers.RepeatedScalarFieldContainer[bytes]
    leases_held: int
    jobs_held: int
    drawn: int
    def __init__(self, client: _Optional[str] = ..., seq: _Optional[int] = ..., reserve: _Optional[_Iterable[_Union[Reservation, _Mapping]]] = ..., committed: _Optional[_Iterable[int]] = ..., aborted: _Optional[_Iterable[int]] = ..., released: _Optional[_Iterable[int]] = ..., corrupt: _Optional[_Iterable[bytes]] = ..., used: _Optional[_Iterable[bytes]] = ..., leases_held: _Optional[int] = ..., jobs_held: _Optional[int] = ..., drawn: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("slot", "why")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    slot: Slot
    why: Why
    def __init__(self, slot: _Optional[_Union[Slot, _Mapping]] = ..., why: _Optional[_Union[Why, str]] = ...) -> None: ...

class UpdateReply(_message.Message):
    __slots__ = ("refused", "grants")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    refused: Why
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    def __init__(self, refused: _Optional[_Union[Why, str]] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("problems", "json")
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    problems: _containers.RepeatedScalarFieldContainer[str]
    json: str
    def __init__(self, problems: _Optional[_Iterable[str]] = ..., json: _Optional[str] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ("force",)
    FORCE_FIELD_NUMBER: _ClassVar[int]
    force: bool
    def __init__(self, force: bool = ...) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ("ending",)
    ENDING_FIELD_NUMBER: _ClassVar[int]
    ending: bool
    def __init__(self, ending: bool = ...) -> None: ...
