"""The parameter server in virtual time: single runs, the order of updates, ensembles of runs."""
