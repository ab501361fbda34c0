"""Checksums of a blosc2 array's chunks, kept in its own file: whatever is read is what was written.

A file's variable-length metadata hold, as ``cfcl_checksums``, JSON: shape, chunks, blocks, type and the CRC-32 of every
compressed chunk. Files without it, written by others, are read as they are.
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
#: What the header of a file says that holds an expression or a function, which some versions of blosc2 run on opening.
RUNNABLE = (b"LazyArray", b"b2o", b"proxy-source")
#: No header of an array is longer.
HEADER_BYTES = 1 << 16


def check_plain(file: Path) -> None:
    """Make sure that a file holds numbers alone, before blosc2 opens it.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something to be run.
    """
    with open(file, "rb") as content:
        head = content.read(HEADER_BYTES)
    # big-endian, after the mark of the format
    header = head[: int.from_bytes(head[11:15], "big")]
    if found := [name.decode() for name in RUNNABLE if name in header]:
        raise ValueError(f"it holds a {found[0]}, no plain array")


def write_checksums(array: blosc2.NDArray) -> None:
    """Write the checksums of an array, which is not to be written to any more, into its file."""
    sums = [zlib.crc32(array.schunk.get_chunk(number)) for number in range(array.schunk.nchunks)]
    text = json.dumps({**_header(array), "chunk_sums": sums})
    array.schunk.vlmeta[KEY] = [zlib.crc32(text.encode()), text]


def add_checksums(file: Path) -> None:
    """`write_checksums` of a finished file; its chunks stay as they are."""
    write_checksums(blosc2.open(urlpath=str(file), mode="a"))


def check_header(array: blosc2.NDArray) -> None:
    """Make sure that shape, chunks and type are those that were written.

    Raises:
        ValueError: they are not.
    """
    _sealed(array)


def check_seal(array: blosc2.NDArray, region: Sequence[slice], sound: set[int]) -> None:
    """Make sure that the chunks of a region are those that were written.

    Args:
        array: in its file.
        region: slices of its axes; further axes are whole.
        sound: numbers of the chunks that were found sound, or without a checksum, before; those found now are added.

    Raises:
        ValueError: a chunk is another.
    """
    new = [number for number in _chunks_of(array, region) if number not in sound]
    # reading the checksums takes longer than most boxes
    content = _sealed(array) if new else None
    for number in new:
        if content is not None and zlib.crc32(array.schunk.get_chunk(number)) != content["chunk_sums"][number]:
            raise ValueError(f"the checksum of chunk {number} is wrong")
        sound.add(number)


def damage(file: Path, fix: str, error: Exception) -> UserError:
    """Error about a file that cannot be read."""
    return UserError(f"{file} cannot be read, it is damaged or not there ({first_line(error)})", fix)


@contextmanager
def damage_named(file: Path, fix: str) -> Iterator[None]:
    """What goes wrong with a file within the block is told of it, with what mends it.

    Raises:
        UserError: anything went wrong.
    """
    with foreign_errors_as(lambda error: damage(file, fix, error)):
        yield


def _header(array: blosc2.NDArray) -> dict[str, Any]:
    return {"shape": list(array.shape), "chunks": list(array.chunks), "blocks": list(array.blocks),
            "type": str(array.dtype)}


def _sealed(array: blosc2.NDArray) -> dict[str, Any] | None:
    """What was written; None where nothing was."""
    if KEY not in array.schunk.vlmeta:
        return None
    checksum, text = array.schunk.vlmeta[KEY]
    if zlib.crc32(text.encode()) != checksum:
        raise ValueError("the checksum of its checksums is wrong")
    content: dict[str, Any] = json.loads(text)
    found = _header(array)
    if any(content[key] != found[key] for key in found) or len(content["chunk_sums"]) != array.schunk.nchunks:
        raise ValueError(f"its header says {found}, it was written as {content['shape']}")
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
