"""Writing of the store's blosc2 files, a few planes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.chunk_checksums import write_checksums

COMPRESSION = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1}


def layout_of(chunks: Sequence[int] | None, blocks: Sequence[int] | None) -> dict[str, Any]:
    """Chunk and block shapes as arguments of blosc2."""
    return {"chunks": tuple(chunks) if chunks else None, "blocks": tuple(blocks) if blocks else None}


def replace_together(
    files: Sequence[Path], write: Callable[[Sequence[Path]], None], opened: tuple[Path, ...] = ()
) -> None:
    """`replace_atomically` for several files that one function writes."""
    if len(opened) == len(files):
        write(opened)
    else:
        replace_atomically(
            files[len(opened)], lambda temporary: replace_together(files, write, (*opened, temporary)))


def write_slabs(
    files: Sequence[Path], shape: tuple[int, ...], slabs: Iterable[NDArray[np.floating]], layout: Mapping[str, Any]
) -> None:
    """Write images of one shape (C, Z, Y, X) from slabs of their planes.

    Args:
        files: K new files.
        shape: shape of every image.
        slabs: (K, C, z, Y, X) from the first plane to the last.
        layout: see `layout_of`.

    Raises:
        ValueError: the slabs do not add up to ``shape``.
    """
    arrays = [blosc2.empty(shape, np.float32, urlpath=str(file), mode="w", cparams=COMPRESSION, **layout)
              for file in files]
    done = 0
    # whole chunks, since every write compresses the whole chunk again
    for slab in _regrouped(slabs, arrays[0].chunks[1]):
        planes = slice(done, done + slab.shape[2])
        if slab.shape != (len(files), shape[0], planes.stop - done, *shape[2:]) or planes.stop > shape[1]:
            raise ValueError(f"a slab of shape {slab.shape} at plane {done} does not fit {len(files)} images {shape}")
        for array, part in zip(arrays, slab, strict=True):
            array[:, planes] = np.ascontiguousarray(part)
        done = planes.stop
    if done != shape[1]:
        raise ValueError(f"the slabs have {done} planes, expected {shape[1]}")
    for array in arrays:
        write_checksums(array)


def _regrouped(slabs: Iterable[NDArray[np.floating]], depth: int) -> Iterator[NDArray[np.float32]]:
    """Regroup planes (axis 2) into slabs of ``depth``, the last one smaller; the yielded buffer is reused."""
    buffer, filled = np.empty(0, np.float32), 0
    for slab in slabs:
        if not buffer.size:
            buffer = np.empty((*slab.shape[:2], depth, *slab.shape[3:]), np.float32)
        while slab.shape[2]:
            part = slab[:, :, : depth - filled]
            buffer[:, :, filled : filled + part.shape[2]] = part
            filled, slab = filled + part.shape[2], slab[:, :, part.shape[2] :]
            if filled == depth:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:, :, :filled]
