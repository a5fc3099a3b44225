"""What the demo measured: the table that people read, and the figures that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from kvstrata.controller.demo.client import Answer
from kvstrata.controller.demo.run import Outcome, Way
from kvstrata.controller.results import Figure

_GOAL_RATIO = "<= 0.25"

# Each way with its name in the table and the way whose time it is compared with.
_ROWS: tuple[tuple[Way, str, Way], ...] = (
    (Way.COLD, "cold", Way.COLD),
    (Way.GPU, "GPU prefix hit", Way.COLD),
    (Way.HOST, "host hit, after eviction", Way.COLD),
    (Way.RESTART, "host hit, after engine restart", Way.COLD),
    (Way.SECOND_COLD, "cold, second engine", Way.SECOND_COLD),
    (Way.SECOND, "host hit, second engine", Way.SECOND_COLD),
)
_HEADS = ("", "TTFT", "of cold", "prompt", "computed", "loaded", "as plain vLLM")
_LOADING = (Way.HOST, Way.RESTART, Way.SECOND)


def ttft_s(answers: Sequence[Answer]) -> float:
    """The median time to the first token."""
    return median(answer.ttft_s for answer in answers)


def figures(outcome: Outcome) -> list[Figure]:
    """What is kept of a demo."""
    found = [
        Figure("demo.outputs_equal", all(map(all, outcome.as_plain.values())), "", "== true"),
        Figure("demo.negative_control_differs", control_differs(outcome), "", "== true"),
        Figure("demo.all_hits", all_hit(outcome), "", "== true"),
        Figure("demo.check_problems", len(outcome.check_problems), "", "== 0"),
        Figure("demo.cold_ttft_ms", round(1e3 * ttft_s(outcome.answers[Way.COLD]), 1), "ms"),
    ]
    for way, _, base in _ROWS:
        if way is not base:
            ratio = ttft_s(outcome.answers[way]) / ttft_s(outcome.answers[base])
            goal = _GOAL_RATIO if way in _LOADING else None
            found.append(Figure(f"demo.{way.value}_ttft_ratio", round(ratio, 4), "", goal))
    return found


def control_differs(outcome: Outcome) -> bool:
    """Whether zeros, which were loaded, changed every answer."""
    loaded = all(answer.loaded_tokens for answer in outcome.zeroed)
    return loaded and not any(outcome.zeroed_as_plain)


def all_hit(outcome: Outcome) -> bool:
    """Whether every prompt that should have been loaded was, none of it from the engine's own cache."""
    return all(
        answer.loaded_tokens and not answer.gpu_hit_tokens
        for way in _LOADING
        for answer in outcome.answers[way]
    )


def samples(outcome: Outcome) -> dict[str, Any]:
    """Every measurement that the figures were made of."""
    kept: dict[str, Any] = {}
    for way, answers in outcome.answers.items():
        kept[way.value] = {
            "ttft_ms": [round(1e3 * answer.ttft_s, 1) for answer in answers],
            "prompt_tokens": [answer.prompt_tokens for answer in answers],
            "gpu_hit_tokens": [answer.gpu_hit_tokens for answer in answers],
            "loaded_tokens": [answer.loaded_tokens for answer in answers],
            "equal_to_plain": outcome.as_plain[way],
        }
    kept["zeroed_loads"] = {
        "loaded_tokens": [answer.loaded_tokens for answer in outcome.zeroed],
        "tokens_equal_to_plain": outcome.zeroed_as_plain,
    }
    return kept


def table(outcome: Outcome) -> str:
    """The table at the end, with what it means under it."""
    rows = [_HEADS, *(_row(outcome, way, name, base) for way, name, base in _ROWS)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *_notes(outcome)])


def _row(outcome: Outcome, way: Way, name: str, base: Way) -> tuple[str, ...]:
    answers, equal = outcome.answers[way], outcome.as_plain[way]
    own = ttft_s(answers)
    return (
        name,
        f"{1e3 * own:,.0f} ms",
        f"{own / ttft_s(outcome.answers[base]):.2f}",
        *(
            f"{median(counts):,.0f}"
            for counts in (
                [answer.prompt_tokens for answer in answers],
                [answer.computed_tokens for answer in answers],
                [answer.loaded_tokens for answer in answers],
            )
        ),
        "yes" if all(equal) else f"NO ({equal.count(False)} of {len(equal)})",
    )


def _notes(outcome: Outcome) -> list[str]:
    count = len(outcome.answers[Way.COLD])
    notes = [
        f"Medians of {count} documents of one long prompt each, another question every time; tokens are "
        "prompt tokens.",
        "As plain vLLM: the same tokens and logprobs, bit for bit, as without kvstrata.",
    ]
    missed = [figure.name for figure in figures(outcome) if figure.goal == _GOAL_RATIO and not figure.met]
    verdict = f"missed by {', '.join(missed)}" if missed else "met"
    notes.append(f"Goal for host hits, {_GOAL_RATIO} of cold: {verdict}.")
    if control_differs(outcome):
        notes.append("Negative control: an engine that loads zeros instead gave other answers, every time.")
    else:
        notes.append("NEGATIVE CONTROL FAILED: an engine that loads zeros gave the right answers.")
    if not all_hit(outcome):
        notes.append("MISSES: not every prompt that the host tier has was loaded from it.")
    notes += [f"CHECK: {problem}" for problem in outcome.check_problems]
    return notes
