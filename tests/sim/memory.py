"""The bytes of a host pool: for every cell of every slot, whose chunk was written there last.

This is the judge of a run. A reader says which chunk it expects; any other bytes, or bytes that
change while it reads, are wrong KV and go to `wrong`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

CELL = 32  # bytes; slots are whole cells, and ranks share the cells of a slot

Cell = tuple[int, int]  # segment, number
TORN = (b"torn", -1)
FLIPPED = (b"flipped", -1)  # damaged at rest: its checksum tells, so nobody is deceived


@dataclass(frozen=True)
class Range:
    """A rank's share of one slot."""

    segment: int
    first: int  # cell
    parts: range  # of the chunk

    @classmethod
    def of(cls, segment: int, offset: int, nbytes: int, rank: int, ranks: int) -> Range:
        cells = nbytes // CELL
        parts = range(rank * cells // ranks, (rank + 1) * cells // ranks)
        return cls(segment, offset // CELL + parts.start, parts)

    def cells(self) -> list[Cell]:
        return [(self.segment, self.first + index) for index in range(len(self.parts))]


@dataclass
class Memory:
    """The segments of one node store process. Those who map them keep them when it is gone."""

    wrong: list[str]
    contents: dict[Cell, tuple[bytes, int]] = field(default_factory=dict)
    versions: dict[Cell, int] = field(default_factory=dict)
    writing: dict[Cell, str] = field(default_factory=dict)

    def begin_write(self, where: Range, who: str) -> None:
        for cell in where.cells():
            if cell in self.writing:
                self.wrong.append(f"{who} and {self.writing[cell]} write to {cell} at once")
            self.writing[cell] = who
            self._put(cell, TORN)

    def end_write(self, where: Range, key: bytes | None) -> None:
        """The copy is done. `key`: the chunk that its source held; None: the source was torn."""
        for cell, part in zip(where.cells(), where.parts, strict=True):
            self.writing.pop(cell, None)
            self._put(cell, TORN if key is None else (key, part))

    def break_off(self, where: Range) -> None:
        """The writer is gone in the middle of it."""
        for cell in where.cells():
            self.writing.pop(cell, None)

    def begin_read(self, where: Range) -> list[int]:
        return [self.versions.get(cell, 0) for cell in where.cells()]

    def end_read(self, where: Range, key: bytes, began: list[int], who: str) -> bool:
        """False: damaged at rest, and noticed. Wrong bytes that nobody could notice go to `wrong`."""
        seen = [self.contents.get(cell, TORN) for cell in where.cells()]
        if FLIPPED in seen:
            return False
        if seen != [(key, part) for part in where.parts]:
            self.wrong.append(f"{who} read {seen} for chunk {key!r} in {where}")
        elif began != self.begin_read(where):
            self.wrong.append(f"{who} read {where} while it was written")
        return True

    def holds(self, where: Range, key: bytes) -> bool:
        """Whether it was written there, whatever has happened to it at rest."""
        wanted = [(key, part) for part in where.parts]
        seen = [self.contents.get(cell, TORN) for cell in where.cells()]
        return all(content in (FLIPPED, good) for content, good in zip(seen, wanted, strict=True))

    def is_good(self, where: Range, key: bytes) -> bool:
        """What one who verifies it now would say."""
        return [self.contents.get(cell, TORN) for cell in where.cells()] == [(key, i) for i in where.parts]

    def flip(self, cell: Cell) -> None:
        if cell not in self.writing and cell in self.contents:
            self._put(cell, FLIPPED)

    def _put(self, cell: Cell, content: tuple[bytes, int]) -> None:
        self.contents[cell] = content
        self.versions[cell] = self.versions.get(cell, 0) + 1
