"""Real runs on Ray: a parameter server, its workers and their record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.launch import resume as resume
    from cluster.launch import run as run

__all__ = ["resume", "run"]


def __getattr__(name: str) -> Any:
    # Ray takes half a second to import: only who launches a run pays for it.
    if name in __all__:
        from cluster import launch

        return getattr(launch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
