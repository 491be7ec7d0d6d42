"""Ensembles of paths: the stochastic modified equations and their discrete counterparts."""
