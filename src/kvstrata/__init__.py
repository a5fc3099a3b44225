"""kvstrata: a hierarchy of tiers for the KV cache of stock vLLM and SGLang.

The rooms (`kvstrata.core`, `kvstrata.connector`, ...) live at the top level of the repository and
are linked in here, so that there is one import name. docs/architecture.md follows one request
through them.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kvstrata")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
