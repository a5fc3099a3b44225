"""Sizes and times as people write them."""

from __future__ import annotations

import math
import re
import sys

_SIZES = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_TIMES = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*$")


def parse_size(text: str | int) -> int:
    """Bytes from "8GiB", "500 MB" or a plain number. Raises ValueError."""
    return int(_parse(text, _SIZES, "a size such as 8GiB or 500MB"))


def parse_time(text: str | float) -> float:
    """Seconds from "30min", "250 ms" or a plain number. Raises ValueError."""
    return _parse(text, _TIMES, "a time such as 30min or 250ms")


def format_size(nbytes: float) -> str:
    """Bytes for people, e.g. "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _parse(text: str | float, units: dict[str, float] | dict[str, int], wanted: str) -> float:
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise ValueError(f"{text!r} is not {wanted}")
    if not isinstance(text, str) and 0 <= text <= sys.float_info.max:
        return float(text)
    found = _NUMBER.match(str(text))
    number = float(found[1]) * units.get(found[2].lower(), math.nan) if found else math.nan
    if not math.isfinite(number):  # enough digits make an infinity
        raise ValueError(f"{text!r} is not {wanted}")
    return number
