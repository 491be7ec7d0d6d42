"""What a killed server comes back from: checkpoints, the write-ahead log, the lease, recovery."""
