"""Names out of a stranger's files, made fit for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""The text with all that is not printed written out (``\n``, ``\x1b``, ``\ud800``), a space kept.

    A tensor's name may hold a line break, a terminal's control sequence, or half of a surrogate pair, which no stream
    takes.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
