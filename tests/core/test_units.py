"""Sizes and times as people write them, and nothing that they might mean otherwise."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstrata.core.units import format_size, parse_size, parse_time


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        (" 1.5 KiB ", 1536),
        ("500MB", 500 * 10**6),
        ("1tb", 10**12),
        ("2TiB", 2 << 40),
        ("0", 0),
        ("17", 17),
        ("17b", 17),
        (17, 17),
        (17.9, 17),
    ],
)
def test_a_size_is_bytes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30min", 1800), ("250 ms", 0.25), ("1.5s", 1.5), ("2H", 7200), ("1d", 86400), (3, 3), (0.5, 0.5)],
)
def test_a_time_is_seconds(text: str | float, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize("number", [1e-5, 1e-300, 1e16, 0.1 + 0.2])
def test_a_number_is_what_it_is_however_python_prints_it(number: float) -> None:
    assert parse_time(number) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1",
        "1,5 GB",
        "1e3",
        "8 GiB extra",
        "8 Gi",
        "5 min",
        "0x10",
        "nan",
        "∞",
        "9" * 400,
        10**400,
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not a size such as 8GiB or 500MB"):
        parse_size(text)


@pytest.mark.parametrize(
    "value",
    [True, None, [1], -1, -0.5, math.nan, math.inf, "8GiB", "1 day", "1.s", "9" * 400 + " d", 10**400],
)
def test_what_is_no_time_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match="is not a time such as 30min or 250ms"):
        parse_time(value)  # type: ignore[arg-type]


@given(st.integers(0, 1 << 45))
def test_a_size_survives_being_shown_to_people(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.05, abs=0.5)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
