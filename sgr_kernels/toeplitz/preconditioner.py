"""An easily inverted approximation of a block-Toeplitz matrix: block diagonal in a basis of the matrix's own.

Along each axis the basis U are the eigenvectors of a one-dimensional covariance, that of single lines or that of the
sums across them: cosines, nearly, that meet the image's edges as the matrix has it, where a circulant's waves go
around. Of ``(U x U)^T Sigma (U x U)`` one C x C block a frequency is kept, so that ``M = (U x U) D (U x U)^T`` is
positive definite wherever Sigma is, whatever Sigma is; and its inverse, its roots and its determinant are known. The
determinant is no less than Sigma's (Fischer), and of the two bases the one with the smaller is nearer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgr_kernels.toeplitz.geometry import Size, displacement_index, signed_from_table


class Preconditioner:
    """M for the matrix of a table.

    Args:
        table: (C, C, h, w), or signed (C, C, 2h-1, 2w-1), of a symmetric matrix, in the widest type.
        size: Image size (H, W).
        form: ``"even"`` or ``"signed"``.
        dtype: Of the images that it is applied to.

    Attributes:
        log_determinant: Of M, a number.
    """

    def __init__(self, table: Tensor, size: Size, form: str, dtype: torch.dtype) -> None:
        even = _even_part(table, size, form)
        lines = even[..., :, 0], even[..., :, 0, :]
        sums = even @ _overlaps(size[1], even), even.mT @ _overlaps(size[0], even)
        found = [_factorized(even, _basis(down), _basis(across)) for down, across in (lines, sums)]
        self.log_determinant, rows, columns, factor = min(found, key=lambda each: each[0])
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        whitening = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        self._rows, self._columns = rows.to(dtype), columns.to(dtype)
        self._inverse = (whitening.mT @ whitening).permute(2, 3, 0, 1).to(dtype).contiguous()
        self._whitening = whitening.permute(2, 3, 0, 1).to(dtype).contiguous()

    def inverse(self, images: Tensor) -> Tensor:
        """``M^-1 r`` for images (B, C, H, W), in their dtype."""
        return self._synthesis(_mixed(self._inverse, self._analysis(images))).to(images.dtype)

    def whiten(self, images: Tensor) -> Tensor:
        """``W r`` with ``W^T W = M^-1``: frequencies (B, C, H, W)."""
        return _mixed(self._whitening, self._analysis(images)).to(images.dtype)

    def spread(self, frequencies: Tensor) -> Tensor:
        """``W^T z``, the adjoint of `whiten`."""
        return self._synthesis(_mixed(self._whitening.transpose(0, 1), frequencies)).to(frequencies.dtype)

    def _analysis(self, images: Tensor) -> Tensor:
        return self._rows.mT @ (images.to(self._columns.dtype) @ self._columns)

    def _synthesis(self, frequencies: Tensor) -> Tensor:
        return self._rows @ (frequencies.to(self._columns.dtype) @ self._columns.mT)


def _even_part(table: Tensor, size: Size, form: str) -> Tensor:
    """The part of a table that is even in dy and in dx, of full range, (C, C, H, W): all that real bases see."""
    signed = signed_from_table(table, size, form)
    for dim, extent in ((-2, size[0]), (-1, size[1])):
        ahead, behind = signed.narrow(dim, extent - 1, extent), signed.narrow(dim, 0, extent).flip(dim)
        signed = (ahead + behind) / 2
    return signed


def _overlaps(length: int, like: Tensor) -> Tensor:
    """Pairs of positions of an axis at each displacement, (length,)."""
    counts = 2 * torch.arange(length, 0, -1, dtype=like.dtype, device=like.device)
    return torch.cat([counts[:1] / 2, counts[1:]])


def _factorized(even: Tensor, rows: Tensor, columns: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    """``log det M`` in bases of the axes, the bases, and Cholesky's factors of D, (H, W, C, C)."""
    blocks = (_correlations(rows).mT @ even @ _correlations(columns)).permute(2, 3, 0, 1)
    factor, failed = torch.linalg.cholesky_ex(blocks)
    # Only where Sigma itself is not positive definite; M stays so.
    largest = blocks.diagonal(dim1=-2, dim2=-1).amax().clamp(min=torch.finfo(blocks.dtype).tiny)
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    factor = torch.where(failed[..., None, None] == 0, factor, largest.sqrt() * identity)
    return 2 * float(factor.diagonal(dim1=-2, dim2=-1).log().sum()), rows, columns, factor


def _basis(covariances: Tensor) -> Tensor:
    """Eigenvectors (N, N) of the mean of the channels' covariances (C, C, N) along an axis."""
    length = covariances.shape[-1]
    profile = covariances.diagonal(dim1=0, dim2=1).mean(-1)
    return torch.linalg.eigh(profile[displacement_index(length, profile.device).abs()])[1]


def _correlations(basis: Tensor) -> Tensor:
    """Sums over pixel pairs of the products of each vector with itself, by displacement: (displacements, vectors)."""
    length = len(basis)
    padded = torch.fft.rfft(basis, n=2 * length, dim=0)
    sums = torch.fft.irfft(padded.abs().square(), n=2 * length, dim=0)[:length]
    return torch.cat([sums[:1], 2 * sums[1:]])  # pairs of either order


def _mixed(blocks: Tensor, frequencies: Tensor) -> Tensor:
    """Multiply channels within each frequency: (C, C, H, W) by (B, C, H, W)."""
    total = blocks[:, 0] * frequencies[:, :1]
    for channel in range(1, blocks.shape[1]):
        total.addcmul_(blocks[:, channel], frequencies[:, channel : channel + 1])
    return total
