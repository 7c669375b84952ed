"""The spectral algorithm in plain PyTorch: four matrix products an image, in chunks that stay in cache.

For every axis ``basis`` holds cosines and sines side by side, so that one product yields all parities:
``Z = A_h^T X A_w`` is (2Fh, 2Fw), its four quadrants the parities. Channels mix frequency by frequency, and
``V = A_h Y A_w^T`` comes back. (Splitting the parities before the products halves the arithmetic but costs two passes
over memory; on CPUs that is no gain up to 64 x 64.) Long axes go through FFT instead, to the same quadrants; on GPUs
products of large images go through one FFT of the whole image (`circulant`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from sgr_kernels.backends.circulant import Circulant
from sgr_kernels.toeplitz import fourier
from sgr_kernels.toeplitz.cosines import by_fft
from sgr_kernels.toeplitz.spectrum import basis, symmetric_part

P = ParamSpec("P")
T = TypeVar("T")

# Of transforms in flight on a CPU: some spill from its second-level cache, but fewer and larger calls win (measured).
_CHUNK_BYTES = 4 << 20
# Frequencies of an axis from which FFT is faster than matrix products, with the passes over memory it costs (measured).
_FFT_FROM = 192
_PIECE = 1 << 16  # elements
# Shorter side of images that GPUs take through one FFT: by arithmetic, not measured. The matrix products of a channel
# image are 48 N^3 operations without tensor cores; the FFT moves some 100 times its bytes.
_CIRCULANT_FROM = 320


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient of ``dtype`` is computed in: float32 or better."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _without_autocast(kernel: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """Keep autocast, which reaches below the dispatcher, from lowering a kernel's matrix products."""

    @functools.wraps(kernel)
    def run(images: Tensor, *args: P.args, **kwargs: P.kwargs) -> T:
        device = images.device.type
        if not torch.is_autocast_enabled(device):
            return kernel(images, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return kernel(images, *args, **kwargs)

    return run


def _chunk(gradient: Tensor, frequencies: int, itemsize: int) -> int:
    """Images whose transforms fit the cache on a CPU; on other devices, what keeps scratch below the input's size."""
    per_image = 8 * frequencies * itemsize * gradient.shape[1]
    if gradient.device.type == "cpu":
        return max(1, _CHUNK_BYTES // max(1, per_image))
    return max(1, (256 << 20) // max(1, per_image))


def _by_pieces(transform: Callable[[Tensor], Tensor], x: Tensor, out: Tensor) -> None:
    """``out.copy_(transform(x))``, so many entries of the first dimension at a time that on CPUs they stay in cache."""
    piece = max(1, _PIECE // max(1, x[:1].numel())) if x.is_cpu else max(1, len(x))
    for start in range(0, len(x), piece):  # of nothing, no transform
        out[start : start + piece].copy_(transform(x[start : start + piece]))


class _Axis:
    """One axis to its frequencies and back: by a matrix product, or by FFT where that is faster."""

    def __init__(self, extent: int, frequencies: int, dtype: torch.dtype, device: torch.device) -> None:
        self.extent, self.frequencies = extent, frequencies
        self.matrix = None if by_fft(frequencies, device, _FFT_FROM) else basis(extent, frequencies, dtype, device)

    def rows_forward(self, planes: Tensor, out: Tensor) -> None:
        """(n, extent, w) to (n, 2F, w)."""
        if self.matrix is None:
            _by_pieces(lambda x: fourier.analyze(x.mT, self.frequencies).mT, planes, out)
        else:
            torch.bmm(self.matrix.mT.expand(planes.shape[0], -1, -1), planes, out=out)

    def rows_inverse(self, planes: Tensor, out: Tensor) -> None:
        """(n, 2F, w) to (n, extent, w)."""
        if self.matrix is None:
            _by_pieces(lambda x: fourier.synthesize(x.mT, self.extent).mT, planes, out)
        else:
            torch.bmm(self.matrix.expand(planes.shape[0], -1, -1), planes, out=out)

    def columns_forward(self, lines: Tensor, out: Tensor) -> None:
        """(n, extent) to (n, 2F)."""
        if self.matrix is None:
            _by_pieces(lambda x: fourier.analyze(x, self.frequencies), lines, out)
        else:
            torch.mm(lines, self.matrix, out=out)

    def columns_inverse(self, lines: Tensor, out: Tensor) -> None:
        """(n, 2F) to (n, extent), rounded to the type of ``out``."""
        if self.matrix is None:
            _by_pieces(lambda x: fourier.synthesize(x, self.extent), lines, out)
        elif out.dtype == lines.dtype:
            torch.mm(lines, self.matrix.mT, out=out)
        else:
            out.copy_(lines @ self.matrix.mT)


class _Transform:
    """Forward and inverse transform of images of one size into given frequencies.

    Every stage has a buffer of its own, written anew by each chunk: results are valid until the next call.
    """

    def __init__(self, gradient: Tensor, frequencies: tuple[int, int]) -> None:
        self.dtype = compute_dtype(gradient.dtype)
        height, width = gradient.shape[-2:]
        self.rows = _Axis(height, frequencies[0], self.dtype, gradient.device)
        self.columns = _Axis(width, frequencies[1], self.dtype, gradient.device)
        self.chunk = _chunk(gradient, frequencies[0] * frequencies[1], self.dtype.itemsize)
        self.quadrants = (2, frequencies[0], 2, frequencies[1])
        batch, channels = min(self.chunk, gradient.shape[0]), gradient.shape[1]
        self._half = gradient.new_empty(batch * channels, height, 2 * frequencies[1], dtype=self.dtype)
        self._whole = gradient.new_empty(batch, channels, 2 * frequencies[0], 2 * frequencies[1], dtype=self.dtype)

    @functools.cached_property
    def mixed(self) -> Tensor:
        """Buffer for `_mix`."""
        return torch.empty_like(self._whole)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) to quadrants (n, C, 2, Fh, 2, Fw)."""
        n, channels, height, width = images.shape
        half, whole = self._half[: n * channels], self._whole[:n]
        self.columns.columns_forward(images.to(self.dtype).reshape(n * channels * height, width), half.flatten(0, 1))
        self.rows.rows_forward(half, whole.flatten(0, 1))
        return whole.view(n, channels, *self.quadrants)

    def inverse(self, quadrants: Tensor, images: Tensor) -> None:
        """Quadrants (n, C, 2, Fh, 2, Fw) to images (n, C, H, W), contiguous, written into ``images``."""
        n, channels, height, width = images.shape
        half = self._half[: n * channels]
        self.rows.rows_inverse(quadrants.reshape(n * channels, 2 * self.rows.frequencies, half.shape[2]), half)
        self.columns.columns_inverse(half.flatten(0, 1), images.view(n * channels * height, width))


def _turn(quadrants: Tensor, axis: int) -> Tensor:
    """Cosine and sine coefficients to sine and minus cosine: an odd part's action along an axis."""
    cosine, sine = quadrants.unbind(axis)
    return torch.stack([sine, -cosine], axis)


def _parts(quadrants: Tensor, signed: bool) -> list[Tensor]:
    """What each part of a spectrum multiplies; an even table has one part, a signed one four."""
    if not signed:
        return [quadrants]
    odd_rows, odd_columns = _turn(quadrants, 2), _turn(quadrants, 4)
    return [quadrants, odd_rows, odd_columns, _turn(odd_rows, 4)]


def _mix(spectrum: Tensor, quadrants: Tensor, buffer: Tensor) -> Tensor:
    """Multiply by Lambda, channels within each frequency: (n, C, 2, Fh, 2, Fw) to the same, in ``buffer`` if it can."""
    channels = quadrants.shape[1]
    total: Tensor | None = None
    signed = spectrum.dim() == 5
    for block, z in zip(spectrum if signed else spectrum[None], _parts(quadrants, signed)):
        if channels <= 4:
            # Whole planes of all four parities, because broadcasting over short inner rows is slow.
            lam = block.repeat(1, 1, 2, 2)  # (C, C', 2 Fh, 2 Fw)
            planes = z.flatten(4, 5).flatten(2, 3)
            mixed = buffer[: len(planes)] if total is None else torch.empty_like(planes)
            for c in range(channels):
                row = torch.mul(planes[:, 0], lam[c, 0], out=mixed[:, c])
                for d in range(1, channels):
                    row.addcmul_(planes[:, d], lam[c, d])
            part = mixed.view(z.shape)
        else:
            part = torch.einsum("cdkl,ndpkrl->ncpkrl", block, z)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def by_circulant(device: torch.device, size: tuple[int, int], form: str) -> bool:
    """Whether products of such images go through `circulant`."""
    return device.type == "cuda" and form == "even" and min(size) >= _CIRCULANT_FROM


def _through_circulant(
    gradient: Tensor, spectrum: Tensor, with_form: bool, with_product: bool
) -> tuple[Tensor, Tensor] | None:
    """Q and v of the matrix as it is, empty where not asked for; None where matrix products serve."""
    size = (gradient.shape[2], gradient.shape[3])
    if not by_circulant(gradient.device, size, "even" if spectrum.dim() == 4 else "signed"):
        return None
    dtype = compute_dtype(gradient.dtype)
    circulant = Circulant(spectrum, size, dtype)
    q = torch.empty(gradient.shape[0] if with_form else 0, dtype=dtype, device=gradient.device)
    shape = gradient.shape if with_product else (0,)
    v = torch.empty(shape, dtype=gradient.dtype, device=gradient.device)
    chunk = circulant.chunk(gradient.shape[1])
    for start in range(0, gradient.shape[0], chunk):
        forms, products = circulant.apply(gradient[start : start + chunk].to(dtype), with_form, with_product)
        if forms is not None:
            q[start : start + chunk] = forms
        if products is not None:
            v[start : start + chunk] = products
    return q, v


@_without_autocast
def product(gradient: Tensor, spectrum: Tensor, precision: str) -> Tensor:
    """``v = Sigma g``."""
    found = _through_circulant(gradient, spectrum, with_form=False, with_product=True)
    if found is not None:
        return found[1]
    transform = _Transform(gradient, (spectrum.shape[-2], spectrum.shape[-1]))
    spectrum = spectrum.to(transform.dtype)
    result = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
    for images, out in zip(gradient.split(transform.chunk), result.split(transform.chunk)):
        transform.inverse(_mix(spectrum, transform.forward(images), transform.mixed), out)
    return result


@_without_autocast
def quadratic_form(gradient: Tensor, spectrum: Tensor, with_product: bool, precision: str) -> tuple[Tensor, Tensor]:
    """``q_b = g_b^T Sigma g_b`` and, if asked for, ``v = Sigma g``; both of the symmetric part of Sigma."""
    found = _through_circulant(gradient, symmetric_part(spectrum), with_form=True, with_product=with_product)
    if found is not None:
        return found
    transform = _Transform(gradient, (spectrum.shape[-2], spectrum.shape[-1]))
    spectrum = symmetric_part(spectrum).to(transform.dtype)
    q = torch.empty(gradient.shape[0], dtype=transform.dtype, device=gradient.device)
    shape = gradient.shape if with_product else (0,)
    v = torch.empty(shape, dtype=gradient.dtype, device=gradient.device)
    for start in range(0, gradient.shape[0], transform.chunk):
        stop = start + transform.chunk
        z = transform.forward(gradient[start:stop])
        y = _mix(spectrum, z, transform.mixed)
        q[start:stop] = z.mul_(y).flatten(1).sum(1)  # pairwise, more accurate than a matrix product's sum
        if with_product:
            transform.inverse(y, v[start:stop])
    return q, v


def _gram(za: Tensor, zb: Tensor) -> Tensor:
    """Sum of ``za_c zb_c'`` over images and parities, (C, C, Fh, Fw)."""
    channels = za.shape[1]
    if channels > 4:
        return torch.einsum("ncpkrl,ndpkrl->cdkl", za, zb)
    za, zb = (z.flatten(4, 5).flatten(2, 3) for z in (za, zb))
    sums = za.new_empty(channels, channels, *za.shape[2:])
    for c in range(channels):
        for d in range(channels):
            torch.sum(za[:, c] * zb[:, d], 0, out=sums[c, d])
    rows, columns = za.shape[2] // 2, za.shape[3] // 2
    return sums.view(channels, channels, 2, rows, 2, columns).sum((2, 4))


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.dtype == b.dtype)


@_without_autocast
def cross_spectrum(a: Tensor, b: Tensor, rows: int, columns: int, signed: bool, precision: str) -> Tensor:
    """``S[c, c', k, l] = sum Z^a_c Z^b_c'`` over samples and parities; its four parts for a signed table."""
    channels, same = a.shape[1], _same(a, b)
    transform = _Transform(a, (rows, columns))
    other = transform if same else _Transform(b, (rows, columns))
    parts = 4 if signed else 1
    total = torch.zeros(parts, channels, channels, rows, columns, dtype=transform.dtype, device=a.device)
    for xa, xb in zip(a.split(transform.chunk), b.split(transform.chunk)):
        za = transform.forward(xa)
        zb = za if same else other.forward(xb)
        for part, z in zip(total, _parts(zb, signed)):
            part += _gram(za, z)
    return total if signed else total[0]
