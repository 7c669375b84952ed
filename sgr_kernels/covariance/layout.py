"""How the values of a covariance function lie in memory: their shapes, their forms, and where displacement zero is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sgr_kernels import checks
from sgr_kernels.toeplitz.geometry import Size, bin_count, reach_of_bins

FORM_OF_BINNING = {"rounded": "radial", "linear": "radial", "even": "even", "offset": "signed"}


def perturbation_shape(channels: int, size: int | tuple[int, ...]) -> tuple[int, ...]:
    """(C, H, W), or (C, L) for a one-dimensional size; an int means a square."""
    checks.check_count("channels", channels)
    extents = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(extents) not in (1, 2) or not all(map(checks.is_whole, extents)):
        raise ValueError(f"size: expected (H, W), (L,) or an int, all positive, got {size!r}")
    return (int(channels), *map(int, extents))


def form_of(binning: str) -> str:
    """Form of the values: ``"radial"``, ``"even"`` or ``"signed"``."""
    if binning not in FORM_OF_BINNING:
        raise ValueError(f"binning: expected one of {', '.join(map(repr, FORM_OF_BINNING))}, got {binning!r}")
    return FORM_OF_BINNING[binning]


@dataclass(frozen=True)
class Layout:
    """The displacements that a covariance function keeps apart, for perturbations of one shape.

    Attributes:
        shape: Of one perturbation, (C, H, W) or (C, L).
        binning: As for `CovarianceFunction`.
        max_displacement: Zero beyond; None reaches across the image.
    """

    shape: tuple[int, ...]
    binning: str
    max_displacement: int | None = None

    def __post_init__(self) -> None:
        form_of(self.binning)
        checks.check_max_displacement(self.max_displacement)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[0]

    @property
    def image_size(self) -> Size:
        """Size (H, W); (1, L) for signals."""
        return (1, self.shape[1]) if len(self.shape) == 2 else (self.shape[1], self.shape[2])

    @property
    def form(self) -> str:
        """Form of the values."""
        return form_of(self.binning)

    @property
    def full_length(self) -> int:
        """Bins, or displacements along the longer axis, that reach across the image."""
        return bin_count(self.image_size, self.binning) if self.form == "radial" else max(self.image_size)

    @property
    def reach(self) -> Size:
        """Number of displacements (h, w), zero included, along each axis."""
        return reach_of_bins(self._length, self.image_size)

    @property
    def _length(self) -> int:
        return self.full_length if self.max_displacement is None else min(self.full_length, self.max_displacement + 1)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the values: (C, C, K), (C, C, h, w) or (C, C, 2h-1, 2w-1)."""
        height, width = self.reach
        extents = {"radial": (self._length,), "even": (height, width), "signed": (2 * height - 1, 2 * width - 1)}
        return (self.channels, self.channels, *extents[self.form])

    def table(self, whole: bool) -> Layout:
        """Layout of the table that the kernels use, of form even or signed; ``whole``: as large as the image."""
        binning = "offset" if self.form == "signed" else "even"
        return Layout(self.shape, binning, None if whole else self._length - 1)

    def transposed(self, values: Tensor) -> Tensor:
        """Values of the transposed matrix."""
        swapped = values.transpose(0, 1)
        return swapped.flip(-2, -1) if self.form == "signed" else swapped

    def common_window(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the displacements that two sets of values share."""

        def window(tensor: Tensor) -> Tensor:
            for axis in range(2, tensor.dim()):
                length = min(a.shape[axis], b.shape[axis])
                first = (tensor.shape[axis] - length) // 2 if self.form == "signed" else 0
                tensor = tensor.narrow(axis, first, length)
            return tensor

        return window(a), window(b)


def at_zero(values: Tensor, form: str) -> Tensor:
    """Covariances (C, C) at displacement zero, of values of any form."""
    if form == "signed":
        return values[..., values.shape[-2] // 2, values.shape[-1] // 2]
    return values[..., 0] if values.dim() == 3 else values[..., 0, 0]


def layout_of_values(values: Tensor, size: int | tuple[int, ...], binning: str, max_displacement: int | None) -> Layout:
    """Layout of values that are given, which may be shorter than the image.

    Raises:
        TypeError: If the values are not a real floating-point tensor.
        ValueError: If their shape does not fit.
    """
    form = form_of(binning)
    checks.covariance_form(values, form, "values")
    layout = Layout(perturbation_shape(values.shape[0], size), binning, max_displacement)
    checks.check_table("values", values, layout.channels, layout.image_size, form, binning)
    if max_displacement is not None:
        return layout
    reach = max(values.shape[2:]) if form != "signed" else (max(values.shape[2:]) + 1) // 2
    return Layout(layout.shape, binning, reach - 1)
