"""Chooses the nodes of a Ray cluster for the actors, and finds the metrics page.

Ray places actors that reserve no core on any node, and may ignore a soft affinity for a new node.
So we choose the node ourselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import ray

from asgd.errors import RunFailedError
from cluster.local_ray.vitals import SECONDS_TO_DIE, check_ray

SERVER_LABEL = ("asgd", "server")  # label of nodes for the server


def alive_nodes() -> dict[str, dict[str, Any]]:
    """Return Ray's description of each live node, by node id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {str(node["NodeID"]): node for node in nodes if node["Alive"]}


def server_node() -> str:
    """Return the node for the server: one with its label, else this node.

    The label promises write access to the run directory, which the server needs.
    """
    key, value = SERVER_LABEL
    here = str(ray.get_runtime_context().get_node_id())
    labelled = [name for name, node in alive_nodes().items() if node["Labels"].get(key) == value]
    return here if here in labelled or not labelled else labelled[0]


def worker_node(places: Iterable[str], avoided: str | None = None) -> str:
    """Return the node for a new worker: the one with the fewest workers per core.

    A node without cores is used only if there is no other.

    Parameters
    ----------
    places
        The node of each existing worker.
    avoided
        The node where the worker was lost; Ray may take 15 s to notice the loss of a node.

    Raises
    ------
    RunFailedError
        No node is alive.
    """
    workers = Counter(places)
    nodes = alive_nodes()
    if not nodes:
        check_ray(SECONDS_TO_DIE)
        raise RunFailedError("no node of the Ray cluster is alive")

    def load(name: str) -> tuple[bool, float, int]:
        cores = float(nodes[name]["Resources"].get("CPU", 0.0))
        share = (workers[name] + 1) / cores if cores > 0.0 else math.inf
        return name == avoided, share, workers[name]

    return min(nodes, key=load)


def metrics_page() -> str | None:
    """Return the address of this node's metrics page for Prometheus, None without one."""
    node = alive_nodes()[str(ray.get_runtime_context().get_node_id())]
    if node["MetricsExportPort"] <= 0:
        return None
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
