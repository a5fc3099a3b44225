"""An engine's paged cache: who has which block, and what lies in it on each worker.

What lies at a position is a number for all tokens up to it and the weights that computed it: `Truth`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK_TOKENS = 4
GARBAGE = 0  # KV of a token that was guessed wrong, or of none
TORN = -1  # being written


class Truth:
    """A number for every prefix: equal numbers mean equal KV, bit by bit."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}

    def after(self, prefix: int, token: int) -> int:
        return self._numbers.setdefault((prefix, token), len(self._numbers) + 1)

    def of(self, weights: int, tokens: Iterable[int]) -> list[int]:
        numbers = []
        prefix = self.after(0, weights)
        for token in tokens:
            prefix = self.after(prefix, token)
            numbers.append(prefix)
        return numbers


class BlockPool:
    """vLLM's block pool: users of each block, and the prefix cache of those that nobody uses."""

    def __init__(self, blocks: int, remembers: bool) -> None:
        self._users = [0] * blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._remembers = remembers
        self._by_prefix: dict[int, int] = {}  # number of the prefix that ends with the block -> block
        self._prefixes: dict[int, int] = {}  # the other way

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def all_free(self) -> bool:
        return len(self._free) == len(self._users)

    def find(self, truth: Sequence[int], tokens: int) -> list[int]:
        """Remembered blocks of the longest prefix of at most `tokens` tokens."""
        found = []
        for last in range(BLOCK_TOKENS - 1, tokens, BLOCK_TOKENS):
            block = self._by_prefix.get(truth[last])
            if block is None:
                break
            found.append(block)
        return found

    def room_for(self, new: int, shared: Sequence[int]) -> bool:
        """Whether `new` blocks can be taken besides those `shared`."""
        return new <= len(self._free) - sum(block in self._free for block in shared)

    def share(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._users[block] += 1
            self._free.pop(block, None)

    def take(self, count: int) -> list[int]:
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
            if (prefix := self._prefixes.pop(block, None)) is not None:
                del self._by_prefix[prefix]
        return blocks

    def let_go(self, blocks: Sequence[int]) -> None:
        """The tail first: it is the first to be taken again."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None

    def remember(self, blocks: Sequence[int], truth: Sequence[int], tokens: int) -> None:
        """The first `tokens` tokens of `blocks` are computed, or will be in this step."""
        if not self._remembers:
            return
        for index in range(tokens // BLOCK_TOKENS):
            block, prefix = blocks[index], truth[(index + 1) * BLOCK_TOKENS - 1]
            if block not in self._prefixes and prefix not in self._by_prefix:
                self._by_prefix[prefix], self._prefixes[block] = block, prefix

    def forget(self) -> None:
        self._by_prefix.clear()
        self._prefixes.clear()


class DeviceCache:
    """What lies in the blocks of one worker."""

    def __init__(self, blocks: int) -> None:
        self._held = [[GARBAGE] * BLOCK_TOKENS for _ in range(blocks)]
        self._versions = [0] * blocks

    def put(self, blocks: Sequence[int], start: int, contents: Iterable[int]) -> None:
        """Write a request's positions from `start` on; -1 stands for a block that takes no part."""
        for position, content in enumerate(contents, start):
            block = blocks[position // BLOCK_TOKENS]
            if block >= 0:
                self._held[block][position % BLOCK_TOKENS] = content
                self._versions[block] += 1

    def lose(self) -> None:
        """The memory went, and came back with anything in it."""
        self._held = [[GARBAGE] * BLOCK_TOKENS for _ in self._held]
        self._versions = [version + 1 for version in self._versions]

    def read(self, blocks: Iterable[int]) -> tuple[int, ...]:
        return tuple(content for block in blocks for content in self._held[block])

    def versions(self, blocks: Iterable[int]) -> list[int]:
        return [self._versions[block] for block in blocks]

    def holds(self, blocks: Sequence[int], truth: Sequence[int], tokens: int) -> bool:
        """Whether the first `tokens` positions hold what they should."""
        used = blocks[: -(-tokens // BLOCK_TOKENS)]
        return self.read(used)[:tokens] == tuple(truth[:tokens])
