"""The parameter server in virtual time: the order of updates, runs, and their replay."""
