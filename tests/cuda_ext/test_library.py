"""Finding and loading the library, and that its calls let other Python threads run."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import pytest

from kvstrata.cuda_ext import native
from kvstrata.cuda_ext.native import Library, NativeLibraryError, find_library, load_library
from tests.cuda_ext import engines
from tests.cuda_ext.cases import KEY, Slot, case_of, layout_of

HEADER = Path(__file__).resolve().parents[2] / "cuda_ext" / "kvstrata.h"


def test_the_two_faces_agree_on_the_abi(library: Library) -> None:
    (version,) = re.findall(r"#define KVS_ABI_VERSION (\d+)", HEADER.read_text())
    assert int(version) == native.ABI_VERSION == library.native.kvs_abi_version()


def test_a_missing_library_is_an_error_that_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NativeLibraryError, match=r"_not_built\.so is not in .*pip install -e \."):
        find_library("_not_built.so")


def test_another_abi_version_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.ABI_VERSION
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    with pytest.raises(NativeLibraryError, match=f"has ABI version {found}, this kvstrata needs 999"):
        load_library()


def test_a_file_that_is_no_library_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_text("not a library")
    with pytest.raises(NativeLibraryError, match=r"broken\.so cannot be loaded"):
        load_library(path)


def test_other_threads_run_during_a_copy(library: Library) -> None:
    case = case_of(layout_of(4, (64, 64), "bfloat16", 256, layers=4), [engines.any_strides], 128, 2)
    engine, slot = case.engine(library), Slot(case.layout)
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0)

    # A thread that holds the GIL is not asked to give it up within this test, so the ticks counted
    # are those of moments in which a call had let go of it.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(600)
    ticker = threading.Thread(target=tick)
    counted, calls = 0, 0
    try:
        ticker.start()
        while calls < 50 or (counted < calls and calls < 1000):  # a busy machine may starve the ticker
            before = ticks
            engine.gather(slot.address, case.block_ids, KEY)
            counted += ticks - before
            calls += 1
    finally:
        done.set()
        sys.setswitchinterval(interval)
        ticker.join()
    assert counted >= calls
