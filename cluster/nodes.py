"""Which node of a Ray cluster gets which actor, and where its metrics are.

Ray puts actors that reserve no core on any node, and treats a soft affinity as a hint while a node
is not known everywhere. So we choose the node ourselves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import ray

from asgd.errors import RunFailedError
from cluster.local_ray.vitals import SECONDS_TO_DIE, check_ray

SERVER_LABEL = ("asgd", "server")  # of nodes that may have the server


def alive_nodes() -> dict[str, dict[str, Any]]:
    """Return Ray's description of each node that is alive by the node's id."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {str(node["NodeID"]): node for node in nodes if node["Alive"]}


def server_node() -> str:
    """Return the node for the server: one with its label, else the one of this process.

    The server needs write access to the run directory; the label promises it.
    """
    key, value = SERVER_LABEL
    here = str(ray.get_runtime_context().get_node_id())
    labelled = [name for name, node in alive_nodes().items() if node["Labels"].get(key) == value]
    return here if here in labelled or not labelled else labelled[0]


def worker_node(places: Iterable[str], avoided: str | None = None) -> str:
    """Return the node for one more worker: the one with the fewest workers per core.

    A node without cores gets none, unless there is no other.

    Parameters
    ----------
    places
        The nodes of the workers there are, a node as often as it has workers.
    avoided
        Where the worker was lost: Ray may take 15 s to notice the loss of a whole node.

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
    """Return where Prometheus finds the metrics of this node's processes; None: nowhere."""
    node = alive_nodes()[str(ray.get_runtime_context().get_node_id())]
    if node["MetricsExportPort"] <= 0:
        return None
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
