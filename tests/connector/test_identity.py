"""Digests of weights and adapters: whole content, not names."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import kvstrata.connector.weights
from kvstrata.connector.vllm.identity import Identity, _weights
from kvstrata.connector.weights import (
    _keeps_times,
    changed_since,
    content_digest,
    process_start,
    start_digest,
    weight_files,
)
from kvstrata.core.config import Config
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.keys import KeyChain
from kvstrata.core.namespace import ModelIdentity


def model(folder: Path, change: Any = None, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(64, 512, generator=generator) for name in ("a", "b", "c")} | tensors
    save_file(weights, folder / "model.safetensors")
    return folder


def content(folder: Path, memory: Path | None = None) -> bytes:
    return content_digest(weight_files(folder), memory or folder / "nowhere" / "memory")


def test_a_copy_elsewhere_is_the_same_model(tmp_path: Path) -> None:
    first = model(tmp_path / "one")
    shutil.copytree(first, tmp_path / "two")
    assert content(first) == content(tmp_path / "two")


def test_a_single_other_byte_is_another_model(tmp_path: Path) -> None:
    file = model(tmp_path / "m") / "model.safetensors"
    data = bytearray(file.read_bytes())
    seen = {content(tmp_path / "m")}
    places = [*range(0, len(data), 4001), len(data) - 1]
    for place in places:
        data[place] ^= 1
        file.write_bytes(data)
        seen.add(content(tmp_path / "m"))
    assert len(seen) == 1 + len(places)


@pytest.mark.parametrize(
    "name", ["modeling_own.py", "hf_quant_config.json", "model.safetensors.index.json", "x.bin", "x.gguf"]
)
def test_every_file_that_can_change_the_answer_counts(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "m")
    before = content(folder)
    (folder / name).write_text("other")
    assert content(folder) != before


def test_weights_that_cannot_be_read_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"no weight files in .*: set identity\.model"):
        _weights(config_of(tmp_path), Config())


def test_a_file_is_read_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memory = model(tmp_path / "m"), tmp_path / "memory"
    file = folder / "model.safetensors"
    monkeypatch.setattr("kvstrata.connector.weights._SETTLED_S", -1.0)
    monkeypatch.setattr("kvstrata.connector.weights._keeps_times", lambda _: True)
    first = content(folder, memory)
    (note,) = memory.iterdir()
    note.write_text("ab" * 32)
    remembered = content(folder, memory)
    assert remembered != first  # what was noted is believed, so the file was not read
    os.utime(file)
    assert content(folder, memory) == first
    note.write_text("not a digest")
    assert content(folder, memory) == first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    content(model(tmp_path / "m"), tmp_path / "memory")
    assert not (tmp_path / "memory").exists()  # its time stamp could stay while its bytes change again


def test_what_somebody_else_could_have_noted_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memory = model(tmp_path / "m"), tmp_path / "memory"
    monkeypatch.setattr("kvstrata.connector.weights._SETTLED_S", -1.0)
    monkeypatch.setattr("kvstrata.connector.weights._keeps_times", lambda _: True)
    right = content(folder, memory)
    for note in memory.iterdir():
        note.write_text("ab" * 32)
    memory.chmod(0o777)
    assert content(folder, memory) == right


@pytest.mark.parametrize(("file", "kept"), [("/dev/shm", False), ("/proc/self/stat", False)])
def test_file_systems_without_reliable_times_are_read_each_time(file: str, kept: bool) -> None:
    assert _keeps_times(Path(file)) is kept


def test_weights_that_are_being_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = model(tmp_path / "m") / "model.safetensors"
    read = kvstrata.connector.weights._read

    def read_slowly(path: Path) -> bytes:
        found = read(path)
        with path.open("ab") as output:
            output.write(b"more")
        return found

    monkeypatch.setattr("kvstrata.connector.weights._read", read_slowly)
    with pytest.raises(UnsupportedModel, match=f"files in {file.parent} changed while"):
        content(tmp_path / "m")


def test_a_file_that_is_cut_short_meanwhile_is_an_error_and_no_crash(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    os.truncate(file, 1 << 30)
    found = start_digest([file], tmp_path / "memory")
    time.sleep(0.1)
    file.write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="changed while"):
        found.result(60)


def test_weights_that_changed_after_the_engine_was_started_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "m")
    assert process_start() < time.time()  # these files are younger than this process
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors in .* changed after this engine"):
        _weights(config_of(folder), Config())
    assert known(engine(folder, monkeypatch), request())


def request(**fields: Any) -> Any:
    plain: dict[str, Any] = {"lora_request": None, "cache_salt": None, "mm_features": []}
    return SimpleNamespace(**(plain | fields))


_IDS = itertools.count(1)


def adapter(folder: Path, seed: int, rank: int = 8) -> Any:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    generator = torch.Generator().manual_seed(seed)
    save_file({"lora": torch.randn(rank, 64, generator=generator)}, folder / "adapter_model.safetensors")
    return SimpleNamespace(lora_name=folder.name, lora_path=str(folder), lora_int_id=next(_IDS))


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Identity:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return engine(model(tmp_path / "base"), monkeypatch)


def config_of(folder: Path) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), revision=None),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
    )


def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Identity:
    """An engine that was started after `folder` was written."""
    monkeypatch.setattr("kvstrata.connector.vllm.identity.process_start", lambda: time.time() + 1)
    of_model = ModelIdentity("{}", b"", "", "", "", b"", "")
    monkeypatch.setattr("kvstrata.connector.vllm.identity.model_identity", lambda *_: of_model)
    made = Identity(config_of(folder), SimpleNamespace(), Config())  # type: ignore[arg-type]
    made.wait(10.0)
    return made


def known(identity: Identity, asked: Any) -> bytes:
    """The namespace, once the adapter has been read."""
    deadline = time.monotonic() + 10
    while (found := identity.namespace(asked)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return found


def test_nothing_has_a_name_while_the_weights_are_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    may_end = threading.Event()
    real = kvstrata.connector.weights.content_digest
    monkeypatch.setattr(
        "kvstrata.connector.weights.content_digest", lambda *of: may_end.wait(10) and real(*of)
    )
    monkeypatch.setattr(Identity, "wait", lambda self, _, wait=Identity.wait: wait(self, 0.01))
    caplog.set_level("INFO", "kvstrata.vllm")
    identity = engine(model(tmp_path / "m"), monkeypatch)
    assert identity.namespace(request()) is None
    assert "until then no request is cached" in caplog.text
    may_end.set()
    first = known(identity, request())
    identity.new_generation()
    assert known(identity, request()) != first

    may_end.clear()
    lora = request(lora_request=adapter(tmp_path / "lora", 1))
    assert identity.namespace(lora) is None  # it is read beside the engine, not waited for
    may_end.set()
    assert known(identity, lora) != known(identity, request())


def test_weights_that_cannot_be_identified_are_said_once_and_nothing_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> bytes:
        raise OSError("the disk is gone")

    monkeypatch.setattr("kvstrata.connector.weights.content_digest", broken)
    identity = engine(model(tmp_path / "m"), monkeypatch)
    assert identity.namespace(request()) is None
    assert identity.namespace(request()) is None
    assert caplog.text.count("nothing will be cached") == caplog.text.count("the disk is gone") == 1


def test_other_weights_have_other_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine(model(tmp_path / "one"), monkeypatch)
    other = engine(model(tmp_path / "other", b=torch.zeros(64, 512)), monkeypatch)
    same = engine(model(tmp_path / "same"), monkeypatch)
    assert known(first, request()) == known(same, request()) != known(other, request())


def test_adapters_and_salts_have_namespaces_of_their_own(identity: Identity, tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    wider = adapter(tmp_path / "wider", 1, rank=16)
    same = adapter(tmp_path / "same", 1)
    spaces = [
        known(identity, request(**fields))
        for fields in (
            {},
            {"cache_salt": "tenant"},
            {"lora_request": one},
            {"lora_request": one, "cache_salt": "tenant"},
            {"lora_request": other},
            {"lora_request": wider},
        )
    ]
    assert len(set(spaces)) == len(spaces)
    assert known(identity, request(lora_request=same)) == spaces[2]  # content, not name


def test_an_adapter_that_changed_on_disk_is_not_cached_until_it_has_another_name(
    identity: Identity, tmp_path: Path
) -> None:
    lora = adapter(tmp_path / "lora", 1)
    before = known(identity, request(lora_request=lora))
    shutil.rmtree(tmp_path / "lora")
    adapter(tmp_path / "lora", 2)
    with pytest.raises(UnsupportedModel, match="has changed on disk"):  # vLLM may still serve the old one
        identity.namespace(request(lora_request=lora))
    lora.lora_int_id = 2
    assert known(identity, request(lora_request=lora)) != before


def test_an_adapter_that_cannot_be_read_is_refused(identity: Identity, tmp_path: Path) -> None:
    lora = SimpleNamespace(lora_name="gone", lora_path=str(tmp_path / "gone"), lora_int_id=1)
    with pytest.raises(UnsupportedModel, match=r"adapter gone: no weight files in .*gone"):
        identity.namespace(request(lora_request=lora))


def test_two_pictures_at_one_place_never_share_a_chunk(identity: Identity) -> None:
    def keys(*pictures: str) -> list[bytes]:
        features = [
            SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=100 + 300 * i, length=40))
            for i, name in enumerate(pictures)
        ]
        asked = request(mm_features=features)
        return KeyChain(known(identity, asked), 256, identity.extras(asked, 256)).extend([7] * 1024)

    picture = {"cat": "ca" * 32, "dog": "d0" * 32}
    cat, dog, cat_dog = keys(picture["cat"]), keys(picture["dog"]), keys(*picture.values())
    assert not set(cat) & set(dog)
    assert cat[0] == cat_dog[0]  # the second picture begins in the second chunk
    assert not set(cat[1:]) & set(cat_dog[1:])


@pytest.mark.parametrize("name", ["renderer0-mm-7-image-0", "my-cat", "", "a" * 63])
def test_an_item_whose_name_is_no_hash_of_its_content_is_not_cached(identity: Identity, name: str) -> None:
    feature = SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=0, length=40))
    with pytest.raises(UnsupportedModel, match="no hash of an item's content"):
        identity.extras(request(mm_features=[feature]), 256)


@pytest.mark.parametrize("name", ["0f" * 32, "adapter:" + "0f" * 32, "0f" * 64])
def test_an_item_named_by_its_content_is_part_of_the_key(identity: Identity, name: str) -> None:
    feature = SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=0, length=40))
    assert identity.extras(request(mm_features=[feature]), 256)


def test_an_id_that_was_another_adapters_is_not_cached(identity: Identity, tmp_path: Path) -> None:
    """The engine goes on answering with the one that it has loaded under that id."""
    first, second = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 2)
    second.lora_int_id = first.lora_int_id
    assert known(identity, request(lora_request=first))
    with pytest.raises(UnsupportedModel, match="in the place of another one"):
        identity.namespace(request(lora_request=second))
    second.lora_int_id = next(_IDS)
    assert known(identity, request(lora_request=second))


def test_an_adapter_loaded_in_place_is_not_cached(identity: Identity, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "one", 1)
    lora.load_inplace = True
    with pytest.raises(UnsupportedModel, match="in the place of another one"):
        identity.namespace(request(lora_request=lora))


def test_what_the_engine_does_not_read_is_not_looked_at(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = content(folder)
    (folder / "gone.json").symlink_to(tmp_path / "nowhere")
    (folder / "round.json").symlink_to(folder / "round.json")
    (folder / "onnx.bin").mkdir()
    os.mkfifo(folder / "pipe.json")
    assert content(folder) == before


def test_a_date_in_the_future_is_no_change(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    tomorrow = time.time() + 86_400
    os.utime(folder / "model.safetensors", (tomorrow, tomorrow))
    files = weight_files(folder)
    assert changed_since(files, time.time() + 1) == []
    assert changed_since(files, 0.0) == ["model.safetensors"]
