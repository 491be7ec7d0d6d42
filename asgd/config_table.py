"""What all tables of a configuration share."""

from __future__ import annotations

from typing import Annotated

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration file; unknown keys are refused."""


def names_code(value: str) -> bool:
    """Whether a value has the form "package.module:name"."""
    module, colon, _ = value.partition(":")
    return bool(colon) and all(name.isidentifier() for name in module.split("."))
