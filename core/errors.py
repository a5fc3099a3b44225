"""Errors a user can meet. Each message says what is wrong and what to do."""

from __future__ import annotations


class KVStrataError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(KVStrataError):
    """A configuration key or value is unknown, contradictory or out of range."""


class UnsupportedModel(KVStrataError):
    """The canonical layout, or this version, cannot describe the engine's KV cache."""


class NodeUnavailable(KVStrataError):
    """The node store cannot be reached, is another user's, or speaks another protocol version."""
