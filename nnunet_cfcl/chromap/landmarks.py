"""Landmarks of a cloud of points, and interpolation from the landmarks to any other point.

UMAP places a few thousand points in the plane; placing 10^8 voxels would take days. A voxel gets a weighted mean of the
places of its nearest landmarks instead.

Cost of one point among L landmarks in k dimensions: 2 (k + 2) L operations for the products, and one write and one read
of L numbers, in cache. For k = 8, L = 2000 that is 40,000 operations and 16 kB, 0.6 microseconds on one core with
AVX-512; 1.6 microseconds in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Points that are drawn from a larger cloud before landmarks are chosen.
CLOUD = 200_000
#: Bytes of the products of one block of points. On CPUs a block should lie in cache, on GPUs launches should be few.
CPU_BLOCK, DEVICE_BLOCK = 4 * 2**20, 64 * 2**20
#: Landmarks of one group; groups are ranked by their smallest distance first.
GROUP = 16
#: Greatest distance, in disc radii, of a neighbour's place from that of the nearest landmark.
REACH = 0.25
#: Largest coordinate of points, so that their squares are finite.
FAR = 1e15
#: Above and below all squared distances that are distinguished.
NONE, LEAST = 3e38, 1e-30


def choose_landmarks(features: Tensor, count: int, seed: int = 0) -> Tensor:
    """Choose points all over a cloud, rare parts included.

    The seeding of k-means++ (Arthur and Vassilvitskii 2007): each landmark is drawn with a probability proportional to
    the squared distance to the nearest one chosen before. A dense part gets more landmarks than a sparse one of the
    same size, but far less than its share of points.

    Args:
        features: (N, k) finite, of any float type, on any device.
        count: number of landmarks, at least 1.
        seed: the same seed gives the same landmarks for the same data.

    Returns:
        indices, int64, of min(count, different points) different points, on the CPU.

    Raises:
        ValueError: no points.
    """
    if features.ndim != 2 or not len(features) or count < 1:
        raise ValueError(f"expected features (N, k) and a count above 0, found {tuple(features.shape)}, {count}")
    generator = torch.Generator().manual_seed(seed)
    cloud = features.detach().float().cpu()
    drawn = torch.randperm(len(cloud), generator=generator)[:CLOUD] if len(cloud) > CLOUD else torch.arange(len(cloud))
    cloud = (cloud[drawn] - cloud.mean(0)).contiguous()
    norms, draws = (cloud * cloud).sum(1), torch.rand(count, generator=generator, dtype=torch.float64)
    # what rounding leaves of the distance between equal points
    floor = 1e-5 * (norms.mean() + norms)
    chosen, nearest = [int(draws[0] * len(cloud))], torch.full_like(norms, torch.inf)
    for draw in draws[1:]:
        newest = chosen[-1]
        torch.minimum(nearest, torch.addmv(norms, cloud, cloud[newest], alpha=-2).add_(norms[newest]), out=nearest)
        nearest[newest] = 0
        summed = torch.where(nearest > floor, nearest, 0).cumsum(0, dtype=torch.float64)
        if not summed[-1] > 0:
            break
        chosen.append(int(torch.searchsorted(summed, draw * summed[-1], right=True).clamp_max(len(cloud) - 1)))
    return drawn[torch.tensor(chosen)]


def extend(
    points: Tensor, landmarks: Tensor, positions: Tensor, neighbours: int = 4, *, reach: float = REACH,
    block_bytes: int | None = None,
) -> Tensor:
    """Interpolate places of points in the plane from those of their nearest landmarks.

    The weight of a neighbour is (1 / d - 1 / d_last)^2, d its distance and d_last that of the last neighbour (Franke
    and Little's modification of Shepard's method): the weight of the last one is 0, so that a place changes
    continuously where another landmark comes in. Neighbours whose places are farther than ``reach`` from that of the
    nearest one are left out: UMAP separated them, and no data lie between. A point on a landmark gets its place.

    Args:
        points: (M, k) of any float type. Infinite coordinates count as very large ones, NaN as 0.
        landmarks: (L, k), L >= 1, on any device.
        positions: (L, 2) in the plane.
        neighbours: number of landmarks per point, at least 1; at most L are used.
        reach: greatest distance, in the plane, of a neighbour's place from that of the nearest landmark.
        block_bytes: bound of the largest temporary; one point at least is taken at a time.

    Returns:
        (M, 2) float32, finite, on the points' device.
    """
    device = points.device
    landmarks, positions = landmarks.to(device, torch.float32), positions.to(device, torch.float32)
    centre = landmarks.mean(0)
    landmarks = landmarks - centre
    search = _Search(landmarks, min(neighbours, len(landmarks)), block_bytes)
    places = torch.empty((len(points), 2), device=device)
    for start in range(0, len(points), search.columns):
        block = points[start:start + search.columns].float()
        block = (block - centre).nan_to_num_(0, FAR, -FAR).clamp_(-FAR, FAR)
        near = search.nearest(block)
        places[start:start + search.columns] = _mean_place(block, landmarks[near], positions[near], reach)
    return places


class _Search:
    """Search for the nearest landmarks of blocks of points, with one buffer for all blocks.

    Landmark i is number i // n of group i % n. The nearest K landmarks lie in those K groups whose smallest distances
    are smallest, so that of all other groups only the minimum is computed.

    Args:
        landmarks: (L, k) float32.
        wanted: K, at most L.
        block_bytes: bound of the buffer; None: by the device.
    """

    def __init__(self, landmarks: Tensor, wanted: int, block_bytes: int | None) -> None:
        count, width = landmarks.shape
        self._wanted = wanted
        self._size = GROUP if count >= GROUP * max(wanted, GROUP) else 1
        self._groups = -(-count // self._size)
        padded = landmarks.new_zeros(self._size * self._groups, width + 2)
        # |l - p|^2 is one product of (-2 l, |l|^2, 1) and (p, 1, |p|^2); where a group has no landmark left, a number
        # that no distance reaches
        padded[:, width] = NONE
        padded[:count, :width] = -2 * landmarks
        padded[:count, width] = (landmarks * landmarks).sum(1)
        padded[:count, width + 1] = 1
        self._factors = padded
        if block_bytes is None:
            block_bytes = CPU_BLOCK if landmarks.device.type == "cpu" else DEVICE_BLOCK
        columns = max(1, block_bytes // (4 * len(padded)))
        # rows a multiple of 4 KiB apart fall on the same lines of the cache, which takes three times as long
        self.columns = columns if columns < 32 else columns // 32 * 32 - 16
        self._buffer = landmarks.new_empty(len(padded) * self.columns)

    def nearest(self, block: Tensor) -> Tensor:
        """Indices (B, K) of the landmarks nearest to points (B, k), B <= ``columns``."""
        count, size, groups = len(block), self._size, self._groups
        columns = torch.cat([block, block.new_ones(count, 1), (block * block).sum(1, keepdim=True)], 1).T
        squares = self._buffer[:len(self._factors) * count].view(-1, count)
        torch.mm(self._factors, columns, out=squares)
        if size == 1:
            return _smallest(squares, self._wanted).T
        grouped = squares.view(size, groups, count)
        best = _smallest(grouped.amin(0), self._wanted)
        picked = _smallest(grouped.gather(1, best.expand(size, -1, -1)).view(-1, count), self._wanted)
        number = picked // self._wanted
        return (number * groups + best.gather(0, picked - number * self._wanted)).T


def _smallest(values: Tensor, count: int) -> Tensor:
    """Rows (count, B), int64, of the smallest values of each column (R, B), in ascending order; not negative ones.

    The last bits of a number are replaced by its row, so that a plain minimum, as fast as memory, gives both;
    torch's topk and argmin take 3 to 10 times as long. Values that differ by less than R / 2^22 of themselves may
    change places.
    """
    mask = (1 << (len(values) - 1).bit_length()) - 1
    rows = torch.arange(len(values), dtype=torch.int32, device=values.device)[:, None]
    # zero would become a denormal number, which some processors are told to flush
    marked = values.clamp_min(LEAST).view(torch.int32).bitwise_and_(~mask).bitwise_or_(rows).view(torch.float32)
    found = torch.empty((count, values.shape[1]), dtype=torch.int64, device=values.device)
    for number in range(count):
        smallest = marked.amin(0, keepdim=True)
        row = found[number:number + 1].copy_(smallest.view(torch.int32).bitwise_and_(mask))
        if number + 1 < count:
            marked.scatter_(0, row, torch.inf)
    return found


def _mean_place(block: Tensor, near: Tensor, places: Tensor, reach: float) -> Tensor:
    """Places (B, 2) of points (B, k) from their neighbours (B, K, k) with places (B, K, 2)."""
    # differences are exact where the products above lost digits
    distances = (near - block[:, None]).pow_(2).sum(2).sqrt_()
    tiny = torch.finfo(torch.float32).tiny
    first = distances.min(1, keepdim=True)
    centre = places.gather(1, first.indices[:, :, None].expand(-1, 1, 2))
    last = distances.amax(1, keepdim=True)
    # (1 / d - 1 / d_last) d_first, finite also on a landmark; where all are equally far, all count alike
    weights = (first.values + tiny) / (distances + tiny) * (1 + 1e-6 - distances / (last + tiny))
    away = places - centre
    weights = torch.where((away * away).sum(2) > reach * reach, 0, weights.pow_(2))
    return centre[:, 0] + (away * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)
