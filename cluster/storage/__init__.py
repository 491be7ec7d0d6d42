"""Durable state of a run: checkpoints, the write-ahead log, the lease, recovery."""
