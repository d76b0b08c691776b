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


def _digest(footer: bytes) -> tuple[int, bytes] | None:
    """Where the digest of a footer stands and what it must be, 16 bytes of blake2b in hex; None where there is no place for it.

    It stands after its key, the next field's header and its length, and counts as zeros itself.
    """
    key = footer.rfind(FOOTER_KEY.encode())
    at = key + len(FOOTER_KEY) + 2
    if key < 0 or at + len(UNSEALED) > len(footer):
        return None
    blank = footer[:at] + UNSEALED.encode() + footer[at + len(UNSEALED) :]
    return at, hashlib.blake2b(blank, digest_size=16).hexdigest().encode()


def seal_footer(path: Path) -> None:
    """Put the digest of a part's footer into the part, which was written with the pair (FOOTER_KEY, UNSEALED)."""
    with open(path, "r+b") as file:
        end = file.seek(-8, os.SEEK_END)
        begin = end - int.from_bytes(file.read(4), "little")
        file.seek(begin)
        sealed = _digest(file.read(end - begin))
        assert sealed is not None
        file.seek(begin + sealed[0])
        file.write(sealed[1])
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
    sealed = _digest(footer)
    if sealed is not None and footer[sealed[0] : sealed[0] + len(UNSEALED)] != sealed[1]:
        raise ValueError("its footer is not what was written")
    return sealed is not None
