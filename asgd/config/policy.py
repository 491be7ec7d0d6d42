"""Which keys of the server's policy go together."""

from __future__ import annotations


def check_policy(
    mode: str,
    schedule: str,
    workers: int,
    *,
    several: int | None,
    late: str,
    discard_above: int | None,
) -> None:
    """Refuse keys of `[cluster]` that do not go together, see `asgd.policy`.

    Parameters
    ----------
    several
        `gradients_per_update`; the others have the names of their keys.

    Raises
    ------
    ValueError
        The first conflict, with both keys.
    """
    if several is None and mode == "buffered":
        raise ValueError('mode = "buffered" needs gradients_per_update: expected a number >= 1')
    if several is not None and mode not in ("buffered", "sync"):
        raise ValueError(
            f'gradients_per_update = {several} needs mode = "buffered" or "sync", not {mode!r}'
        )
    if mode == "sync" and several is not None and several > workers:
        raise ValueError(
            f"gradients_per_update = {several}: in mode sync expected at most workers = "
            f"{workers}, which deliver one gradient a round each"
        )
    if late == "keep" and (mode != "sync" or several is None):
        raise ValueError(
            f'late = "keep" needs mode = "sync" with gradients_per_update, not mode = {mode!r}'
            + (" without it" if mode == "sync" else "")
        )
    if discard_above is None:
        return
    if mode not in ("async", "buffered"):
        other = 'late = "discard"' if mode == "sync" else "max_staleness"
        raise ValueError(
            f'discard_above = {discard_above} needs mode = "async" or "buffered", not '
            f"{mode!r}, where {other} limits the staleness"
        )
    if schedule == "uniform":
        raise ValueError(f'discard_above = {discard_above} needs schedule = "free", not "uniform"')
