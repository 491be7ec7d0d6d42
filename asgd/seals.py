"""Checks against damage in the small JSON files of a run directory.

An event ends in `check`, the CRC-32 of the line before it; a file of one object ends in `sha256`,
the digest of the text before it. Readers refuse a text that does not match its check, and accept a
text without a check.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

_CHECK = re.compile(rb', "check": "([0-9a-f]{8})"\}\s*$')
_SHA256 = re.compile(rb',\s*"sha256": "([0-9a-f]{64})"\s*\}\s*$')


def sealed_line(event: Mapping[str, Any]) -> bytes:
    """Return an event as a line with its check, without the end of the line."""
    body = json.dumps(event).encode()[:-1]
    return body + b', "check": "%s"}' % _crc32(body)


def sealed_object(value: Mapping[str, Any]) -> bytes:
    """Return an object as indented text with its digest."""
    body = json.dumps(value, indent=2).encode().removesuffix(b"\n}")
    return body + b',\n  "sha256": "%s"\n}\n' % _sha256(body)


def is_sealed(content: bytes) -> bool:
    """Return whether a line or a file has a check, after comparing it with the content.

    Raises
    ------
    ValueError
        It does not match.
    """
    for pattern, digest in ((_CHECK, _crc32), (_SHA256, _sha256)):
        check = pattern.search(content)
        if check is not None:
            if digest(content[: check.start()]) != check[1]:
                raise ValueError("its check does not match its content")
            return True
    return False


def _crc32(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _sha256(body: bytes) -> bytes:
    return sha256(body).hexdigest().encode()
