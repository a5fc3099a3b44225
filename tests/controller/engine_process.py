"""An engine without a model in a process of its own, for tests that kill it or stop it.

    python -m tests.controller.engine_process CONFIG NAME          scheduler side and one worker
    python -m tests.controller.engine_process CONFIG NAME RANK     one worker and nothing else

It prints one JSON line when it is up and one for each line that it reads: {"do": "save", "keys": [1, 2]}
with `save`, `reserve`, `match` or `close`, all of `tests.controller.stores.Engine`.
"""

from __future__ import annotations

import json
import sys

from kvstrata.controller.client import worker_segments
from kvstrata.core.config import Config, build_config
from tests.controller.stores import Engine, key, wait_for


def main() -> None:
    config = build_config(("arguments", json.loads(sys.argv[1])))
    if len(sys.argv) > 3:
        be_worker(config, sys.argv[2], int(sys.argv[3]))
    else:
        be_engine(config, sys.argv[2])


def say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


def be_worker(config: Config, name: str, rank: int) -> None:
    segments = worker_segments(config.node, name, rank)
    wait_for("the store's welcome", lambda: segments._connection)
    say("up")
    for _ in sys.stdin:
        segments.close()
        say("closed")


def be_engine(config: Config, name: str) -> None:
    engine = Engine(config, name)
    say("up")
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(engine, command["do"])(*(key(number) for number in command.get("keys", ())))
        slots = getattr(answer, "slots", answer) or ()
        say([[slot.segment, slot.offset] for slot in slots])


if __name__ == "__main__":
    main()
