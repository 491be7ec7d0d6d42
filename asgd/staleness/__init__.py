"""The definition of staleness, and staleness laws.

The staleness of an update is the number of updates applied between reading its snapshot and
applying its gradient: `staleness = update - read_version >= 0`, where `update` counts the updates
applied before this one.

A law is a probability distribution of staleness on 0, 1, 2, ... with the methods of a scipy
distribution: `pmf`, `cdf`, `mean`, `var`, `rvs`. Laws are frozen and comparable; `to_dict`
describes one for JSON.
"""
