"""Ensembles of paths: stochastic modified equations and the discrete algorithms they model."""
