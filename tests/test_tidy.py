"""Style as tests: rules about every source file, and proof that the checkers look at every room.

A rule is a function from a source to its faults. Each has a planted fault below that it must find,
so that a rule which silently stopped working does not pass for a tidy tree.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

import pytest

REPO = Path(__file__).resolve().parent.parent

# Who may import whom: the table of rooms, which the contracts in pyproject.toml must hold.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "storage_backends": {"core", "protos"},
    "cuda_ext": {"core"},
    "connector": {"core", "cuda_ext", "controller.client"},
    "controller": {"core", "storage_backends", "protos"},
    "protos": set(),
}
ROOMS = tuple(MAY_IMPORT)

MAX_FILE_LINES = 499
MAX_FUNCTION_LINES = 70
SOURCE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".proto"}
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")

# core is arithmetic on values handed to it: no clock, threads, network, files or processes.
NOT_IN_CORE = {
    *("asyncio", "concurrent", "ctypes", "fcntl", "glob", "http", "io", "mmap", "multiprocessing", "os"),
    *("pathlib", "queue", "sched", "select", "selectors", "shutil", "signal", "socket", "socketserver"),
    *("sqlite3", "ssl", "subprocess", "tempfile", "threading", "time", "urllib", "_thread"),
}
THIRD_PARTY_IN_CORE = {"blake3"}

# Spelled in two halves, or this file would be its own first fault.
UNFINISHED = re.compile(rf"\b({'TO' + 'DO'}|{'FIX' + 'ME'}|{'XX' + 'X'})\b")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|opt|root|home)/")

Fault = tuple[int, str]


@dataclass(frozen=True)
class Source:
    """One file of the repository, whose path is given from its root."""

    path: PurePosixPath
    text: str

    @property
    def top(self) -> str:
        return self.path.parts[0]

    @property
    def is_ours(self) -> bool:
        return self.path.suffix in SOURCE_SUFFIXES and not self.path.name.endswith(GENERATED)

    @property
    def is_product(self) -> bool:
        return self.is_ours and self.top in {*ROOMS, "src", "scripts"}

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of a Python file that is ours; none of any other."""
        return list(ast.walk(self.module)) if self.is_ours and self.path.suffix == ".py" else []

    @cached_property
    def module(self) -> ast.Module:
        return ast.parse(self.text)

    def calls(self, *names: str) -> Iterator[ast.Call]:
        for node in self.nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
                yield node

    def imports(self) -> Iterator[tuple[int, str]]:
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.lineno, "." * node.level + (node.module or "")


@cache
def sources() -> tuple[Source, ...]:
    """What git tracks or would track; without git (an sdist), every file outside hidden folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (REPO / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
        paths = [REPO / name for name in listed.split("\0") if name]
    else:
        paths = [
            path
            for path in REPO.rglob("*")
            if not any(
                part.startswith(".") or part in {"build", "dist"} for part in path.parts[len(REPO.parts) :]
            )
        ]
    found = []
    for path in sorted(paths):
        data = path.read_bytes() if path.is_file() else b"\0"
        if b"\0" not in data:  # neither a folder's symlink, nor removed, nor binary
            found.append(Source(PurePosixPath(path.relative_to(REPO)), data.decode()))
    return tuple(found)


# --------------------------------------------------------------------------------------------- rules


def short_file(source: Source) -> Iterator[Fault]:
    lines = source.text.count("\n")
    if source.is_ours and lines > MAX_FILE_LINES:
        yield lines, f"{lines} lines in one file"


def short_function(source: Source) -> Iterator[Fault]:
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines"


def module_docstring(source: Source) -> Iterator[Fault]:
    if source.nodes and source.module.body and not ast.get_docstring(source.module):
        yield 1, "no docstring that says what the module is for"


def narrow_except(source: Source) -> Iterator[Fault]:
    for node in source.nodes:
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = ast.unparse(node.type) if node.type else ""
        raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        if not caught or re.search(r"\bException\b", caught) or ("BaseException" in caught and not raises):
            yield node.lineno, "catches everything: name what can happen"


def no_code_from_data(source: Source) -> Iterator[Fault]:
    if source.is_product:
        for line, name in source.imports():
            if name.split(".")[0] in {"cloudpickle", "dill", "marshal", "pickle", "shelve"}:
                yield line, f"imports {name}"
        for call in source.calls("eval", "exec"):
            yield call.lineno, "runs data as code"


def no_attribute_probing(source: Source) -> Iterator[Fault]:
    if source.is_product and not (source.top == "connector" and source.path.name == "compat.py"):
        for call in source.calls("hasattr"):
            yield call.lineno, "hasattr: versions are told apart in a connector's compat.py"
        for call in source.calls("getattr"):
            if len(call.args) > 2:
                yield (
                    call.lineno,
                    "getattr with a default: versions are told apart in a connector's compat.py",
                )


def finished(source: Source) -> Iterator[Fault]:
    if source.is_ours:
        for number, line in enumerate(source.text.splitlines(), start=1):
            if found := UNFINISHED.search(line):
                yield number, f"{found.group()}: do it, or file an issue"


def measures(source: Source) -> bool:
    """Whether it is part of `kvstrata bench`, which lets time pass on purpose and tells what it sees."""
    return any(part.startswith("bench") for part in source.path.with_suffix("").parts)


def no_sleep(source: Source) -> Iterator[Fault]:
    if source.is_product and not measures(source):
        for call in source.calls("time.sleep", "sleep"):
            yield call.lineno, "sleeps: wait for an event with a deadline"


def no_print(source: Source) -> Iterator[Fault]:
    parts = source.path.with_suffix("").parts
    talks = parts[1:2] == ("cli",) or parts[-1].startswith(("cli", "demo", "__main__")) or "demo" in parts
    if (
        source.is_product
        and source.top != "scripts"
        and not (source.top == "controller" and talks)
        and not measures(source)
    ):
        for call in source.calls("print"):
            yield call.lineno, "prints: only the command line does"


def pure_core(source: Source) -> Iterator[Fault]:
    if source.top != "core":
        return
    for line, name in source.imports():
        package = name.split(".")[0]
        ours = name == "kvstrata.core" or name.startswith("kvstrata.core.")
        standard = package in sys.stdlib_module_names and package not in NOT_IN_CORE
        if not (ours or standard or package in THIRD_PARTY_IN_CORE):
            yield line, f"core imports {name}"
    for call in source.calls("open", "input", "datetime.now", "datetime.datetime.now", "datetime.utcnow"):
        yield call.lineno, "core does I/O or reads a clock"


def one_import_name(source: Source) -> Iterator[Fault]:
    for line, name in source.imports():
        if name.startswith(".") or name.split(".")[0] in ROOMS:
            yield line, f"imports {name or '.'}: say kvstrata.<room>"


def no_machine_path(source: Source) -> Iterator[Fault]:
    for number, line in enumerate(source.text.splitlines(), start=1):
        if found := MACHINE_PATH.search(line):
            yield number, f"a path of one machine: {found.group()}"


def no_unconditional_skip(source: Source) -> Iterator[Fault]:
    if source.top != "tests":
        return
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.skip":
            yield node.lineno, "always skipped: skipif with a reason, or remove the test"
    for statement in source.module.body if source.nodes else ():
        if isinstance(statement, ast.Expr) and ast.unparse(statement).startswith("pytest.skip("):
            yield statement.lineno, "the whole file is always skipped"


Rule = Callable[[Source], Iterator[Fault]]

# Each rule with a file that breaks it.
RULES: list[tuple[Rule, str, str]] = [
    (short_file, "cuda_ext/a.cu", "\n" * 500),
    (short_function, "core/a.py", "def f():\n" + "    pass\n" * 70),
    (module_docstring, "core/a.py", "x = 1\n"),
    (narrow_except, "tests/a.py", "try:\n    f()\nexcept (ValueError, Exception):\n    pass\n"),
    (narrow_except, "core/a.py", "try:\n    f()\nexcept:\n    raise\n"),
    (narrow_except, "core/a.py", "try:\n    f()\nexcept BaseException:\n    pass\n"),
    (no_code_from_data, "connector/a.py", "from pickle import loads\n"),
    (no_code_from_data, "connector/a.py", "eval('1')\n"),
    (no_attribute_probing, "connector/vllm/a.py", "hasattr(a, 'b')\n"),
    (no_attribute_probing, "core/compat.py", "getattr(a, 'b', None)\n"),
    (finished, "protos/a.proto", "// FIX" + "ME later\n"),
    (no_sleep, "controller/a.py", "import time\ntime.sleep(1)\n"),
    (no_print, "controller/node/a.py", "print(1)\n"),
    (pure_core, "core/a.py", "from time import monotonic\n"),
    (pure_core, "core/a.py", "import torch\n"),
    (pure_core, "core/a.py", "from kvstrata.controller import client\n"),
    (pure_core, "core/a.py", "open('a')\n"),
    (one_import_name, "tests/a.py", "from core.layout import Layout\n"),
    (one_import_name, "core/a.py", "from . import layout\n"),
    (no_machine_path, "docs/a.md", "see " + "/" + "opt/thing\n"),
    (no_unconditional_skip, "tests/a.py", "@pytest.mark.skip\ndef test(): ...\n"),
    (no_unconditional_skip, "tests/a.py", "pytest.skip('x', allow_module_level=True)\n"),
]
NAMES = sorted({rule.__name__ for rule, _, _ in RULES})


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_keeps_the_rule(name: str) -> None:
    rule = next(rule for rule, _, _ in RULES if rule.__name__ == name)
    faults = [f"{source.path}:{line}: {what}" for source in sources() for line, what in rule(source)]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(("rule", "path", "text"), RULES)
def test_a_rule_finds_a_planted_fault(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(PurePosixPath(path), text)))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (no_attribute_probing, "connector/vllm/compat.py", "hasattr(a, 'b')\n"),
        (no_attribute_probing, "core/a.py", "getattr(a, name)\n"),
        (no_print, "controller/cli.py", "print(1)\n"),
        (
            pure_core,
            "core/a.py",
            "import struct\nfrom blake3 import blake3\nfrom kvstrata.core import keys\n",
        ),
        (narrow_except, "core/a.py", "try:\n    f()\nexcept BaseException:\n    undo()\n    raise\n"),
        (no_unconditional_skip, "tests/a.py", "@pytest.mark.skipif(no_gpu, reason='x')\ndef test(): ...\n"),
        (short_file, "protos/kvstrata/v1/node_pb2.py", "\n" * 500),
    ],
)
def test_a_rule_lets_pass_what_is_allowed(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(Source(PurePosixPath(path), text)))


def test_the_rules_see_every_room() -> None:
    assert {*ROOMS, "src", "scripts", "tests"} <= {source.top for source in sources() if source.is_ours}


# ------------------------------------------------------------------------- the checkers see every room


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """The repository's packages, emptied, with its real configuration of the checkers."""
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "nothing.py").write_text('"""Nothing."""\n')
    package = tmp_path / "src" / "kvstrata"
    package.mkdir(parents=True)
    shutil.copy(REPO / "src" / "kvstrata" / "__init__.py", package)
    (package / "py.typed").touch()
    for room in ROOMS:
        for init in (REPO / room).rglob("__init__.py"):
            copy = tmp_path / init.relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
        (package / room).symlink_to(Path("..") / ".." / room)
    return tmp_path


def packages(skeleton: Path) -> list[Path]:
    """Every folder in which somebody may write a module."""
    folders = [init.parent for room in ROOMS for init in (skeleton / room).rglob("__init__.py")]
    generated = skeleton / "protos" / "kvstrata"
    return [folder for folder in folders if not folder.is_relative_to(generated)]


def check(skeleton: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=skeleton, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_mypy_and_pyright_find_a_type_error_in_every_room(skeleton: Path) -> None:
    mypy = ("-m", "mypy", "--no-color-output")
    pyright = ("-m", "pyright", "--outputjson", "--pythonpath", sys.executable)
    for command in (mypy, pyright):
        clean = check(skeleton, *command)
        assert clean.returncode == 0, clean.stdout + clean.stderr

    planted = [folder / "planted.py" for folder in packages(skeleton)]
    planted.append(skeleton / "scripts" / "planted.py")
    for path in planted:
        path.write_text('"""A fault."""\n\nnumber: int = "text"\n')

    told = check(skeleton, *mypy).stdout
    found = {
        (skeleton / line.split(":")[0]).resolve() for line in told.splitlines() if "[assignment]" in line
    }
    assert found == {path.resolve() for path in planted}, told

    report = json.loads(check(skeleton, *pyright).stdout)
    seen = {Path(fault["file"]).resolve() for fault in report["generalDiagnostics"]}
    assert seen == {path.resolve() for path in planted}, report


def lint_imports(skeleton: Path) -> subprocess.CompletedProcess[str]:
    # -S leaves out the editable install's import hook, which would answer with the real kvstrata.
    paths = [str(skeleton / "src"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    program = (
        f"import sys; sys.path[:0] = {paths!r}; from importlinter import cli; cli.lint_imports_command()"
    )
    return check(skeleton, "-S", "-c", program)


def test_import_linter_holds_the_table_of_rooms(skeleton: Path) -> None:
    (skeleton / "controller" / "client.py").touch()
    targets = {*ROOMS, "controller.client"}
    for room, allowed in MAY_IMPORT.items():
        lines = [f"import kvstrata.{target}\n" for target in sorted(allowed)]
        (skeleton / room / "allowed.py").write_text("".join(lines))
    kept = lint_imports(skeleton)
    assert kept.returncode == 0, kept.stdout + kept.stderr

    forbidden = [
        (room, target)
        for room, allowed in MAY_IMPORT.items()
        for target in sorted(targets - allowed)
        if target.split(".")[0] != room
    ]
    for room, target in forbidden:
        name = f"planted_{target.replace('.', '_')}.py"
        (skeleton / room / name).write_text(f"import kvstrata.{target}\n")
    broken = lint_imports(skeleton)
    told = " ".join(broken.stdout.split())  # it wraps lines to the terminal's width
    for room, target in forbidden:
        planted = f"kvstrata.{room}.planted_{target.replace('.', '_')} -> kvstrata.{target} (l.1)"
        assert planted in told, f"{planted}\n{broken.stdout}{broken.stderr}"
    assert broken.returncode != 0
