"""Fingerprints of weights and adapters: content, not names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvstrata.connector.vllm.identity import Identity
from kvstrata.connector.weights import fingerprint
from kvstrata.core.errors import UnsupportedModel
from kvstrata.core.keys import KeyChain


def model(folder: Path, change: Any = None, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(64, 512, generator=generator) for name in ("a", "b", "c")} | tensors
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_copy_elsewhere_is_the_same_model(tmp_path: Path) -> None:
    first = model(tmp_path / "one")
    shutil.copytree(first, tmp_path / "two")
    assert fingerprint(first) == fingerprint(tmp_path / "two")


def test_any_tensor_that_was_trained_further_is_another_model(tmp_path: Path) -> None:
    base = fingerprint(model(tmp_path / "base"))
    for name in ("a", "b", "c"):
        generator = torch.Generator().manual_seed(2)
        other = model(tmp_path / name, **{name: torch.randn(64, 512, generator=generator)})
        assert fingerprint(other) != base
    renamed = model(tmp_path / "renamed", d=torch.zeros(1))
    assert fingerprint(renamed) != base


def test_other_formats_are_sampled_all_over(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    data = bytearray(torch.randint(0, 255, (4 << 20,), dtype=torch.uint8).numpy().tobytes())
    first.write_bytes(data)
    data[: 1 << 20] = bytes(1 << 20)
    second.write_bytes(data)
    assert fingerprint(first) != fingerprint(second)


def test_weights_that_cannot_be_read_are_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"set identity\.model"):
        fingerprint(tmp_path)


def test_weights_that_are_being_written_are_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UnsupportedModel, match="header"):
        fingerprint(folder)


def request(**fields: Any) -> Any:
    plain: dict[str, Any] = {"lora_request": None, "cache_salt": None, "mm_features": []}
    return SimpleNamespace(**(plain | fields))


def adapter(folder: Path, seed: int, rank: int = 8) -> Any:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    generator = torch.Generator().manual_seed(seed)
    save_file({"lora": torch.randn(rank, 64, generator=generator)}, folder / "adapter_model.safetensors")
    return SimpleNamespace(lora_name=folder.name, lora_path=str(folder), lora_int_id=1)


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> Identity:
    model_of = SimpleNamespace(digest=bytes(32))
    monkeypatch.setattr("kvstrata.connector.vllm.identity.model_identity", lambda *_: model_of)
    return Identity(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]


def test_adapters_and_salts_have_namespaces_of_their_own(identity: Identity, tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    wider = adapter(tmp_path / "wider", 1, rank=16)
    same = adapter(tmp_path / "same", 1)
    spaces = [
        identity.namespace(request(**fields))
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
    assert identity.namespace(request(lora_request=same)) == spaces[2]  # content, not name


def test_an_adapter_that_changed_on_disk_is_not_cached_until_it_has_another_name(
    identity: Identity, tmp_path: Path
) -> None:
    lora = adapter(tmp_path / "lora", 1)
    before = identity.namespace(request(lora_request=lora))
    shutil.rmtree(tmp_path / "lora")
    adapter(tmp_path / "lora", 2)
    with pytest.raises(UnsupportedModel, match="has changed on disk"):  # vLLM may still serve the old one
        identity.namespace(request(lora_request=lora))
    lora.lora_int_id = 2
    assert identity.namespace(request(lora_request=lora)) != before


def test_an_adapter_that_cannot_be_read_is_refused(identity: Identity, tmp_path: Path) -> None:
    lora = SimpleNamespace(lora_name="gone", lora_path=str(tmp_path / "gone"), lora_int_id=1)
    with pytest.raises(UnsupportedModel, match=r"gone: no adapter_config\.json"):
        identity.namespace(request(lora_request=lora))


def test_two_pictures_at_one_place_never_share_a_chunk(identity: Identity) -> None:
    def keys(*pictures: str) -> list[bytes]:
        features = [
            SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=100 + 300 * i, length=40))
            for i, name in enumerate(pictures)
        ]
        asked = request(mm_features=features)
        return KeyChain(identity.namespace(asked), 256, identity.extras(asked, 256)).extend([7] * 1024)

    cat, dog, cat_dog = keys("cat"), keys("dog"), keys("cat", "dog")
    assert not set(cat) & set(dog)
    assert cat[0] == cat_dog[0]  # the second picture begins in the second chunk
    assert not set(cat[1:]) & set(cat_dog[1:])
