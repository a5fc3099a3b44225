"""Says on stderr what is going on: one line a stage, redrawn on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_BAR_CELLS = 24
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Numbered stages, each with a known count of steps.

    Args:
        stages: how many there will be.
        out: where to write; redrawing happens only if it is a terminal.
    """

    def __init__(self, stages: int, out: TextIO = sys.stderr) -> None:
        self._stages, self._out, self._redraws = stages, out, out.isatty()
        self._stage = self._done = self._steps = 0
        self._title, self._began = "", 0.0

    @contextmanager
    def stage(self, title: str, steps: int = 1) -> Iterator[None]:
        """A stage; `step` inside it."""
        self._stage += 1
        self._title, self._steps, self._done, self._began = title, steps, 0, time.monotonic()
        self._write(self._bar() if self._redraws else f"{self._head()} ...")
        try:
            yield
        except BaseException:
            self._write("\n")
            raise
        seconds = f" {time.monotonic() - self._began:.0f} s\n"
        self._write(f"{_CLEAR_LINE}{self._head()}:{seconds}" if self._redraws else seconds)

    def step(self, count: int = 1) -> None:
        """`count` more steps are done; 0 only shows that time passes."""
        self._done += count
        if self._redraws:
            self._write(_CLEAR_LINE + self._bar())

    def _head(self) -> str:
        return f"[{self._stage}/{self._stages}] {self._title}"

    def _bar(self) -> str:
        full = _BAR_CELLS * self._done // max(1, self._steps)
        bar = "#" * full + "." * (_BAR_CELLS - full)
        return f"{self._head()} {bar} {time.monotonic() - self._began:.0f} s"

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
