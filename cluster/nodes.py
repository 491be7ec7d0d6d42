"""Chooses the nodes of a Ray cluster for the actors, and finds the metrics page.

Ray places actors that reserve no core on any node, and may ignore a soft affinity for a new node.
So we choose the node ourselves.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import ray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from asgd.config.tables import ClusterConfig
from asgd.errors import RunFailedError
from cluster.local_ray.vitals import SECONDS_TO_DIE, check_ray

SERVER_LABEL = ("asgd", "server")  # label of nodes for the server


def alive_nodes() -> dict[str, dict[str, Any]]:
    """Return Ray's description of each live node, by node id."""
    return {name: node for name, node in _nodes().items() if node["Alive"]}


def _nodes() -> dict[str, dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {str(node["NodeID"]): node for node in nodes}


def server_node() -> str:
    """Return the node for the server: one with its label, else this node.

    The label promises write access to the run directory, which the server needs.
    """
    key, value = SERVER_LABEL
    here = str(ray.get_runtime_context().get_node_id())
    labelled = [name for name, node in alive_nodes().items() if node["Labels"].get(key) == value]
    return here if here in labelled or not labelled else labelled[0]


def host_name(node: str) -> str | None:
    """Return the name of a node's host, also of a dead node; None in a cluster of one node."""
    nodes = _nodes()
    return str(nodes[node]["NodeManagerHostname"]) if node in nodes and len(nodes) > 1 else None


def worker_node(places: Iterable[str], avoided: str | None = None, gpus: float = 0.0) -> str | None:
    """Return the node for a new worker: the one with the fewest workers per core.

    None if no node has cores, or none has the accelerators left. A cluster grows and shrinks, so
    the caller asks again later.

    Parameters
    ----------
    places
        The node of each existing worker.
    avoided
        The node where the worker was lost; Ray may take 15 s to notice the loss of a node.
    gpus
        Accelerators that each worker needs.

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

    cores = {
        name: node["Resources"].get("CPU", 0.0)
        for name, node in nodes.items()
        if _gpu_places(node, gpus) > workers[name]
    }

    def load(name: str) -> tuple[bool, float, int]:
        return name == avoided, (workers[name] + 1) / cores[name], workers[name]

    return min((name for name in cores if cores[name] > 0.0), key=load, default=None)


def _gpu_places(node: dict[str, Any], gpus: float) -> float:
    """Return how many workers the accelerators of a node suffice for; fractions share one."""
    if gpus == 0.0:
        return math.inf
    available = float(node["Resources"].get("GPU", 0.0))
    return available * math.floor(1 / gpus + 1e-9) if gpus <= 1 else available // gpus


def take_devices(cluster: ClusterConfig, threads: int) -> None:
    """Limit this process to the accelerators and threads of an actor, before it makes its problem.

    Ray sets what an actor with a reserved accelerator sees; the evaluation of the loss reserves
    none and shares those of the workers.
    """
    if cluster.gpus_per_worker == 0.0:
        os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    elif cluster.gpus_per_worker < 1.0:  # JAX would take most of its memory for one process
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)  # for libraries that the problem imports
    threadpool_limits(threads)  # of those that are loaded


def metrics_page() -> str | None:
    """Return the address of this node's metrics page for Prometheus, None without one."""
    node = alive_nodes()[str(ray.get_runtime_context().get_node_id())]
    if node["MetricsExportPort"] <= 0:
        return None
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
