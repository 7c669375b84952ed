"""The periodic embedding of a covariance: projection onto the positive semidefinite cone, and exact sampling.

A table of full range, laid out with period (2H-1, 2W-1), is a circulant covariance of which Sigma is a principal
submatrix. The Fourier transform block-diagonalizes it into one Hermitian C x C block a frequency. Where all blocks are
positive semidefinite so is Sigma, and fields with exactly that covariance are filtered white noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgr_kernels.toeplitz import hermitian
from sgr_kernels.toeplitz.constants import recording, wide_dtype
from sgr_kernels.toeplitz.cosines import periodic_frequencies
from sgr_kernels.toeplitz.geometry import Size, signed_from_table


def _blocks(table: Tensor, size: Size, form: str) -> Tensor:
    """One C x C block a frequency: real, (H, W, C, C), of even tables, Hermitian, (2H-1, W, C, C), of signed ones."""
    wide = table.to(wide_dtype(table.device))
    if form == "even":  # its blocks repeat in mirrored rows
        return periodic_frequencies(periodic_frequencies(wide, size[1], -1), size[0], -2).permute(2, 3, 0, 1)
    signed = signed_from_table(wide, size, form)
    return torch.fft.rfft2(torch.fft.ifftshift(signed, (-2, -1))).permute(2, 3, 0, 1)


def _mirror(blocks: Tensor, size: Size) -> Tensor:
    """Restore the mirrored rows of an even table's blocks, frequencies last: (C, C, 2H-1, W)."""
    if blocks.shape[0] < 2 * size[0] - 1:
        blocks = torch.cat([blocks, blocks[1:].flip(0)])
    return blocks.permute(2, 3, 0, 1)


def _eigh(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of Hermitian blocks; PyTorch's solver lets the host wait for a GPU."""
    if blocks.shape[-1] == 1:
        return (blocks.real if blocks.is_complex() else blocks)[..., 0], torch.ones_like(blocks)
    if recording():
        eigenvalues, vectors = hermitian.eigh(blocks.flatten(0, -3))
        return eigenvalues.view(blocks.shape[:-1]), vectors.reshape(blocks.shape)
    return torch.linalg.eigh(blocks)


def clip(table: Tensor, size: Size, form: str) -> Tensor:
    """Project the periodic embedding onto the positive semidefinite cone; a table of full range, same form, float64.

    Args:
        table: (C, C, h, w) or (C, C, 2h-1, 2w-1), symmetric.
        size: Image size (H, W).
        form: ``"even"`` or ``"signed"``.
    """
    height, width = size
    if form == "even":
        projected = _positive_part(_even_blocks(hermitian.pack(table.to(wide_dtype(table.device))), size))
        return hermitian.unpack(_even_blocks(projected, size)) / ((2 * height - 1) * (2 * width - 1))
    eigenvalues, vectors = _eigh(_blocks(table, size, form))
    projected = (vectors * eigenvalues.clamp(min=0)[..., None, :]) @ vectors.mH
    signed = torch.fft.irfft2(projected.permute(2, 3, 0, 1), s=(2 * height - 1, 2 * width - 1))
    return torch.fft.fftshift(signed, (-2, -1))


def _even_blocks(entries: Tensor, size: Size) -> Tensor:
    """Entries (n, h, w) of even tables to those of their blocks, (n, H, W), or back, up to a factor of the period."""
    return periodic_frequencies(periodic_frequencies(entries, size[1], -1), size[0], -2)


def _positive_part(entries: Tensor) -> Tensor:
    projected = hermitian.positive_part(entries)
    if projected is not None:
        return projected
    eigenvalues, vectors = _eigh(hermitian.unpack(entries).permute(2, 3, 0, 1))
    return hermitian.pack(((vectors * eigenvalues.clamp(min=0)[..., None, :]) @ vectors.mH).permute(2, 3, 0, 1))


def square_root(table: Tensor, size: Size, form: str, tolerance: float = 1e-6) -> Tensor | None:
    """Frequency response (C, C, 2H-1, W) of the filter that turns white noise into draws; None if there is none.

    There is none where a block has an eigenvalue below ``-tolerance`` times the largest.
    """
    eigenvalues, vectors = _eigh(_blocks(table, size, form))
    if bool(eigenvalues.min() < -tolerance * eigenvalues.abs().max()):
        return None
    root = (vectors * eigenvalues.clamp(min=0).sqrt()[..., None, :]) @ vectors.mH
    # The transform over j - i of E[x(i) x(j)] is the conjugate of the filter's power.
    return _mirror(root, size).conj()


def draw(root: Tensor, n: int, size: Size, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Draw ``n`` zero-mean Gaussian fields (n, C, H, W) by filtering white noise with a `square_root`."""
    period = (2 * size[0] - 1, 2 * size[1] - 1)
    white = torch.randn((n, root.shape[0], *period), generator=generator, device=root.device, dtype=dtype)
    field = torch.einsum("cdkl,ndkl->nckl", root.to(dtype.to_complex()), torch.fft.rfft2(white))
    return torch.fft.irfft2(field, s=period)[..., : size[0], : size[1]].contiguous()
