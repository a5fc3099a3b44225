"""Tests of the node store, its clients, and the command line."""
