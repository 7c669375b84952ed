"""What the launchers decide before a launch: operand types, tile sizes, and the bases that the kernels read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgr_kernels.toeplitz.constants import constant
from sgr_kernels.toeplitz.geometry import Size
from sgr_kernels.toeplitz.spectrum import basis

# Operand type and number of terms of a float32 product: three float16 products have float32's accuracy; one has that
# of tf32 (float16 and tf32 have significands of the same length, and the data are scaled) at twice its speed.
PRECISIONS = {"highest": (torch.float16, 3), "high": (torch.float16, 1), "medium": (torch.bfloat16, 1)}

_OPERANDS = 48  # registers of a thread for those that stay; as many hold sums


@dataclass(frozen=True)
class Operands:
    """How matrix operands are held: their type, the terms that make one up, and what results are summed in."""

    dtype: torch.dtype
    terms: int
    total: torch.dtype

    @staticmethod
    def of(gradient: torch.dtype, precision: str) -> Operands:
        """Operands for a gradient's dtype; ``precision`` as in `torch.set_float32_matmul_precision`."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
        if gradient == torch.float64:
            return Operands(torch.float64, 1, torch.float64)
        return Operands(*PRECISIONS[precision], torch.float32)


def padded(value: int, multiple: int) -> int:
    """The smallest multiple not below ``value``."""
    return -(-value // multiple) * multiple


def power_of_two(value: int) -> int:
    """The smallest power of two not below ``value``."""
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """Sizes of a fused kernel: pixels from the centre out, padded frequencies, row parities served at once."""

    t: int
    rows: int
    columns: int
    parities: int

    @property
    def warps(self) -> int:
        """One for every parity and 16 column frequencies."""
        return 2 * self.parities * self.columns // 16

    def programs(self, batch: int, device: torch.device) -> int:
        """That share a batch: for the smaller images as many as a GPU runs at once, each of which loads bases once."""
        if self.t > 16:
            return batch
        cuda = device.type == "cuda" and torch.cuda.is_available()
        return min(batch, 2 * torch.cuda.get_device_properties(device).multi_processor_count if cuda else 2)

    @staticmethod
    def fitting(size: Size, frequencies: Size, channels: int, signed: bool) -> Tile | None:
        """The tile that holds one image in registers; None if there is none."""
        t = 16 if max(size) <= 32 else 32
        columns = max(16, power_of_two(frequencies[1]))
        parities = 1 if columns == 64 else 2
        fits = max(size) <= 64 and columns <= 2 * t and channels <= (4 if t == 16 and not signed else 3)
        if not fits or (signed and t == 32):
            return None
        return Tile(t, padded(frequencies[0], 16), columns, parities)


@dataclass(frozen=True)
class Columns:
    """Sizes of the kernel for the columns of larger images: runs of pixels from the centre out, a warp each."""

    parities: int
    runs: int
    block: int

    @property
    def t(self) -> int:
        """Pixels from the centre out, padded."""
        return self.runs * self.block

    @staticmethod
    def fitting(size: Size, frequencies: Size, channels: int, signed: bool) -> Columns | None:
        """Sizes that hold 16 column frequencies of all channels in registers; None if there are none.

        Of a thread, ``channels * block / 2`` registers hold operands, and as many sums.
        """
        t = max(16, power_of_two((size[0] + 1) // 2))
        if signed or channels > 4 or frequencies[1] * max(size[0], 2 * frequencies[0]) >= 2**26:
            return None
        for parities in (2, 1):
            runs = min(t // 16, 8 // parities)
            if channels * (t // runs) // 2 <= _OPERANDS:
                return Columns(parities, runs, t // runs)
        return None


@dataclass(frozen=True)
class Arrangement:
    """How a spectrum lies for the kernels: see `arranged`."""

    parts: int
    channels: int
    symmetric: bool
    tiles: Size

    @property
    def pairs(self) -> int:
        """Of channels and parts, in a tile."""
        square = self.channels * self.channels
        return (square + self.channels) // 2 if self.symmetric and self.parts == 1 else self.parts * square

    @staticmethod
    def fitting(size: Size, frequencies: Size, channels: int, signed: bool, symmetric: bool) -> Arrangement | None:
        """What the kernels for images of a size read, in float32; None where they read the spectrum as it is."""
        tile = Tile.fitting(size, frequencies, channels, signed)
        if tile is None and Columns.fitting(size, frequencies, channels, signed) is None:
            return None
        columns = padded(frequencies[1], 16) if tile is None else tile.columns
        return Arrangement(4 if signed else 1, channels, symmetric, (padded(frequencies[0], 16) // 16, columns // 16))

    @property
    def words(self) -> int:
        """Numbers that it takes."""
        return self.tiles[0] * self.tiles[1] * (256 * self.pairs + 1)


def exponent(frequencies: int, operands: Operands) -> int:
    """Power of two by which a basis is multiplied, so that its smallest terms stay clear of float16's limit."""
    return 0 if operands.dtype == torch.float64 else 6 + round(math.log2(frequencies) / 2)


@constant
def split_basis(
    extent: int, frequencies: int, shape: Size, width: int, operands: Operands, device: torch.device
) -> Tensor:
    """`spectrum.basis` from the centre out, by parity, padded to ``shape`` (T, F), in operands: all that kernels read.

    Lies as they read it, ``width`` frequencies a tile: (terms, 2, F / width, T, width). Two terms, high and low, where
    operands have three products; one otherwise.
    """
    wide = torch.float64
    outward = basis(extent, frequencies, wide, device)[extent // 2 :]
    by_parity = outward.unflatten(1, (2, frequencies)).movedim(1, 0) * 2.0 ** exponent(frequencies, operands)
    pad = (0, shape[1] - frequencies, 0, shape[0] - by_parity.shape[1])
    whole = torch.nn.functional.pad(by_parity, pad).unflatten(2, (-1, width)).movedim(2, 1).contiguous()
    high = whole.to(operands.dtype)
    if operands.terms == 1:
        return high[None].contiguous()
    return torch.stack([high, (whole - high.to(wide)).to(operands.dtype)])


def gain(frequencies: Size, operands: Operands) -> float:
    """What undoes the scale of the bases of two axes."""
    return 2.0 ** -(exponent(frequencies[0], operands) + exponent(frequencies[1], operands))
