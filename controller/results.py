"""Measured results: one envelope for every bench, and the table of them that the README shows.

Rule of this file: a figure says what it should be, and whether it is follows from that; nobody
writes "met" by hand. A result is whole on disk or not there.
"""

from __future__ import annotations

import json
import operator
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from kvstrata.core.errors import KVStrataError

Value = bool | float

TABLE_BEGIN = "<!-- results: written by `kvstrata results --readme`, not by hand -->"
SHORT_BEGIN = "<!-- results, the main ones: written by `kvstrata results --readme`, not by hand -->"
TABLE_END = "<!-- results end -->"

_PACKAGES = ("kvstrata", "vllm", "torch")  # whose versions a result names, where installed
_KEYS = {"bench", "command", "device", "versions", "date", "figures", "samples"}
_FIGURE_KEYS = {"name", "value", "unit", "goal", "met"}
_GOAL = re.compile(r"^(<=|>=|==|<|>) (true|false|[0-9.]+(?:e[+-]?[0-9]+)?)$")
_COMPARE: dict[str, Callable[[Value, Value], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_GPU_NAME_DEADLINE_S = 60.0


class ResultError(KVStrataError):
    """A result, or a file that should hold one or show one, is not as it should be."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number, or a yes or no. `goal` is such as "<= 0.25" or "== true"; None if it has none."""

    name: str  # "<bench>.<what>", unit last where it is part of the name
    value: Value
    unit: str = ""
    goal: str | None = None

    def __post_init__(self) -> None:
        if self.goal is not None:
            _parse_goal(self.goal)

    @property
    def met(self) -> bool | None:
        """Whether the value is as its goal says; None without a goal."""
        if self.goal is None:
            return None
        compare, wanted = _parse_goal(self.goal)
        return compare(self.value, wanted)

    def as_tree(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "goal": self.goal,
            "met": self.met,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of one bench measured, and on what. `samples` is what the figures were made of."""

    bench: str
    command: str  # what a reader types to repeat it
    device: str
    versions: Mapping[str, str]
    date: str  # UTC, ISO 8601
    figures: tuple[Figure, ...]
    samples: Mapping[str, Any] = field(default_factory=dict)

    def as_tree(self) -> dict[str, Any]:
        """The envelope as plain data, in the order in which it is written."""
        return {
            "bench": self.bench,
            "command": self.command,
            "device": self.device,
            "versions": dict(self.versions),
            "date": self.date,
            "figures": [figure.as_tree() for figure in self.figures],
            "samples": dict(self.samples),
        }

    def write(self, path: Path) -> None:
        """Replace `path` in one step. Raises ResultError if it cannot be written."""
        text = json.dumps(self.as_tree(), indent=1, allow_nan=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)
        except OSError as error:
            raise ResultError(f"the result cannot be written to {path}: {error.strerror}") from error


def measured(
    bench: str, command: str, figures: Iterable[Figure], samples: Mapping[str, Any] | None = None
) -> Result:
    """The result of a run that has just ended on this machine."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Result(bench, command, device(), versions(), date, tuple(figures), samples or {})


def read(path: Path) -> Result:
    """The result kept in `path`.

    Raises:
        ResultError: says which file, and what is wrong with it.
    """
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from error
    try:
        return _parse(tree)
    except ValueError as error:
        raise ResultError(f"{path} is not a result: {error}; run its bench again") from error


def read_all(folder: Path) -> list[Result]:
    """Every result kept in `folder`, by name of its file. Raises ResultError."""
    if not folder.is_dir():
        raise ResultError(f"there is no folder {folder}: name the one with the results with --results")
    return [read(path) for path in sorted(folder.glob("*.json"))]


# ------------------------------------------------------------------------------------ reading a tree


def _parse(tree: Any) -> Result:
    """Raises ValueError for anything that `as_tree` does not make."""
    _check_keys("it", tree, _KEYS)
    texts = {name: tree[name] for name in ("bench", "command", "device", "date")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r}")
    for name in ("versions", "samples"):
        if not isinstance(tree[name], dict):
            raise ValueError(f"{name} is {tree[name]!r}")
    if not isinstance(tree["figures"], list):
        raise ValueError(f"figures is {tree['figures']!r}")
    figures = tuple(_parse_figure(figure) for figure in tree["figures"])
    return Result(**texts, versions=tree["versions"], figures=figures, samples=tree["samples"])


def _parse_figure(tree: Any) -> Figure:
    _check_keys("a figure", tree, _FIGURE_KEYS)
    name, value, unit, goal = (tree[key] for key in ("name", "value", "unit", "goal"))
    if not isinstance(name, str) or not isinstance(unit, str) or not isinstance(goal, str | None):
        raise ValueError(f"figure {name!r} has unit {unit!r} and goal {goal!r}")
    if not isinstance(value, bool | int | float):
        raise ValueError(f"figure {name} has value {value!r}")
    figure = Figure(name, value, unit, goal)
    if tree["met"] != figure.met:
        raise ValueError(f"figure {name} says met: {tree['met']!r}, its value and goal say {figure.met!r}")
    return figure


def _check_keys(what: str, tree: Any, wanted: set[str]) -> None:
    if not isinstance(tree, dict):
        raise ValueError(f"{what} is {type(tree).__name__}, expected an object")
    if set(tree) != wanted:
        odd = ", ".join(sorted(map(str, set(tree) ^ wanted)))
        raise ValueError(f"{what} lacks or should not have: {odd}")


def _parse_goal(goal: str) -> tuple[Callable[[Value, Value], bool], Value]:
    found = _GOAL.match(goal)
    if found is None:
        raise ValueError(f'goal {goal!r} is not such as "<= 0.25" or "== true"')
    number = found[2]
    return _COMPARE[found[1]], number == "true" if number in ("true", "false") else float(number)


# ------------------------------------------------------------------------- what it was measured on


def device() -> str:
    """Processor and, where PyTorch sees one, GPU: for people who compare."""
    names = Counter(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    processor = next(iter(names), platform.machine())
    count = sum(names.values()) or os.cpu_count() or 1
    text = f"{processor}, {count} core{'s' if count > 1 else ''}"
    return f"{text}, {gpu}" if (gpu := _gpu_name()) else text


def _gpu_name() -> str:
    """Asked in a process of its own: importing PyTorch takes seconds and a GPU's memory."""
    if not Path("/dev/nvidiactl").exists():
        return ""
    program = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=_GPU_NAME_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Python, kvstrata and, where installed, what it was measured with."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# ------------------------------------------------------------------------------------ for people


def readable(value: Value, digits: int = 3) -> str:
    """A figure's value with three digits that matter, e.g. 0.127, 1.38, 1,240,000, yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def markdown_table(results: Iterable[Result]) -> str:
    """All figures with their goals, and under the table how to repeat them and on what they were taken."""
    lines = ["| figure | measured | goal | met |", "|---|---:|---:|---|"]
    devices: dict[str, list[str]] = {}
    for result in results:
        lines += [_row(f"`{figure.name}`", figure) for figure in result.figures]
        on = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        devices.setdefault(f"{result.device}; {on}", []).append(f"`{result.command}` ({result.date[:10]})")
    for where, commands in devices.items():
        lines += ["", f"Measured on {where}: {', '.join(commands)}."]
    return "\n".join(lines)


def short_table(results: Iterable[Result], sections: Mapping[str, Mapping[str, str]]) -> str:
    """The figures that `sections` name, each in words, and how many of all goals are met.

    Args:
        results: all that are kept.
        sections: figures' names to words, under the heading of each section.
    """
    figures = {figure.name: figure for result in results for figure in result.figures}
    goals = [figure.met for figure in figures.values() if figure.met is not None]
    lines = []
    for heading, words in sections.items():
        lines += [f"| {heading} | measured | goal | met |", "|---|---:|---:|---|"]
        lines += [_row(text, figures[name]) for name, text in words.items() if name in figures] + [""]
    return "\n".join([*lines, f"{goals.count(True)} of {len(goals)} goals are met."])


def _row(named: str, figure: Figure) -> str:
    hides = _goal_text(figure).endswith(f" {readable(figure.value)}")
    value = f"{readable(figure.value, 5 if hides else 3)} {figure.unit}".rstrip()
    met = {None: "", True: "yes", False: "**no**"}[figure.met]
    return f"| {named} | {value} | {_goal_text(figure)} | {met} |"


def _goal_text(figure: Figure) -> str:
    if figure.goal is None:
        return "–"
    sign, _, number = figure.goal.partition(" ")
    shown = {"true": "yes", "false": "no"}.get(number) or readable(float(number))
    return shown if sign == "==" else f"{sign.replace('<=', '≤').replace('>=', '≥')} {shown}"


def with_table(text: str, table: str, begin: str = TABLE_BEGIN) -> str:
    """`text` with `table` between the marker `begin` and the end.

    Raises:
        ResultError: the markers are missing, or more than one pair.
    """
    if text.count(begin) != 1 or text.count(TABLE_END) != 1:
        raise ResultError(f"the table's place is not marked once: put these lines in:\n{begin}\n{TABLE_END}")
    before, rest = text.split(begin)
    if TABLE_END not in rest:
        raise ResultError(f"the table's markers stand the wrong way round: {begin} comes first")
    after = rest.split(TABLE_END)[1]
    return f"{before}{begin}\n{table}\n{TABLE_END}{after}"


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one. Raises OSError."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
