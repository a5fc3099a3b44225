"""The command line, with real node stores: what it prints, how it exits, and that errors are sentences."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvstrata.controller import cli, cli_node
from kvstrata.controller.client import NodeClient
from kvstrata.controller.demo import command, engines
from kvstrata.controller.demo.document import QUESTIONS, documents
from kvstrata.controller.demo.engines import EngineFailed, Fleet
from kvstrata.controller.demo.progress import Progress
from kvstrata.controller.paths import RuntimePaths
from kvstrata.controller.results import TABLE_BEGIN, TABLE_END, Figure, measured
from kvstrata.core.catalogue import State
from kvstrata.core.config import build_config

KVSTRATA = [sys.executable, "-m", "kvstrata.controller.cli"]
START_S = 20.0


def wait_until(true: Any, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not true():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.05)


def answers(folder: Path) -> bool:
    try:
        cli_node.stats(RuntimePaths(folder))
    except cli_node.NodeUnavailable:
        return False
    return True


@pytest.fixture
def node(runtime_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`kvstrata node` in the foreground, in `runtime_dir`."""
    process = subprocess.Popen(
        [*KVSTRATA, "node", "--runtime-dir", str(runtime_dir)], stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: answers(runtime_dir), "the node store answers")
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    status = cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


# ------------------------------------------------------------------------------------------ itself


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom kvstrata.controller import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'grpc', 'torch', 'yaml', 'vllm'} & set(sys.modules)))"
    )
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        taken.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("demo", "node", "check", "stats", "results"))
    assert min(taken) < 0.3


def test_the_console_script_is_this_program() -> None:
    script = Path(sys.executable).with_name("kvstrata")
    if not script.exists():
        pytest.skip("kvstrata is not installed here")
    told = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert told.startswith("kvstrata ")


# ----------------------------------------------------------------------------- node, check and stats


def test_a_running_node_store_is_asked_checked_and_ended(
    node: subprocess.Popen[bytes], runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--runtime-dir", runtime_dir)
    status, text, _ = run(capsys, "node", "--status", *where)
    assert status == 0
    assert f"node store {node.pid} in {runtime_dir}" in text
    assert run(capsys, "check", *where) == (
        0,
        f"the books of the node store in {runtime_dir} are right\n",
        "",
    )
    assert json.loads(run(capsys, "check", "--json", *where)[1]) == {"problems": []}
    tree = json.loads(run(capsys, "stats", "--json", *where)[1])
    assert tree["pid"] == node.pid
    assert tree["pool"]["configured_bytes"] > 0

    status, _, error = run(capsys, "node", *where)
    assert status == 1
    assert f"node store {node.pid} runs in {runtime_dir} already" in error

    assert run(capsys, "node", "--stop", *where)[0] == 0
    assert node.wait(START_S) == 0
    status, _, error = run(capsys, "node", "--status", *where)
    assert status == 2
    assert "name that folder with --runtime-dir" in error


def test_stats_are_told_in_plain_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    tree: dict[str, Any] = {
        "pid": 7,
        "pool": {"made_bytes": 1 << 30, "configured_bytes": 4 << 30, "slots": 1000, "slots_free": 700},
        "chunks": {"ready": 298, "reserved": 2, "evicting": 0, "quarantined": 0},
        "clients": [{"id": "e1", "leases": 1, "jobs": 2, "overdue_slots": 0, "stopped": True}],
        "counters": {
            "lookups": 12,
            "lookup_chunks": 80,
            "hit_chunks": 50,
            "committed_chunks": 3200,
            "evicted_chunks": 20,
            "refused_full": 5,
            "reclaimed_claims": 3,
        },
    }
    monkeypatch.setattr(cli_node, "stats", lambda paths: tree)
    where = ("--runtime-dir", runtime_dir)
    assert run(capsys, "stats", *where)[1].splitlines() == [
        f"node store 7 in {runtime_dir}",
        "  pool      1.0 GiB of up to 4.0 GiB taken (25%), 300 of 1,000 slots in use (30%)",
        "  chunks    298 stored, 2 being written",
        "  lookups   12 since the start, 50 of 80 chunks found in the pool (62%)",
        "  saves     3,200 chunks saved since the start, 20 evicted, 5 refused for want of room",
        "  also      3 reclaimed claims",
        "  engines   1",
        "    e1: 2 jobs, 1 leases, 0 overdue slots, stopped",
    ]
    assert json.loads(run(capsys, "stats", "--json", *where)[1]) == {"folder": str(runtime_dir), **tree}


def test_a_new_node_store_has_stats(
    node: subprocess.Popen[bytes], runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, _ = run(capsys, "stats", "--runtime-dir", runtime_dir)
    assert status == 0
    assert "lookups   0 since the start, 0 of 0 chunks found in the pool\n" in text
    assert "saves     0 chunks saved since the start\n" in text
    assert "also" not in text


def test_every_state_of_a_chunk_has_a_word() -> None:
    assert set(cli_node._STATES) == {state.value for state in State}


def test_a_node_store_in_use_ends_only_by_force(
    node: subprocess.Popen[bytes], runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"node": {"runtime_dir": str(runtime_dir), "autostart": False}}
    engine = NodeClient(build_config(("test", tree)), "an engine", (1 << 20,), 1)
    wait_until(lambda: engine.session, "the engine is served")
    status, _, error = run(capsys, "node", "--stop", "--runtime-dir", runtime_dir)
    assert status == 1
    assert "engines are connected" in error
    assert node.poll() is None
    assert run(capsys, "node", "--stop", "--force", "--runtime-dir", runtime_dir)[0] == 0
    assert node.wait(START_S) == 0
    engine.close()


def test_problems_are_printed_and_exit_with_1(
    node: subprocess.Popen[bytes],
    runtime_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_node, "problems", lambda paths: ["slot 0+0x0 has 2 owners"])
    assert run(capsys, "check", "--runtime-dir", runtime_dir) == (1, "slot 0+0x0 has 2 owners\n", "")


@pytest.mark.parametrize("what", [["check"], ["stats"], ["node", "--stop"], ["node", "--status"]])
def test_without_a_node_store_the_exit_status_is_2(
    what: list[str], runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, error = run(capsys, *what, "--runtime-dir", runtime_dir)
    assert (status, out) == (2, "")
    assert error.startswith(f"kvstrata {what[0]}: no node store runs in {runtime_dir}: ")
    assert error.count("\n") == 1


def test_a_socket_that_nobody_serves_is_no_node_store(
    node: subprocess.Popen[bytes], runtime_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node.kill()
    node.wait()
    assert RuntimePaths(runtime_dir).control.exists()
    assert run(capsys, "check", "--runtime-dir", runtime_dir)[0] == 2


def test_a_stopped_node_store_is_given_up_and_can_still_be_ended(
    node: subprocess.Popen[bytes],
    runtime_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_node, "_ANSWER_S", 0.3)
    node.send_signal(signal.SIGSTOP)
    status, _, error = run(capsys, "stats", "--runtime-dir", runtime_dir)
    assert status == 2
    assert "did not answer" in error
    cli_node.end_node_store(RuntimePaths(runtime_dir))
    assert node.wait(START_S) == -signal.SIGKILL


def test_the_configuration_comes_from_the_flag_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("host: {size: 1GiB}\nnode: {runtime_dir: /somewhere/else}\n")
    second.write_text("host: {size: 2GiB}\n")
    monkeypatch.setenv("KVSTRATA_CONFIG", str(second))
    assert cli_node.load_config(None, None).host.size == 2 << 30
    config = cli_node.load_config(first, str(runtime_dir))
    assert config.host.size == 1 << 30
    assert config.node.runtime_dir == str(runtime_dir)
    monkeypatch.delenv("KVSTRATA_CONFIG")
    assert cli_node.load_config(None, None) == cli_node.Config()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("host: {sise: 1GiB}", "did you mean host.size?"),
        ("host: [", "is not YAML"),
        ("- a\n- b", "it has sections"),
        ("host.size: 8GiB", "write it as host: {size: 8GiB}"),
        ("host:\n  size: 1GiB\n  size: 2GiB", "in line 2 and in line 3: keep one of them"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_configuration_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, says: str
) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    status, _, error = run(capsys, "node", "--config", path)
    assert status == 1
    assert says in error
    assert "bad.yaml" in error
    assert "Traceback" not in error


def test_a_pool_larger_than_the_machine_is_one_sentence(tmp_path: Path, runtime_dir: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("host: {size: 64TiB}")
    command = [*KVSTRATA, "node", "--config", str(path), "--runtime-dir", str(runtime_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("kvstrata node: host.size is 64.0 TiB, and this machine")
    assert done.stderr.count("\n") == 1


def test_a_folder_open_to_others_is_refused(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime_dir.chmod(0o755)
    status, _, error = run(capsys, "check", "--runtime-dir", runtime_dir)
    assert status == 2
    assert f"chmod 700 {runtime_dir}" in error


# ---------------------------------------------------------------------------------------- results


def test_results_are_printed_with_missed_goals_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [Figure("a.without", 3.0), Figure("a.met", 1.0, "ms", "<= 2"), Figure("a.missed", 3, "", "< 3")]
    measured("a", "python benches/a.py", figures).write(tmp_path / "a.json")
    status, text, _ = run(capsys, "results", "--results", tmp_path)
    assert status == 0
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["missed", "a.missed"],
        ["met", "a.met"],
        ["a.without", "3"],
    ]
    tree = json.loads(run(capsys, "results", "--json", "--results", tmp_path)[1])
    assert [figure["met"] for figure in tree[0]["figures"]] == [None, True, False]


def test_the_readme_is_rewritten_checked_and_left_alone_when_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, kept = tmp_path / "README.md", tmp_path / "kept"
    readme.write_text(f"before\n{TABLE_BEGIN}\n{TABLE_END}\nafter\n")
    measured("a", "python benches/a.py", [Figure("a.b", 1.0, "ms", "<= 2")]).write(kept / "a.json")
    arguments = ("results", "--results", kept, "--readme", readme)
    status, _, error = run(capsys, *arguments, "--check")
    assert status == 1
    assert "out of date" in error
    assert run(capsys, *arguments) == (0, "", "")
    written = readme.read_text()
    assert "`a.b`" in written
    stamp = readme.stat().st_mtime_ns
    assert run(capsys, *arguments)[0] == run(capsys, *arguments, "--check")[0] == 0
    assert (readme.read_text(), readme.stat().st_mtime_ns) == (written, stamp)


def test_results_errors_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("no markers\n")
    for arguments, says in (
        (("--results", tmp_path / "none"), "there is no folder"),
        (("--results", tmp_path, "--readme", tmp_path / "none.md"), "none.md cannot be read"),
        (("--results", tmp_path, "--readme", tmp_path / "README.md"), TABLE_BEGIN),
    ):
        status, _, error = run(capsys, "results", *arguments)
        assert status == 1
        assert says in error


# ----------------------------------------------------------------- the demo, as far as it needs no vLLM


def test_the_demo_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    status, _, error = run(capsys, "demo")
    assert status == 1
    assert "`make demo`" in error
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    status, _, error = run(capsys, "demo", "--model", tmp_path)
    assert status == 1
    assert "holds no model" in error


class FakeEngines(Fleet):
    """Runs `program` instead of vLLM."""

    program = ""

    def _command(self, port: int, connector: str) -> list[str]:
        return [sys.executable, "-c", self.program]


def test_an_engine_that_fails_is_shown_with_the_end_of_its_log(runtime_dir: Path) -> None:
    FakeEngines.program = "import sys; print('no such model'); sys.exit(3)"
    with FakeEngines(runtime_dir, runtime_dir, False, None) as fleet:
        engine = fleet.start("plain vllm", engines.PLAIN, seat=0)
        with pytest.raises(EngineFailed, match="ended with status 3 before it was ready") as failed:
            fleet.wait_ready([engine], lambda _: None)
    assert "no such model" in str(failed.value)
    assert str(runtime_dir) in str(failed.value)


def test_the_fleet_ends_engines_that_do_not_want_to_and_their_children(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_LEAVE_S", 0.5)
    FakeEngines.program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)\n"
    )
    with pytest.raises(KeyboardInterrupt), FakeEngines(runtime_dir, runtime_dir, False, None) as fleet:
        engine = fleet.start("deaf", engines.PLAIN, seat=0)
        wait_until(lambda: engine.log.read_text().strip(), "it has started its child")
        raise KeyboardInterrupt
    pids = [engine.process.pid, int(engine.log.read_text())]
    wait_until(lambda: not any(map(is_running, pids)), "they have ended")


def test_what_an_engine_started_may_still_clean_up_after_it(runtime_dir: Path) -> None:
    """Python's resource tracker gives shared memory back when the processes that used it have ended."""
    left = runtime_dir / "shared memory"
    left.touch()
    tracker = f"import os, sys, time; sys.stdin.read(); time.sleep(0.3); os.remove({str(left)!r})"
    FakeEngines.program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {tracker!r}], stdin=subprocess.PIPE)\n"
        "print('up', flush=True); time.sleep(600)\n"
    )
    with FakeEngines(runtime_dir, runtime_dir, False, None) as fleet:
        engine = fleet.start("tidy", engines.PLAIN, seat=0)
        wait_until(lambda: engine.log.read_text() == "up\n", "it has started its child")
    assert not left.exists()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_engines_see_nothing_of_the_users_configuration(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_CONFIG", "/a/file/of/mine.yaml")
    fleet = Fleet(runtime_dir, runtime_dir, False, 9000)
    assert "KVSTRATA_CONFIG" not in fleet._environment(0)
    words = fleet._command(fleet._port(), engines.KVSTRATA)
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["node"]["runtime_dir"] == str(runtime_dir / "node")
    assert "--kv-transfer-config" not in fleet._command(fleet._port(), engines.PLAIN)
    assert (words[words.index("--port") + 1], fleet._port()) == ("9000", 9002)


def test_what_engines_leave_in_their_temporary_folder_goes_with_the_fleet(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_s = runtime_dir / ("x" * 100)
    user_s.mkdir()
    monkeypatch.setenv("TMPDIR", str(user_s))
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(user_s))
    FakeEngines.program = (  # the name of a socket of vLLM's
        "import os, socket, tempfile, time, uuid\n"
        "base = os.environ.get('VLLM_RPC_BASE_PATH', tempfile.gettempdir())\n"
        "socket.socket(socket.AF_UNIX).bind(f'{base}/{uuid.uuid4()}')\n"
        "print('bound', flush=True); time.sleep(600)\n"
    )
    folder = runtime_dir / "demo"
    folder.mkdir()
    with FakeEngines(runtime_dir, folder, False, None) as fleet:
        engine = fleet.start("littering", engines.PLAIN, seat=0)
        wait_until(lambda: engine.log.read_text() == "bound\n", "it has left a socket")
        assert len(list((folder / "tmp").iterdir())) == 1
    assert list(folder.iterdir()) == [engine.log]
    assert list(user_s.iterdir()) == []


def test_two_seats_have_equally_many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, seats in (
        ({0}, ([0], [0])),
        ({0, 1}, ([0], [1])),
        ({2, 4, 6, 8, 9}, ([2, 4], [8, 9])),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        assert engines._seats() == seats


def test_no_two_documents_begin_alike() -> None:
    texts = [document.text for document in documents(20)]
    assert len({text.splitlines()[0] for text in texts}) == 20
    assert texts == [document.text for document in documents(20)]
    assert len(set(QUESTIONS)) == len(QUESTIONS)


def test_progress_is_plain_lines_where_nobody_can_redraw() -> None:
    out = io.StringIO()
    progress = Progress(2, out)
    with progress.stage("first", 3):
        progress.step()
        progress.step(0)
    with pytest.raises(ValueError), progress.stage("second"):
        raise ValueError
    assert out.getvalue() == "[1/2] first ... 0 s\n[2/2] second ...\n"


def test_progress_is_redrawn_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with (progress := Progress(1, out)).stage("first", 2):
        progress.step()
    frames = out.getvalue().split("\r\x1b[K")
    assert frames[1].startswith("[1/1] first ############............")
    assert frames[-1] == "[1/1] first: 0 s\n"
