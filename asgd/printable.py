"""Makes untrusted text, such as file names and error messages, safe for a terminal."""

from __future__ import annotations

_ESCAPED_BYTES = range(0xDC80, 0xDD00)  # Python's surrogates for bytes that are not UTF-8


def printable(text: str) -> str:
    """Return a text on one line, with invisible characters escaped as \\x1b, \\u2028, ..."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char.isprintable():
        return char
    code = ord(char)
    if code in _ESCAPED_BYTES:
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
