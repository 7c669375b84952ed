"""What compiled kernels do for a covariance on an NVIDIA GPU beside the operators, and where they do.

A running covariance's update is two launches, without the host; its spectrum lies ready in the order in which the
kernels of small images read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgr_kernels import ops
from sgr_kernels.backends import choose
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
        _serves(images, values, layout.form)
        and images.shape[0] > 0
        and choose("auto", operators.request("cross_spectrum", images, "even")) == "native"
        and (max(layout.image_size) <= _SMALL or _shared_memory(images.device) >= _SHARED)
    )


def _serves(images: Tensor, state: Tensor, form: str) -> bool:
    return (
        images.is_cuda
        and state.dtype == torch.float32
        and images.dtype != torch.float64
        and form != "signed"
        and images.shape[1] <= _CHANNELS
        and max(images.shape[2:]) <= _EXTENT
        and not tracing()
        and not state.is_inference()  # which counts no changes
    )


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
    ops.in_place("update", images, state, *settings)


class Arranged:
    """A spectrum as the kernels read it, rewritten in place, so that a CUDA graph sees the present one."""

    def __init__(self) -> None:
        self.tiles = torch.empty(0)
        self._source: Tensor | None = None
        self._version = -1

    def of(self, spectrum: Tensor, images: Tensor, form: str) -> Tensor | None:
        """The tiles of a symmetric spectrum (C, C, Fh, Fw), arranged anew if need be; None where they do not serve."""
        if not _serves(images, spectrum, form):
            return None
        fresh = self._source is spectrum and self._version == spectrum._version
        if fresh or recording():  # what a graph is the first to arrange would be anew for it alone
            return self.tiles if fresh else None
        self.arrange(spectrum, (images.shape[2], images.shape[3]))
        return self.tiles

    def arrange(self, spectrum: Tensor, size: Size) -> None:
        """Rewrite the tiles."""
        channels, side = len(spectrum), 2 if max(size) <= _SMALL else 4
        with plainly():
            if not self.beside(spectrum):
                self.tiles = spectrum.new_empty(channels * (channels + 1) // 2 * side * side * _TILE + 4)
            ops.in_place("arrange", spectrum, (self.tiles,), *size)
        self.accept(spectrum)

    def beside(self, spectrum: Tensor) -> bool:
        """Whether there are tiles, on the spectrum's device and in its type."""
        same = self.tiles.device == spectrum.device and self.tiles.dtype == spectrum.dtype
        return same and len(self.tiles) > 0

    def accept(self, spectrum: Tensor) -> None:
        """The tiles, where they are `beside` a spectrum, are those of it as it now is."""
        self._source, self._version = spectrum, spectrum._version

    def __reduce__(self) -> tuple[type[Arranged], tuple[()]]:
        """Copies and pickles begin empty."""
        return Arranged, ()
