"""Where a kernel finds its inputs and puts its outputs: plain numbers, computed once a shape.

The kernels work on tiles of as many output positions as a vector has lanes. An input that lies
right makes each weight's inputs for a tile one plain vector load, whatever stride and dilation:
pictures are padded and split into phases, one for each remainder by the stride, so that kernel
position k of output position p lies at p + tap(k). A tile is any run of positions in that plane;
lanes that fall on no output are dropped.

Pictures lie one after the other, or, where they are small, position after position of all.
A linear layer is a convolution of pictures of one position.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from .rows import row_bytes

REMEMBERED = 512  # shapes whose numbers are kept
LARGE = 2**14  # output positions of a picture, from which on its tiles are all but full
IDLE = 0.07  # share of the time of all threads but one that may be lost at the end


@dataclass(frozen=True)
class Geometry:
    """One convolution of one batch; pairs are (vertical, horizontal).

    Attributes:
        batch, channels: of the input.
        size: height and width of the input.
        kernel, stride, dilation: of the layer.
        before, after: zeros around the input.
        groups: of the convolution.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    groups: int = 1

    @cached_property
    def output(self) -> tuple[int, int]:
        """Height and width of the output; 0 where the kernel does not fit."""
        whole = (self.size[i] + self.before[i] + self.after[i] for i in (0, 1))
        reach = (self.dilation[i] * (self.kernel[i] - 1) for i in (0, 1))
        sizes = ((w - r - 1) // s + 1 for w, r, s in zip(whole, reach, self.stride, strict=True))
        return tuple(max(0, size) for size in sizes)  # type: ignore[return-value]

    @cached_property
    def positions(self) -> int:
        """Output positions of the whole batch."""
        return self.batch * self.output[0] * self.output[1]

    @cached_property
    def phases(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The remainders by the stride that the kernel's positions have."""
        found = []
        for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True):
            found.append(tuple(sorted({d * place % s for place in range(k)})))
        return found[0], found[1]

    @cached_property
    def plane(self) -> tuple[int, int]:
        """Height and width of one phase of one channel."""
        walk = zip(self.kernel, self.stride, self.dilation, strict=True)
        reach = (d * (k - 1) // s for k, s, d in walk)
        return tuple(o + r for o, r in zip(self.output, reach, strict=True))  # type: ignore

    @cached_property
    def reach(self) -> int:
        """From the first to the last place that an output position reads in a phase."""
        down, right = (p - o for p, o in zip(self.plane, self.output, strict=True))
        return down * self.plane[1] + right


@dataclass(frozen=True, eq=False)
class Tiling:
    """How the batch of a `Geometry` is cut into tiles.

    Attributes:
        joined: whether one image of the kernel's is the whole batch, and not one picture.
        starts: (tiles,) int64, where the tiles of an image begin in the input.
        targets: (tiles, lanes) int64, the output positions of their lanes; -1 for none.
    """

    joined: bool
    starts: np.ndarray
    targets: np.ndarray


@lru_cache(REMEMBERED)
def tiling(geometry: Geometry, lanes: int) -> Tiling:
    """Return the tiles, the fewest of both ways to lay the pictures."""
    area = geometry.output[0] * geometry.output[1]
    height, width = geometry.plane
    rows, columns = map(np.arange, geometry.output)
    places = (rows[:, None] * width + columns).ravel()
    apart = Tiling(False, *cover(places, np.arange(area), lanes))
    if area >= 4 * lanes or geometry.batch == 1:
        return apart
    images = np.arange(geometry.batch)[:, None]
    inputs, numbers = images * height * width + places, images * area + np.arange(area)
    together = Tiling(True, *cover(inputs.ravel(), numbers.ravel(), lanes))
    return together if len(together.starts) < geometry.batch * len(apart.starts) else apart


@lru_cache(REMEMBERED)
def unused(geometry: Geometry, lanes: int) -> float:
    """Return how many tiles there are over those that the output positions would fill."""
    if math.prod(geometry.output) >= LARGE:
        return 1.0
    cut = tiling(geometry, lanes)
    images = 1 if cut.joined else geometry.batch
    return images * len(cut.starts) / -(-geometry.positions // lanes)


def strips(starts: np.ndarray, behind: int, most: int, images: int, threads: int) -> np.ndarray:
    """Return (strips + 1,) int64: where the strips that the tiles of an image are cut into end.

    A strip has inputs at up to about `most` places, those `behind` its last tile's start included.
    There are as many strips as leave no thread without work for long, while others have some.
    """
    tiles, places = len(starts), int(starts[-1]) + behind

    def idle(count: int) -> float:
        units = images * count
        return -(-units // threads) * threads / units

    least = min(tiles, -(-places // max(1, most)))
    counts = range(least, min(tiles, least + 4 * threads) + 1)
    count = next((c for c in counts if idle(c) < 1 + IDLE), min(counts, key=idle))
    return tiles * np.arange(count + 1, dtype=np.int64) // count


def cover(places: np.ndarray, numbers: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, targets) of the fewest runs of `lanes` places that cover the rising `places`.

    A lane's target is the number of its place, -1 if that is not one of `places`.
    """
    starts, targets, done = [], [], 0
    while done < len(places):
        start = places[done]
        end = int(np.searchsorted(places, start + lanes))
        target = np.full(lanes, -1)
        target[places[done:end] - start] = numbers[done:end]
        starts.append(start)
        targets.append(target)
        done = end
    return np.array(starts, np.int64), np.array(targets, np.int64).reshape(-1, lanes)


def taps(
    geometry: Geometry, order: tuple[int, int, bool], channel_step: int, item: int
) -> np.ndarray:
    """Return (S, places) int64: how many bytes behind a tile's start segment s's inputs lie.

    `order` is (S, n, whether positions come before channels), of one group of the convolution;
    `item` the bytes of a value. Behind n they are negative.
    """
    S, n, by_position = order
    area = geometry.kernel[0] * geometry.kernel[1]
    shape = (n, S) if by_position else (S, n)
    numbers = np.arange(S * n, dtype=np.int64).reshape(shape)
    numbers = numbers.T if by_position else numbers
    channel, place = np.divmod(numbers, area)
    y, x = np.divmod(place, geometry.kernel[1])
    width = geometry.plane[1]
    pictures = channel_step // (len(geometry.phases[0]) * len(geometry.phases[1]))
    row = phase_of(geometry, 0, y) * len(geometry.phases[1]) + phase_of(geometry, 1, x)
    found = channel * channel_step + row * pictures
    found += (geometry.dilation[0] * y // geometry.stride[0]) * width
    found += geometry.dilation[1] * x // geometry.stride[1]
    padded = np.full((S, 8 * row_bytes(n)), -1, np.int64)
    padded[:, :n] = item * found
    return padded


def phase_of(geometry: Geometry, axis: int, place: np.ndarray) -> np.ndarray:
    """Return which phase kernel positions `place` along `axis` read."""
    remainder = geometry.dilation[axis] * place % geometry.stride[axis]
    return np.searchsorted(geometry.phases[axis], remainder)


def overlap(geometry: Geometry, axis: int, remainder: int) -> tuple[int, int, int]:
    """Return where in a phase the input begins along one axis, where in the input, how many.

    From one to the next it is 1 in the phase, the stride in the input.
    """
    stride, before, size = (
        pair[axis] for pair in (geometry.stride, geometry.before, geometry.size)
    )
    first = max(0, -(-(before - remainder) // stride))  # of the phase, that is no padding
    begin = remainder + stride * first - before
    return first, begin, max(0, min(geometry.plane[axis] - first, -(-(size - begin) // stride)))
