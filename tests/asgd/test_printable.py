"""Control characters in foreign names and reasons do not reach a terminal."""

import os

import pytest

from asgd.console.output import aligned
from asgd.printable import printable
from asgd.rundir.events import in_words

HOSTILE = "a\x1b[2J\nb\r\x9b1m\u202e\u2028"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("digits, τ = 3 ▁▂█", "digits, τ = 3 ▁▂█"),
        ("a\x1b[2J\nb\t", r"a\x1b[2J\x0ab\x09"),
        ("\x9b1m\u202e\U000e0001", r"\x9b1m\u202e\U000e0001"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
    ],
)
def test_unprintable_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.encode()


def test_a_row_or_an_event_is_one_printable_line() -> None:
    lines = aligned([("run", "state"), (HOSTILE, "failed")])
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert lines[0].index("state") == lines[1].index("failed")
    assert in_words({"event": "failed", "reason": HOSTILE}).isprintable()
