"""One typed configuration, validated once. Each field says what it costs.

It comes from the YAML file that `KVSTRATA_CONFIG` names and from `kv_connector_extra_config`,
which have the same shape. An unknown key, or one that both set differently, is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstrata.core.errors import ConfigError
from kvstrata.core.policy import POLICIES
from kvstrata.core.units import format_size, parse_size, parse_time

AUTO = 0  # "auto" for sizes: chosen by the node store when it starts


def _size(default: int, *, least: int, hint: str = "") -> Any:
    return field(default=default, metadata={"parse": parse_size, "least": least, "hint": hint})


def _count(default: int, *, most: int) -> Any:
    return field(default=default, metadata={"least": 1, "most": most})


def _time(default: float, *, least: float = 0.0, most: float | None = None) -> Any:
    return field(default=default, metadata={"parse": parse_time, "least": least, "most": most})


def _choice(default: str, *choices: str) -> Any:
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The host pool. Memory is taken as it is needed, up to `size`, and kept."""

    # "auto": a quarter of the memory available when the node store starts
    size: int = _size(
        AUTO,
        least=1 << 20,
        hint='leave it out, or write "auto", for a quarter of the memory that is available; to store nothing '
        "and load nothing, set client.save and client.load to false",
    )
    # growth step; "auto": 1 GiB from a pool of 16 GiB on, else up to 256 MiB
    segment_size: int = _size(AUTO, least=4096)
    policy: str = _choice("lru", *POLICIES)


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """The unit of storing. Smaller chunks hit earlier and cost more bookkeeping.

    Engines with chunks of different sizes use one pool, but not each other's chunks.
    """

    tokens: int = _count(256, most=65536)  # rounded up to whole engine blocks


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """The node store process of this host."""

    runtime_dir: str = ""  # where its sockets lie; "": $XDG_RUNTIME_DIR/kvstrata, or a private folder in /tmp
    group: str = ""  # a Unix group that may use it too: engines that share a pool trust each other
    autostart: bool = True  # start it when it is not running
    idle_exit: float = _time(1800.0, least=1.0)  # seconds without a client until it ends
    log_level: str = _choice("info", "debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """The connector's side: what it waits for, and how long."""

    lookup_wait: float = _time(0.001, most=0.1)  # seconds a step may wait for answers, all requests together
    call_deadline: float = _time(
        1.0, least=0.01, most=60.0
    )  # one RPC; past it the store counts as absent for a moment
    load_deadline: float = _time(
        30.0, least=0.1, most=90.0
    )  # from match to the last byte; what is not begun by then is recomputed
    copy_threads: int = _count(1, most=64)  # each keeps one core busy while it copies
    packing: str = _choice("auto", "auto", "on", "off")  # bf16 in 12 bits, exactly; "auto": on GPUs
    staging: int = _size(64 << 20, least=1 << 20)  # bytes of a GPU's memory, for each direction
    save: bool = True  # write computed chunks
    load: bool = True  # read stored chunks


@dataclass(frozen=True, slots=True)
class IdentityConfig:
    """What names the model when its files cannot."""

    model: str = ""  # a name of your own for weights that cannot be read locally; equal name = equal KV


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set."""

    host: HostConfig = field(default_factory=HostConfig)
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    node: NodeConfig = field(default_factory=NodeConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    identity: IdentityConfig = field(default_factory=IdentityConfig)


def build_config(*sources: tuple[str, Mapping[str, Any]]) -> Config:
    """Merge and validate `(name, tree)` sources.

    Raises:
        ConfigError: names the key, the nearest known one or the allowed values, and the source.
    """
    said: dict[str, tuple[str, Any]] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, tree in sources:
        for path, value in _flatten(name, tree):
            # Compared as what they mean: 1GiB is 1024MiB, and 1 is not true.
            meant = _validate(path, value, name)
            section, key = path.split(".")
            held = sections.setdefault(section, {})
            if held.setdefault(key, meant) != meant:
                other, was = said[path]
                raise ConfigError(
                    f"{path} is {was!r} in {other} and {value!r} in {name}: set it in one place"
                )
            said[path] = (name, value)
    types = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    return Config(**{name: types[name](**values) for name, values in sections.items()})  # type: ignore[operator]


def as_tree(config: Config) -> dict[str, dict[str, Any]]:
    """The configuration as plain data that `build_config` accepts."""
    tree = dataclasses.asdict(config)
    for key in ("size", "segment_size"):
        if tree["host"][key] == AUTO:
            tree["host"][key] = "auto"
    return tree


def _fields(section: str) -> dict[str, dataclasses.Field[Any]]:
    factory: Any = Config.__dataclass_fields__[section].default_factory
    return {f.name: f for f in dataclasses.fields(factory)}


def _flatten(source: str, tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    known = [f.name for f in dataclasses.fields(Config)]
    every_path = [f"{section}.{key}" for section in known for key in _fields(section)]
    found = []
    for section, values in tree.items():
        if section not in known:
            raise ConfigError(_unknown_section(str(section), values, known, every_path, source))
        if not isinstance(values, Mapping):
            keys = ", ".join(_fields(section))
            found_there = "empty" if values is None else repr(values)
            raise ConfigError(f"{section} in {source} is {found_there}; it holds keys: {keys}")
        for key, value in values.items():
            path = f"{section}.{key}"
            if path not in every_path:
                raise ConfigError(_unknown(path, every_path, source))
            found.append((path, value))
    return found


def _unknown_section(name: str, value: Any, known: list[str], every_path: list[str], source: str) -> str:
    if name not in every_path:
        return _unknown(name, [*known, *every_path], source)
    section, key = name.split(".")
    # As YAML writes it: true, not True.
    text = str(value).lower() if isinstance(value, bool) else value
    return f"{name} in {source} is one key with a dot in it: write it as {section}: {{{key}: {text}}}"


def _unknown(path: str, known: list[str], source: str) -> str:
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {path} in {source}: {hint}"


def _validate(path: str, value: Any, source: str) -> Any:
    section, key = path.split(".")
    spec = _fields(section)[key]
    parse, least, most, choices = (spec.metadata.get(name) for name in ("parse", "least", "most", "choices"))
    hint = f": {text}" if (text := spec.metadata.get("hint")) else ""
    if parse:
        if value == "auto" and spec.default == AUTO and parse is parse_size:
            return AUTO
        try:
            value = parse(value)
        except ValueError as error:
            raise ConfigError(f"{path} in {source}: {error}") from None
    elif type(value) is not type(spec.default):
        kind = {int: "a whole number", bool: "true or false", str: "text"}[type(spec.default)]
        raise ConfigError(f"{path} in {source} is {value!r}; it must be {kind}")
    if choices and value not in choices:
        raise ConfigError(f"{path} in {source} is {value!r}; allowed: {', '.join(choices)}")
    unit = " seconds" if parse is parse_time else ""
    if least is not None and value < least:
        bound = format_size(least) if parse is parse_size else f"{least}{unit}"
        raise ConfigError(f"{path} in {source} is {value!r}; the least allowed is {bound}{hint}")
    if most is not None and value > most:
        raise ConfigError(f"{path} in {source} is {value!r}; the most allowed is {most}{unit}")
    return value
