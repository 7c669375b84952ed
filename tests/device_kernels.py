"""The compiled CUDA kernels as operators of the stand-in for a GPU: emulated, called as the package calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.cuda_emulator import Emulator

_STATE = ("values", "mean", "scale", "table", "spectrum", "updates", "skipped", "arrivals", "arranged")


class Kernels:
    """Operators by name, and how often each was called.

    Args:
        emulator: Runs them.
    """

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.calls: dict[str, int] = {}

    def get(self, name: str) -> Callable[..., Any] | None:
        """The operator ``sgr_kernels::NAME`` on tensors of the host; None where the kernels have none."""
        operator: Callable[..., Any] | None = getattr(self, name, None) if name.startswith("native_") else None
        if operator is not None:
            self.calls[name] = self.calls.get(name, 0) + 1
        return operator

    def native_product(self, gradient: Tensor, spectrum: Tensor, precision: str) -> Tensor:
        _, v = self.emulator.product(gradient, _dense(spectrum), "product", precision)
        assert v is not None
        return v

    def native_quadratic_form(
        self, gradient: Tensor, spectrum: Tensor, with_product: bool, precision: str, arranged: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        operator = "quadratic_form" if with_product else "quadratic_form_only"
        q, v = self.emulator.product(gradient, _dense(spectrum), operator, precision, arranged=arranged)
        assert q is not None
        return q, gradient.new_empty(0) if v is None else v

    def native_arranged_quadratic_form(
        self, gradient: Tensor, spectrum: Tensor, arranged: Tensor, with_product: bool, precision: str
    ) -> tuple[Tensor, Tensor]:
        return self.native_quadratic_form(gradient, spectrum, with_product, precision, arranged)

    def native_cross_spectrum(
        self, a: Tensor, b: Tensor, rows: int, columns: int, signed: bool, precision: str
    ) -> Tensor:
        same = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
        return self.emulator.cross_spectrum(
            a.contiguous(), None if same else b.contiguous(), (rows, columns), signed, precision
        )

    def native_arrange(self, spectrum: Tensor, arranged: Tensor, height: int, width: int) -> None:
        arranged.copy_(self.emulator.arrange(spectrum, (height, width)))

    def native_update(self, perturbation: Tensor, *arguments: Any) -> None:
        state = dict(zip(_STATE, arguments))
        binning, decay, target_variance, clip, precision = arguments[len(_STATE) :]
        if len(state["arranged"]) == 0:  # nobody wants it
            size = (perturbation.shape[2], perturbation.shape[3])
            state["arranged"] = self.emulator.arranged(state["spectrum"], size)
        self.emulator.update(perturbation, state, binning, decay, target_variance or None, clip, precision)


def _dense(spectrum: Tensor) -> Tensor:
    """Without gaps in its storage, which may be transposed."""
    dense = spectrum.untyped_storage().nbytes() == spectrum.numel() * spectrum.element_size()
    return spectrum if dense else spectrum.contiguous()
