"""What kernels do for a covariance on an NVIDIA GPU beside the operators, and where they do.

With compiled kernels a running covariance's update is two launches, without the host. With these and with Triton's its
spectrum lies ready in the order in which the kernels read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgr_kernels import ops
from sgr_kernels.backends import choose, triton_spectral
from sgr_kernels.backends.triton_spectral.plan import Arrangement
from sgr_kernels.covariance.layout import Layout
from sgr_kernels.functional import operators
from sgr_kernels.toeplitz.constants import plainly, recording, tracing
from sgr_kernels.toeplitz.geometry import Size

_CHANNELS, _EXTENT = 4, 64
_SMALL = 32  # pixels a side of images whose transforms fit any GPU's shared memory
_SHARED = 160 << 10  # bytes of it that larger ones may need
_GROUPS = 12  # counters of the kernels: kMaximumGroups
_TILE = 256


def serves_update(images: Tensor, values: Tensor, layout: Layout) -> bool:
    """Whether the kernels have the update of an estimate's ``values`` by a batch (B, C, H, W)."""
    return (
        _serves(images, values, layout.form, "native")
        and _fits(images.shape[1], (images.shape[2], images.shape[3]))
        and images.shape[0] > 0
        and choose("auto", operators.request("cross_spectrum", images, "even")) == "native"
        and (max(layout.image_size) <= _SMALL or _shared_memory(images.device) >= _SHARED)
    )


def _serves(images: Tensor, state: Tensor, form: str, backend: str) -> bool:
    return (
        (images.is_cuda or (backend == "triton" and triton_spectral.interpreting()))
        and state.dtype == torch.float32
        and images.dtype != torch.float64
        and form != "signed"
        and not tracing()
        and not state.is_inference()  # which counts no changes
    )


def _fits(channels: int, size: Size) -> bool:
    """Whether the compiled kernels of small images have them."""
    return channels <= _CHANNELS and max(size) <= _EXTENT


def _words(backend: str, spectrum: Tensor, size: Size) -> int:
    """Numbers of a symmetric spectrum (C, C, Fh, Fw) as a backend's kernels read it; 0 where they take it as it is."""
    channels, frequencies = len(spectrum), (spectrum.shape[-2], spectrum.shape[-1])
    if backend == "triton":
        order = Arrangement.fitting(size, frequencies, channels, signed=False, symmetric=True)
        return 0 if order is None else order.words
    side = 2 if max(size) <= _SMALL else 4
    fits = backend == "native" and _fits(channels, size)
    return channels * (channels + 1) // 2 * side * side * _TILE + 4 if fits else 0


def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def counters(device: torch.device) -> Tensor:
    """What the kernels count blocks in: zero before and after each update."""
    return torch.zeros(_GROUPS, dtype=torch.int32, device=device)


def update(
    images: Tensor,
    state: tuple[Tensor, ...],
    layout: Layout,
    decay: float,
    target_variance: float | None,
    clip: bool,
) -> None:
    """Let a batch enter an estimate, as the general path does.

    Args:
        images: (B, C, H, W).
        state: values, mean, scale, table, spectrum, updates, skipped, `counters` and the arranged spectrum or nothing
            (0,), rewritten in place.
        layout: Of the values.
        decay: Weight of the batch.
        target_variance: Of the table, or None.
        clip: Whether the table is projected onto the semidefinite cone.
    """
    settings = (layout.binning, decay, target_variance or 0.0, clip, operators.precision(images.device))
    ops.in_place("update", "native", images, state, *settings)


class Arranged:
    """A spectrum as each backend's kernels read it, rewritten in place, so that a CUDA graph sees the present one.

    What one backend's kernels read stays when another's serve for a while: a graph may read it.
    """

    def __init__(self) -> None:
        self._tiles: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[Tensor, int]] = {}  # which spectrum, and which version of it, they are of

    def of(self, spectrum: Tensor, images: Tensor, form: str, backend: str) -> Tensor | None:
        """The tiles of a symmetric spectrum (C, C, Fh, Fw), arranged anew if need be; None where they do not serve."""
        size = (images.shape[2], images.shape[3])
        if not _serves(images, spectrum, form, backend) or _words(backend, spectrum, size) == 0:
            return None
        source, version = self._sources.get(backend, (None, -1))
        if source is spectrum and version == spectrum._version:
            return self._tiles[backend]
        if recording():  # what a graph is the first to arrange would be anew for it alone
            return None
        return self._arrange(spectrum, size, backend)

    def renew(self, spectrum: Tensor, size: Size) -> None:
        """Rewrite the tiles, where there are any."""
        for backend in list(self._tiles):
            if self.beside(spectrum, backend) is not None:
                self._arrange(spectrum, size, backend)

    def _arrange(self, spectrum: Tensor, size: Size, backend: str) -> Tensor:
        with plainly():
            tiles = self.beside(spectrum, backend)
            if tiles is None:
                tiles = self._tiles[backend] = spectrum.new_empty(_words(backend, spectrum, size))
            ops.in_place("arrange", backend, spectrum, (tiles,), *size)
        self.accept(spectrum, backend)
        return tiles

    def beside(self, spectrum: Tensor, backend: str) -> Tensor | None:
        """A backend's tiles, if there are any on the spectrum's device and in its type."""
        tiles = self._tiles.get(backend)
        same = tiles is not None and tiles.device == spectrum.device and tiles.dtype == spectrum.dtype
        return tiles if same else None

    def accept(self, spectrum: Tensor, backend: str) -> None:
        """Take the tiles `beside` a spectrum, if there are any, for those of it as it now is."""
        if self.beside(spectrum, backend) is not None:
            self._sources[backend] = (spectrum, spectrum._version)

    def __reduce__(self) -> tuple[type[Arranged], tuple[()]]:
        """Copies and pickles begin empty."""
        return Arranged, ()
