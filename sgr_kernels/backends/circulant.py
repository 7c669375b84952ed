"""Products by one real Fourier transform an image: pad to a period, multiply by the circulant's real spectrum, crop.

For even tables. On GPUs: there `torch_spectral` takes large images through it, whose matrix products grow with the
cube of a side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgr_kernels.toeplitz.cosines import odd_displacements
from sgr_kernels.toeplitz.geometry import Size

_SCRATCH_BYTES = 256 << 20
_FACTORS = (2, 3, 5, 7)


def smooth_length(least: int) -> int:
    """The smallest length from ``least`` on that has no prime factor above 7: what Fourier transforms are fast for."""
    length = max(1, least)
    while True:
        rest = length
        for p in _FACTORS:
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return length
        length += 1


def table_from_spectrum(spectrum: Tensor, size: Size) -> Tensor:
    """The even table (..., h, w) of a spectrum (..., Fh, Fw) of images of a size, float64; as long as it can be.

    Odd frequencies are orthogonal on displacements below their number: what `spectrum_from_table` made is recovered.
    """
    table = spectrum.double()
    for dim, extent in zip((-2, -1), size):
        frequencies = spectrum.shape[dim]
        reach = min(extent, frequencies, 2 * frequencies - extent + 1)
        sums = odd_displacements(table, reach, "even", dim) / (2 * frequencies)
        table = torch.cat([2 * sums.narrow(dim, 0, 1), sums.narrow(dim, 1, reach - 1)], dim)
    return table


class Circulant:
    """The circulant of which Sigma is a principal submatrix, as its real Fourier transform."""

    def __init__(self, spectrum: Tensor, size: Size, dtype: torch.dtype) -> None:
        table = table_from_spectrum(spectrum, size)
        self.size = size
        self.period = [smooth_length(extent + reach - 1) for extent, reach in zip(size, table.shape[-2:])]
        for dim, length in zip((-2, -1), self.period):
            reach = table.shape[dim]
            gap = length - 2 * reach + 1
            zeros = (0, gap) if dim == -1 else (0, 0, 0, gap)
            table = torch.cat([pad(table, zeros), table.narrow(dim, 1, reach - 1).flip(dim)], dim)
        self.kernel = torch.fft.rfft2(table).real.to(dtype)
        columns = self.kernel.shape[-1]
        self.weight = self.kernel.new_full((columns,), 2.0)  # of a half that stands for the whole
        self.weight[0] = 1.0
        if self.period[1] % 2 == 0:
            self.weight[-1] = 1.0
        self.weight /= self.period[0] * self.period[1]

    def chunk(self, channels: int) -> int:
        """Images at a time."""
        return max(1, _SCRATCH_BYTES // (16 * channels * self.kernel.shape[-2] * self.kernel.shape[-1]))

    def apply(self, images: Tensor, with_form: bool, with_product: bool) -> tuple[Tensor | None, Tensor | None]:
        """Q (n,) and v (n, C, H, W) of images in the compute dtype, as far as they are asked for."""
        z = torch.view_as_real(torch.fft.rfft2(images, s=self.period))  # (n, C, Ph, Pw/2+1, 2)
        if images.shape[1] > 4:
            y = torch.einsum("cdkl,ndklr->ncklr", self.kernel, z)
        else:
            y = torch.empty_like(z)
            for c, row in enumerate(self.kernel[..., None].unbind(0)):
                mixed = torch.mul(z[:, 0], row[0], out=y[:, c])
                for d in range(1, images.shape[1]):
                    mixed.addcmul_(z[:, d], row[d])
        q = (z * y).sum((1, 2, 4)) @ self.weight if with_form else None
        if not with_product:
            return q, None
        v = torch.fft.irfft2(torch.view_as_complex(y), s=self.period)
        return q, v[..., : self.size[0], : self.size[1]]
