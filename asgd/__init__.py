"""Asynchronous SGD: its problems, its staleness and its record. Never imports Ray."""
