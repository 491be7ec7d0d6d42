"""The parameter server in virtual time: a run, the order of its updates, many runs at once."""
