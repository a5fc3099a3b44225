"""`kvstrata demo`, as a user runs it: hits in every way, right answers, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

DEMO = [sys.executable, "-m", "kvstrata.controller.cli", "demo"]
LOADING = ("host", "engine_restart", "second_engine")
WAIT_S = 60.0

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def environment(tmp_path: Path) -> dict[str, str]:
    """A home for the node store that an engine would use by default, to see that none does."""
    unwanted = ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | {"XDG_RUNTIME_DIR": str(tmp_path)}


@pytest.mark.timeout(1200)
def test_the_demo_loads_in_every_way_and_answers_as_plain_vllm_does(tmp_path: Path) -> None:
    kept = tmp_path / "demo.json"
    temporary = tmp_path / ("x" * 100)  # too long for a socket in it
    temporary.mkdir()
    done = subprocess.run(
        [*DEMO, "--quick", "--json", str(kept)],
        env=environment(tmp_path) | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "host hit, after eviction" in done.stdout
    result = json.loads(kept.read_text())
    figures = {figure["name"]: figure["value"] for figure in result["figures"]}
    assert figures["demo.outputs_equal"] is True
    assert figures["demo.negative_control_differs"] is True
    assert figures["demo.check_problems"] == 0
    for way in LOADING:
        sample = result["samples"][way]
        assert min(sample["loaded_tokens"]) >= 1280, way
        assert max(sample["gpu_hit_tokens"]) == 0, way
        assert figures[f"demo.{way}_ttft_ratio"] < 0.5, way  # 0.25 is the goal, on a machine of one's own
    assert min(result["samples"]["gpu_hit"]["gpu_hit_tokens"]) >= 1280
    assert min(result["samples"]["zeroed_loads"]["loaded_tokens"]) >= 1280
    assert max(result["samples"]["cold"]["loaded_tokens"]) == 0
    assert not (tmp_path / "kvstrata").exists()
    assert list(temporary.iterdir()) == []


@pytest.mark.timeout(300)
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        DEMO,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background ignores interrupts, and so would the demo.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert demo.stderr is not None
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + WAIT_S
        while len(started) < 4:  # two servers and what they start
            assert time.monotonic() < deadline, f"no engines: {started}"
            time.sleep(0.2)
            started = psutil.Process(demo.pid).children(recursive=True)
        temporary = Path(started[0].environ()["TMPDIR"])
        assert temporary.is_dir()
        demo.send_signal(signal.SIGINT)
        assert demo.wait(WAIT_S) == 130, demo.stderr.read()
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        assert not temporary.parent.exists()
    finally:
        end(demo, started)


def end(demo: subprocess.Popen[str], started: list[psutil.Process]) -> None:
    """However it was left. Its engines are in sessions of their own: a kill alone would leave them."""
    if demo.poll() is None:
        started = psutil.Process(demo.pid).children(recursive=True)
    demo.send_signal(signal.SIGINT)
    try:
        demo.communicate(timeout=WAIT_S)
    finally:
        for process in (*started, demo):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        demo.wait()
