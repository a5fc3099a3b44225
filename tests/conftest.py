"""What every test may use: the tiny model, a place for Unix sockets, the environment for engines."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# vLLM in the test's own process. Set here, before any test module imports torch or vllm, because both
# read some of these only once; one thread, because on a tiny model more are many times slower.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
HAS_GPU = Path("/dev/nvidiactl").exists()
if HAS_GPU:  # what is right must not depend on what else is in the batch
    os.environ["VLLM_BATCH_INVARIANT"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what this machine has not are skipped, and say so."""
    missing = {}
    if not HAS_GPU:
        missing["gpu"] = "no CUDA device"
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = "vLLM is not installed"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skipif(True, reason=reason))


def make_model(name: str, *options: str) -> Path:
    """The folder of a small Llama whose output depends on its KV; made once for this checkout."""
    folder = REPO / ".cache" / "models" / name
    script = str(REPO / "scripts" / "models.py")
    subprocess.run([sys.executable, script, "tiny", str(folder), *options], check=True)
    return folder


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return make_model("tiny")


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A folder whose path is short enough for a Unix socket (108 bytes), which `tmp_path` often is not."""
    folder = Path(tempfile.mkdtemp(prefix="kvs-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
