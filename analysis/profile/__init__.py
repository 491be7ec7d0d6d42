"""Staleness: estimators, fitted laws, goodness of fit, dependence, laws from compute times."""
