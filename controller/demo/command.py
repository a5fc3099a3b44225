"""`kvstrata demo`: from the command line to the table, and everything it made gone again."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import kvstrata
from kvstrata.controller.demo import report
from kvstrata.controller.demo.engines import Fleet
from kvstrata.controller.demo.progress import Progress
from kvstrata.controller.demo.run import STAGES, Outcome, Size, run_demo
from kvstrata.controller.results import measured
from kvstrata.core.errors import KVStrataError

_FULL = Size(documents=5, second_documents=4)
_QUICK = Size(documents=3, second_documents=2)


class CannotRun(KVStrataError):
    """Something that the demo needs is not there."""


def demo(options: argparse.Namespace) -> int:
    """Exit status 1 if an answer was wrong, or a prompt that should have been loaded was not."""
    if importlib.util.find_spec("vllm") is None:
        raise CannotRun(
            f"{sys.executable} has no vLLM: run `make demo` in a checkout, which installs one for CPUs, "
            "or use the Python that has it"
        )
    model = _model(options.model)
    # A Unix socket's path is short, and TMPDIR may be long.
    folder = Path(tempfile.mkdtemp(prefix="kvstrata-demo-", dir="/tmp"))
    keep = True
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # engines end however we are told to
    try:
        with Fleet(model, folder, options.gpu, options.port) as fleet:
            outcome = run_demo(fleet, _QUICK if options.quick else _FULL, Progress(STAGES))
        keep = options.keep
    except KeyboardInterrupt:
        keep = options.keep
        raise
    finally:
        if keep:
            print(f"kvstrata demo: logs are kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return _tell(outcome, model, options)


def _tell(outcome: Outcome, model: Path, options: argparse.Namespace) -> int:
    figures = report.figures(outcome)
    print(report.table(outcome))
    if options.json is not None:
        flags = [f"--{name}" for name in ("gpu", "quick") if getattr(options, name)]
        samples = {"model": model.name, **report.samples(outcome)}
        measured("demo", " ".join(["kvstrata demo", *flags]), figures, samples).write(options.json)
    wrong = [figure.name for figure in figures if figure.met is False and figure.goal in ("== true", "== 0")]
    return 1 if wrong else 0


def _model(named: Path | None) -> Path:
    """The model's folder: the one that was named, or SmolLM2, made in this checkout."""
    if named is not None:
        if not (named / "config.json").is_file():
            raise CannotRun(f"{named} holds no model: name a folder with config.json, weights and tokenizer")
        return named.absolute()
    checkout = Path(kvstrata.__file__).resolve().parents[2]
    script = checkout / "scripts" / "models.py"
    if not script.is_file():
        raise CannotRun("outside a checkout there is no model to make: name the folder of one with --model")
    folder = checkout / ".cache" / "models" / "smollm2"
    made = subprocess.run(
        [sys.executable, str(script), "smollm2", str(folder)],
        stdout=subprocess.DEVNULL if folder.exists() else sys.stderr.fileno(),  # it says what it makes
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if made.returncode != 0:
        raise CannotRun("SmolLM2 could not be made (the reason is above): name another model with --model")
    return folder
