"""What the connector relies on is there, in the installed vLLM and in what the check would miss."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from scripts.check_vllm import BASE, problems


def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vLLM is not installed: run make setup"
    return Path(spec.origin).parent


def test_the_installed_vllm_has_all_that_the_connector_relies_on() -> None:
    assert problems(installed()) == []


def test_a_vllm_that_lost_something_is_found_out(tmp_path: Path) -> None:
    for file in ("v1/request.py", BASE):
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copy(installed() / file, tmp_path / file)
    request = tmp_path / "v1/request.py"
    request.write_text(request.read_text().replace("cache_salt", "tenant"))
    base = tmp_path / BASE
    base.write_text(base.read_text().replace("num_computed_tokens: int", "computed: int"))

    found = problems(tmp_path)

    assert "v1/request.py: Request has no cache_salt" in found
    assert any("get_num_new_matched_tokens" in problem for problem in found)
    assert "v1/outputs.py: no class KVConnectorOutput" in found
