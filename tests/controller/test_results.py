"""Results: goals decide what is met, files are whole or refused, the README's table follows from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstrata.controller import cli_results, results
from kvstrata.controller.results import TABLE_BEGIN, TABLE_END, Figure, Result, ResultError, measured

README = f"# kvstrata\n\n{TABLE_BEGIN}\nold\n{TABLE_END}\n\nmore\n"


def a_result(*figures: Figure, bench: str = "pool") -> Result:
    found = figures or (Figure("pool.rss_over_configured", 1.01, "", "<= 1.05"),)
    return Result(
        bench, f"python benches/{bench}.py", "a processor, 2 cores", {"python": "3.11"}, "2026-01-02", found
    )


@pytest.mark.parametrize(
    ("value", "goal", "met"),
    [
        (0.25, "<= 0.25", True),
        (0.2501, "<= 0.25", False),
        (1e6, ">= 1e6", True),
        (999_999, ">= 1e6", False),
        (2, "< 2", False),
        (3, "> 2", True),
        (True, "== true", True),
        (False, "== true", False),
        (0, "== 0", True),
        (5, None, None),
    ],
)
def test_a_figure_meets_its_goal_or_not(value: float, goal: str | None, met: bool | None) -> None:
    assert Figure("a.b", value, "", goal).met is met


@pytest.mark.parametrize("goal", ["0.25", "<=0.25", "about 3", "<= ", "=> 3", "<= 1e"])
def test_a_goal_that_is_none_is_refused(goal: str) -> None:
    with pytest.raises(ValueError, match="is not such as"):
        Figure("a.b", 1.0, "", goal)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "pool.json"
    figures = [Figure("a.b", 1.5, "ms", "<= 2"), Figure("a.c", True, "", "== true"), Figure("a.d", 7)]
    result = measured("a", "python benches/a.py", figures, {"runs": [1, 2, 3]})
    result.write(path)
    assert results.read(path) == result
    assert list(path.parent.iterdir()) == [path]


def test_the_envelope_has_the_promised_fields(tmp_path: Path) -> None:
    measured("a", "c", [Figure("a.b", 3.0, "ms", "<= 2")]).write(tmp_path / "a.json")
    tree = json.loads((tmp_path / "a.json").read_text())
    assert set(tree) == {"bench", "command", "device", "versions", "date", "figures", "samples"}
    assert tree["figures"] == [{"name": "a.b", "value": 3.0, "unit": "ms", "goal": "<= 2", "met": False}]
    assert {"python", "kvstrata"} <= set(tree["versions"])
    assert "core" in tree["device"]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    a_result().write(path)
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        a_result(Figure("a.b", float("nan"))).write(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ResultError, match="cannot be written"):
        a_result().write(path / "below-a-file.json")


def broken(change: dict[str, Any], figure: dict[str, Any] | None = None) -> str:
    tree = a_result().as_tree() | change
    if figure is not None:
        tree["figures"] = [tree["figures"][0] | figure]
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        (broken({"extra": 1}), "extra"),
        (broken({"command": 7}), "command is 7"),
        (broken({"versions": []}), "versions"),
        (broken({"figures": {}}), "figures"),
        (broken({}, {"value": "1.01"}), "has value '1.01'"),
        (broken({}, {"goal": "near 1"}), "near 1"),
        (broken({}, {"goal": 3}), "goal 3"),
        (broken({}, {"met": False}), "says met: False, its value and goal say True"),
        (broken({}, {"colour": "red"}), "colour"),
    ],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=r"odd\.json") as refused:
        results.read(path)
    assert says in str(refused.value)


def test_results_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"none\.json cannot be read: No such file"):
        results.read(tmp_path / "none.json")
    with pytest.raises(ResultError, match="--results"):
        results.read_all(tmp_path / "nowhere")
    assert results.read_all(tmp_path) == []


def test_the_table_shows_values_goals_and_how_to_repeat_them() -> None:
    table = results.markdown_table(
        [
            a_result(Figure("a.ratio", 0.1274, "", "<= 0.25"), Figure("a.time_ms", 12.34, "ms")),
            a_result(Figure("b.keys", 5e5, "", ">= 1e6"), Figure("b.equal", True, "", "== true"), bench="b"),
        ]
    )
    assert "| `a.ratio` | 0.127 | ≤ 0.25 | yes |" in table
    assert "| `a.time_ms` | 12.3 ms | – |  |" in table
    assert "| `b.keys` | 500,000 | ≥ 1,000,000 | **no** |" in table
    assert "| `b.equal` | yes | yes | yes |" in table
    assert "Measured on a processor, 2 cores; python 3.11: `python benches/pool.py` (2026-01-02)" in table


def test_the_short_table_shows_the_main_figures_in_words_and_counts_every_goal() -> None:
    kept = [
        a_result(Figure("a.ratio", 0.1274, "", "<= 0.25"), Figure("a.time_ms", 12.34, "ms")),
        a_result(Figure("b.keys", 5e5, "", ">= 1e6"), bench="b"),
    ]
    sections = {"Here": {"a.ratio": "how long it takes"}, "There": {"b.none": "not measured yet"}}
    table = results.short_table(kept, sections)
    assert "| Here | measured | goal | met |" in table
    assert "| how long it takes | 0.127 | ≤ 0.25 | yes |" in table
    assert "not measured yet" not in table
    assert table.endswith("\n1 of 2 goals are met.")


def test_the_main_figures_are_all_kept() -> None:
    named = {name for words in cli_results._MAIN.values() for name in words}
    kept = results.read_all(Path(__file__).resolve().parents[2] / "docs" / "results")
    assert named <= {figure.name for result in kept for figure in result.figures}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12741, "0.127"), (1.3812, "1.38"), (2.0, "2"), (1234567.8, "1,234,568"), (False, "no"), (0, "0")],
)
def test_values_are_shown_with_the_digits_that_matter(value: float, text: str) -> None:
    assert results.readable(value) == text


def test_the_readme_is_changed_between_its_markers_only_and_once() -> None:
    table = results.markdown_table([a_result()])
    once = results.with_table(README, table)
    assert once.startswith(f"# kvstrata\n\n{TABLE_BEGIN}\n| figure")
    assert once.endswith(f"\n{TABLE_END}\n\nmore\n")
    assert "old" not in once
    assert results.with_table(once, table) == once


@pytest.mark.parametrize(
    "text", ["nothing", TABLE_BEGIN, README + README, f"{TABLE_END}\n{TABLE_BEGIN}"], ids=len
)
def test_a_readme_without_a_place_for_the_table_is_refused(text: str) -> None:
    with pytest.raises(ResultError, match="results"):
        results.with_table(text, "table")


def test_the_device_names_a_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_gpu_name", lambda: "A Fast GPU")
    assert results.device().endswith(", A Fast GPU")
    monkeypatch.setattr(results, "_gpu_name", lambda: "")
    assert results.device().split(", ")[-1].split()[1] in ("core", "cores")


def test_reading_results_needs_no_torch() -> None:
    program = "import sys, kvstrata.controller.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_kept_result_can_be_read() -> None:
    kept = results.read_all(Path(__file__).resolve().parents[2] / "docs" / "results")
    assert all(result.figures and result.command for result in kept)
