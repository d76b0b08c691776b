"""A seal on the footers of our own parts.

Parquet's pages have checksums, its footer has none, and what it says of sizes and types is believed by whoever reads it: a
flipped bit there can end a process. Our writer puts a digest of the footer into it, a key-value pair that others ignore.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

FOOTER_KEY = "moetrace.footer"
UNSEALED = "0" * 32
MAGIC = b"PAR1"


def _digest(footer: bytes, at: int) -> bytes:
    """blake2b (16 bytes, hex) of a footer whose digest, at byte ``at``, counts as zeros."""
    blank = footer[:at] + UNSEALED.encode() + footer[at + len(UNSEALED) :]
    return hashlib.blake2b(blank, digest_size=16).hexdigest().encode()


def _place(footer: bytes) -> int:
    """Where the digest stands, -1 where there is none: after its key, the next field's header and its length."""
    key = footer.rfind(FOOTER_KEY.encode())
    at = key + len(FOOTER_KEY) + 2
    return at if key >= 0 and at + len(UNSEALED) <= len(footer) else -1


def seal_footer(path: Path) -> None:
    """Put the digest of a part's footer into the part, which was written with the pair (FOOTER_KEY, UNSEALED)."""
    with open(path, "r+b") as file:
        size = file.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - length)
        footer = file.read(length)
        at = _place(footer)
        file.seek(size - 8 - length + at)
        file.write(_digest(footer, at))
        file.flush()
        os.fsync(file.fileno())


def footer_is_sealed(source: Any) -> bool:
    """Whether a part's footer has a digest, which agrees; False where it has none.

    Raises
    ------
    ValueError
        Where the digest does not agree.
    """
    size = source.size()
    tail = bytes(source.read_at(8, size - 8)) if size >= 12 else b""
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or length > size - 12:
        return False
    footer = bytes(source.read_at(length, size - 8 - length))
    at = _place(footer)
    if at < 0:
        return False
    if _digest(footer, at) != footer[at : at + len(UNSEALED)]:
        raise ValueError("its footer is not what was written")
    return True
