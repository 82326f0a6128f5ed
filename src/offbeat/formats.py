"""Formats: what is written to disk or sent, each with a name and a number.

The number rises when an offbeat with the lower one could not read what is written with the higher one, or would read it
wrongly. The text with the name and the number comes first, in the same place in every version, so that each version can tell
which one it has before it.
"""

from __future__ import annotations

import re

from . import __version__

TRACE = "offbeat trace 1"
COMPARISON = "offbeat comparison 1"
SNAPSHOT = "offbeat snapshot 1"
PROTOCOL = "offbeat protocol 1"


class OtherVersion(ValueError):
    """Another version of a format: the message names both, and the cure."""


def number(format: str) -> int:
    """The number of a format."""
    return int(format.rpartition(" ")[2])


def check(found: object, known: str, what: str, writer: str = "") -> bool:
    """Whether ``found`` is the format ``known``; `OtherVersion` where it is another version of it.

    ``what`` has that format, for the message; ``writer`` is the version of offbeat that wrote it, where that is known.
    """
    name, _, mine = known.rpartition(" ")
    match = re.fullmatch(rf"{name} ([0-9]{{1,9}}) *", str(found))
    if match is None:
        return False
    theirs = int(match[1])
    if theirs == int(mine):
        return True
    other = f"{name} {theirs}"
    if known == PROTOCOL:
        raise OtherVersion(
            f"{what} speaks {other!r}, and offbeat {__version__} here {known!r}: install the same version of offbeat at both ends"
        )
    by = f", written by offbeat {writer}" if writer else ""
    newer = "install a newer offbeat, or " if theirs > int(mine) else ""
    raise OtherVersion(
        f"{what} has the format {other!r}{by}, and offbeat {__version__} knows {known!r}: {newer}read it with the version that "
        "wrote it, or run again with this one"
    )
