"""Checksums of the chunks of a blosc2 array, in its own file.

The variable-length metadata of a file hold, as ``cfcl_checksums``, JSON: shape, chunks, blocks, type and the CRC-32 of
every compressed chunk. Files without it, written by others, are read unverified.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import blosc2

from nnunet_cfcl.errors import UserError, first_line, foreign_errors_as

KEY = "cfcl_checksums"
#: Marks in the header of a file that holds an expression or a function, which some versions of blosc2 run on opening.
RUNNABLE = (b"LazyArray", b"b2o", b"proxy-source")
#: Greatest length of the header of an array.
HEADER_BYTES = 1 << 16


def check_plain(file: Path) -> None:
    """Check, before blosc2 opens a file, that it holds a plain array.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds code.
    """
    with open(file, "rb") as content:
        head = content.read(HEADER_BYTES)
    # big-endian, after the mark of the format
    header = head[: int.from_bytes(head[11:15], "big")]
    if found := [name.decode() for name in RUNNABLE if name in header]:
        raise ValueError(f"it holds a {found[0]}, no plain array")


def write_checksums(array: blosc2.NDArray) -> None:
    """Write the checksums of a finished array into its file."""
    sums = [zlib.crc32(array.schunk.get_chunk(number)) for number in range(array.schunk.nchunks)]
    text = json.dumps({**_header(array), "chunk_sums": sums})
    array.schunk.vlmeta[KEY] = [zlib.crc32(text.encode()), text]


def add_checksums(file: Path) -> None:
    """Apply `write_checksums` to a finished file; its chunks stay as they are."""
    write_checksums(blosc2.open(urlpath=str(file), mode="a"))


def check_header(array: blosc2.NDArray) -> None:
    """Check that shape, chunks and type are as they were written.

    Raises:
        ValueError: one of them changed.
    """
    _checksums(array)


def check_chunks(array: blosc2.NDArray, region: Sequence[slice], verified: set[int]) -> None:
    """Verify the checksums of the chunks of a region.

    Args:
        array: array in its file.
        region: slices of the first axes; further axes are read whole.
        verified: numbers of the chunks that need no check any more; the chunks of the region are added.

    Raises:
        ValueError: a chunk changed since it was written.
    """
    new = [number for number in _chunks_of(array, region) if number not in verified]
    # reading the checksums takes longer than most boxes
    content = _checksums(array) if new else None
    for number in new:
        if content is not None and zlib.crc32(array.schunk.get_chunk(number)) != content["chunk_sums"][number]:
            raise ValueError(f"the checksum of chunk {number} is wrong")
        verified.add(number)


def damage(file: Path, fix: str, error: Exception) -> UserError:
    """Error about a file that cannot be read."""
    return UserError(f"{file} cannot be read, it is damaged or not there ({first_line(error)})", fix)


@contextmanager
def damage_named(file: Path, fix: str) -> Iterator[None]:
    """Context in which a file is read; any error names the file and the fix.

    Raises:
        UserError: the file cannot be read.
    """
    with foreign_errors_as(lambda error: damage(file, fix, error)):
        yield


def _header(array: blosc2.NDArray) -> dict[str, Any]:
    return {"shape": list(array.shape), "chunks": list(array.chunks), "blocks": list(array.blocks),
            "type": str(array.dtype)}


def _checksums(array: blosc2.NDArray) -> dict[str, Any] | None:
    """Read the checksums and verify the header; None: the file has no checksums."""
    if KEY not in array.schunk.vlmeta:
        return None
    checksum, text = array.schunk.vlmeta[KEY]
    if zlib.crc32(text.encode()) != checksum:
        raise ValueError("the checksum of its checksums is wrong")
    content: dict[str, Any] = json.loads(text)
    found = _header(array)
    if any(content[key] != found[key] for key in found) or len(content["chunk_sums"]) != array.schunk.nchunks:
        raise ValueError(f"its header has {found}, it was written with {content['shape']}")
    return content


def _chunks_of(array: blosc2.NDArray, region: Sequence[slice]) -> Iterator[int]:
    """Numbers of the chunks that a region touches, in C order over the grid of chunks."""
    grid = [-(-size // chunk) for size, chunk in zip(array.shape, array.chunks)]
    touched = []
    for axis, (size, chunk) in enumerate(zip(array.shape, array.chunks)):
        start, stop, _ = region[axis].indices(size) if axis < len(region) else (0, size, 1)
        touched.append(range(start // chunk, -(-stop // chunk)) if stop > start else range(0))
    for place in product(*touched):
        number = 0
        for index, count in zip(place, grid):
            number = number * count + index
        yield number
