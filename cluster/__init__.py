"""Real runs on Ray: a parameter server, workers and a recorder.

    path = cluster.run(asgd.load_config("run.toml"))

Ray takes half a second to import, so it is imported only when a run is launched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgd.lazy import lazy

if TYPE_CHECKING:
    from cluster.launch import resume as resume
    from cluster.launch import run as run
    from cluster.team import set_workers as set_workers
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__, {"cluster.launch": ["resume", "run"], "cluster.team": ["set_workers"]}
    )
