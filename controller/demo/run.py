"""The demo's story: the same questions to plain vLLM and to vLLM with kvstrata, in every way a prompt's
KV can come to be there.

    cold             nobody has seen the document: all of it is computed
    GPU prefix hit   it is in the engine's own cache
    host hit         other documents have evicted it from there: kvstrata gives it back
    restart          the engine has been ended and started again
    second engine    another engine computed it

Rule of this file: an answer counts as right only if plain vLLM gave it, bit for bit, starting from
the same token; and that is shown to mean something by an engine that loads zeros instead.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstrata.controller.cli_node import problems
from kvstrata.controller.demo.client import Answer
from kvstrata.controller.demo.document import QUESTIONS, Document, documents
from kvstrata.controller.demo.engines import KVSTRATA, PLAIN, ZEROED_LOADS, Engine, Fleet
from kvstrata.controller.demo.progress import Progress

STAGES = 9
_ANSWER_TOKENS = 24


class Way(enum.Enum):
    """How the KV of a prompt's document comes to be there. The order decides who is asked what."""

    COLD = "cold"
    GPU = "gpu_hit"
    HOST = "host"
    RESTART = "engine_restart"
    SECOND_COLD = "second_engine_cold"
    SECOND = "second_engine"


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked. Each document is one sample of every way."""

    documents: int  # at least 3: two others evict a document from the engine's own cache
    second_documents: int  # only for the second engine's cold figure


@dataclass(slots=True)
class Outcome:
    """All answers, in the order of the documents."""

    plain: dict[tuple[Document, str], Answer] = field(default_factory=dict)
    answers: dict[Way, list[Answer]] = field(default_factory=lambda: {way: [] for way in Way})
    as_plain: dict[Way, list[bool]] = field(default_factory=lambda: {way: [] for way in Way})
    zeroed: list[Answer] = field(default_factory=list)
    zeroed_as_plain: list[bool] = field(default_factory=list)
    check_problems: list[str] = field(default_factory=list)


def run_demo(fleet: Fleet, size: Size, progress: Progress) -> Outcome:
    """All stages; the fleet's engines are left for it to end.

    Raises:
        EngineFailed: with the end of that engine's log.
    """
    story = _Story(fleet, size, progress)
    story.plain_vllm()
    story.first_engine()
    story.other_engines()
    story.outcome.check_problems = problems(fleet.paths)
    return story.outcome


class _Story:
    def __init__(self, fleet: Fleet, size: Size, progress: Progress) -> None:
        self._fleet, self._progress = fleet, progress
        made = documents(size.documents + size.second_documents + 3)
        self._documents, rest = made[: size.documents], made[size.documents :]
        self._second_documents, self._spare = rest[: size.second_documents], rest[size.second_documents :]
        self._first: Engine | None = None
        self.outcome = Outcome()

    def plain_vllm(self) -> None:
        """What plain vLLM answers: cold, then with the document in its prefix cache."""
        with self._progress.stage("starting plain vLLM, and vLLM with kvstrata", 2):
            plain = self._fleet.start("plain vllm", PLAIN, seat=1)
            self._first = self._fleet.start("first engine", KVSTRATA, seat=0)
            self._fleet.wait_ready([plain, self._first], self._progress.step)
        ways = (Way.COLD, Way.GPU, Way.HOST, Way.RESTART, Way.SECOND)
        asked = [(document, way) for document in self._documents for way in ways]
        asked += [(document, Way.SECOND_COLD) for document in self._second_documents]
        with self._progress.stage("plain vLLM answers, for comparison", len(asked)):
            for document, way in asked:
                question = _question(document, way)
                answer = plain.ask(document.prompt(question), _ANSWER_TOKENS)
                self.outcome.plain[document, question] = answer
                self._progress.step()
        self._fleet.end(plain)

    def first_engine(self) -> None:
        """Cold; then evicted by the other documents and loaded from the host, and at once from the GPU."""
        engine = self._first
        assert engine is not None
        self._warm_up(engine, "the first engine")
        with self._progress.stage("new documents, computed and saved", len(self._documents)):
            self._ask(engine, self._documents, Way.COLD)
        with self._progress.stage("evicted documents, from the host tier", 2 * len(self._documents)):
            self._ask(engine, self._documents, Way.HOST, Way.GPU)
        self._fleet.end(engine)

    def other_engines(self) -> None:
        """The first engine again, another beside it, and one that loads zeros."""
        with self._progress.stage("restarting the engine; starting a second, and one that loads zeros", 3):
            again = self._fleet.start("restarted engine", KVSTRATA, seat=0)
            second = self._fleet.start("second engine", KVSTRATA, seat=1)
            zeroing = self._fleet.start("zeroing engine", ZEROED_LOADS, seat=0)
            self._fleet.wait_ready([again, second, zeroing], self._progress.step)
        self._warm_up(again, "the restarted engine")
        self._warm_up(second, "the second engine")
        with self._progress.stage(
            "the same documents, on all of them", 3 * len(self._documents) + len(self._second_documents)
        ):
            self._ask(again, self._documents, Way.RESTART)
            self._ask(second, self._second_documents, Way.SECOND_COLD)
            self._ask(second, self._documents, Way.SECOND)
            self._ask_zeroing(zeroing)

    def _warm_up(self, engine: Engine, name: str) -> None:
        """What an engine does for the first time is slow, kvstrata or not: not in anybody's figure."""
        with self._progress.stage(f"warming {name} up", 2):
            document = self._spare.pop()
            for question in QUESTIONS[:2]:
                engine.ask(document.prompt(question), _ANSWER_TOKENS)
                self._progress.step()

    def _ask(self, engine: Engine, about: Iterable[Document], *ways: Way) -> None:
        for document in about:
            for way in ways:
                question = _question(document, way)
                answer = engine.ask(document.prompt(question), _ANSWER_TOKENS)
                self.outcome.answers[way].append(answer)
                plain = self.outcome.plain[document, question]
                self.outcome.as_plain[way].append(answer.same_output(plain))
                self._progress.step()

    def _ask_zeroing(self, engine: Engine) -> None:
        for document in self._documents:
            question = _question(document, Way.HOST)
            answer = engine.ask(document.prompt(question), _ANSWER_TOKENS)
            self.outcome.zeroed.append(answer)
            plain = self.outcome.plain[document, question]
            self.outcome.zeroed_as_plain.append(answer.tokens == plain.tokens)
            self._progress.step()


def _question(document: Document, way: Way) -> str:
    """Each document is asked something else each way, so that nothing but the document is found again."""
    return QUESTIONS[(document.number + list(Way).index(way)) % len(QUESTIONS)]
