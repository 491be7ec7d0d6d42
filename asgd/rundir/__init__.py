"""The run directory: what is recorded of a run, how it is written, read and verified."""
