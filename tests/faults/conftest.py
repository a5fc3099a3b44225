"""Fixtures of the fault tests: the same hosts as the end-to-end tests."""

from tests.e2e.conftest import host

__all__ = ["host"]
