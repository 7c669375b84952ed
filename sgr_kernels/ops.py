"""The registered operators: schemas, fake kernels, derivatives. One set per spectral backend, all alike.

The set is closed under differentiation: ``product`` and ``cross_spectrum`` are each other's adjoints, so that every
derivative, of any order, is made of the same operators. ``quadratic_form`` returns its product as a second output;
twice that, times the incoming gradient, is its backward, and differentiating it again is differentiating the product.

Each class below holds the derivatives of one operator, and is its autograd kernel. Called on their own, the classes do
what the operator does with less Python in between; a compiler, and ``torch.func``, meet the operator.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _within_transforms
from torch._C import _AutoDispatchBelowAutograd as _BelowAutograd
from torch._C._functorch import unwrap_if_dead
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from sgr_kernels.backends import torch_spectral, triton_spectral
from sgr_kernels.backends.schemas import CUDA_SCHEMAS, NAMESPACE, SCHEMAS
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.toeplitz.spectrum import symmetric_part, transpose

SPECTRAL_BACKENDS = ("torch", "native", "triton")

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


class Derivatives(_SingleLevelFunction):
    """A function for one level of transforms: as the kernel of an operator it leaves the others to the dispatcher."""

    _compiled_autograd_key = staticmethod(Function._compiled_autograd_key)


def _implementation(backend: str, operator: str, *args: Any) -> Any:
    """Run an operator's kernel, below autograd."""
    function = getattr(torch.ops.sgr_kernels, f"{backend}_{operator}").default
    try:
        if not _within_transforms():
            with _BelowAutograd():
                return function(*args)
        with torch.enable_grad(), _set_fwd_grad_enabled(True), _BelowAutograd():  # as the levels below may want
            return function(*args)
    except RuntimeError as error:
        failed = re.search(r"could not allocate (\d+) bytes", str(error))
        if failed is not None:
            # PyTorch's own error (on GPUs an OutOfMemoryError) cannot pass through the compiled kernels: ask for it.
            torch.empty(int(failed[1]), dtype=torch.uint8, device=args[0].device)
        raise


class Product(Derivatives):
    """``v = Sigma g``: (gradient (B, C, H, W), spectrum, backend, precision) -> like gradient."""

    @staticmethod
    def forward(gradient: Tensor, spectrum: Tensor, backend: str, precision: str) -> Tensor:
        """Apply the backend's kernel."""
        return _implementation(backend, "product", gradient, spectrum, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives need."""
        gradient, spectrum, ctx.backend, ctx.precision = inputs
        ctx.save_for_backward(gradient, spectrum)
        ctx.save_for_forward(gradient, spectrum)

    @staticmethod
    def backward(ctx: Any, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        """``Sigma^T grad_v`` and the cross spectrum of grad_v and g."""
        gradient, spectrum = ctx.saved_tensors
        options = (ctx.backend, ctx.precision)
        grad_gradient = grad_spectrum = None
        if ctx.needs_input_grad[0]:
            grad_gradient = _product(grad_v, transpose(spectrum), *options)
        if ctx.needs_input_grad[1]:
            grad_spectrum = _spectrum_gradient(grad_v, gradient, spectrum, *options)
        return grad_gradient, grad_spectrum, None, None

    @staticmethod
    def jvp(ctx: Any, gradient_t: Tensor | None, spectrum_t: Tensor | None, *_: None) -> Tensor | None:
        """Bilinear: the product of each tangent with the other input."""
        gradient, spectrum = ctx.saved_tensors
        options = (ctx.backend, ctx.precision)
        by_gradient = None if gradient_t is None else _product(gradient_t, spectrum, *options)
        by_spectrum = None if spectrum_t is None else _product(gradient, spectrum_t, *options)
        return _sum(by_gradient, by_spectrum)


class QuadraticForm(Derivatives):
    """``q_b = g_b^T Sigma g_b`` with ``v = Sigma g``, of the symmetric part of Sigma.

    (gradient (B, C, H, W), spectrum, with_product, backend, precision) -> (q (B,), v like gradient or (0,)).
    """

    @staticmethod
    def forward(
        gradient: Tensor, spectrum: Tensor, with_product: bool, backend: str, precision: str
    ) -> tuple[Tensor, Tensor]:
        """Apply the backend's kernel."""
        return _implementation(backend, "quadratic_form", gradient, spectrum, with_product, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the derivatives need; the product, where it was computed, is half of the backward."""
        gradient, spectrum, ctx.with_product, ctx.backend, ctx.precision = inputs
        ctx.save_for_backward(gradient, spectrum, output[1])
        ctx.save_for_forward(gradient, spectrum, output[1])
        if not ctx.with_product:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
        """``2 grad_q v + Sigma grad_v`` and the matching cross spectra."""
        gradient, spectrum, v = ctx.saved_tensors
        options = (ctx.backend, ctx.precision)
        grad_gradient = grad_spectrum = None
        if ctx.needs_input_grad[0]:
            if grad_q is not None:
                if not ctx.with_product:
                    v = _product(gradient, symmetric_part(spectrum), *options)
                grad_gradient = _scaled(v, 2 * grad_q)
            if grad_v is not None and ctx.with_product:
                grad_gradient = _sum(grad_gradient, _product(grad_v, symmetric_part(spectrum), *options))
        if ctx.needs_input_grad[1]:
            total = None
            if grad_q is not None:
                total = _spectrum_gradient(_scaled(gradient, grad_q), gradient, spectrum, *options)
            if grad_v is not None and ctx.with_product:
                total = _sum(total, _spectrum_gradient(grad_v, gradient, spectrum, *options))
            grad_spectrum = None if total is None else symmetric_part(total)
        return grad_gradient, grad_spectrum, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, gradient_t: Tensor | None, spectrum_t: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None]:
        """``q' = 2 v . g' + g^T Sigma' g``, ``v' = Sigma g' + Sigma' g``."""
        gradient, spectrum, v = ctx.saved_tensors
        options = (ctx.backend, ctx.precision)
        q_t: Tensor | None = None
        v_t: Tensor | None = None
        if gradient_t is not None:
            if not ctx.with_product:
                v = _product(gradient, symmetric_part(spectrum), *options)
            wide = compute_dtype(gradient.dtype)
            q_t = 2 * (v.to(wide) * gradient_t.to(wide)).sum((1, 2, 3))
            if ctx.with_product:
                v_t = _product(gradient_t, symmetric_part(spectrum), *options)
        if spectrum_t is not None:
            q_s, v_s = call("quadratic_form", ctx.backend, gradient, spectrum_t, ctx.with_product, ctx.precision)
            q_t, v_t = _sum(q_t, q_s), _sum(v_t, v_s) if ctx.with_product else None
        return q_t, v_t


class ArrangedQuadraticForm(QuadraticForm):
    """The same of a symmetric Sigma whose spectrum also lies as NVIDIA GPUs' kernels read it (`arrange`).

    (gradient, spectrum, arranged, with_product, backend, precision) -> as `QuadraticForm`. Derivatives take the
    spectrum: the arranged one may have been rewritten since.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        gradient: Tensor, spectrum: Tensor, arranged: Tensor, with_product: bool, backend: str, precision: str
    ) -> tuple[Tensor, Tensor]:
        """Apply the kernel."""
        return _implementation(
            backend, "arranged_quadratic_form", gradient, spectrum, arranged, with_product, precision
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the derivatives need."""
        QuadraticForm.setup_context(ctx, (*inputs[:2], *inputs[3:]), output)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
        """As of `QuadraticForm`."""
        grad_gradient, grad_spectrum, *rest = QuadraticForm.backward(ctx, grad_q, grad_v)
        return grad_gradient, grad_spectrum, None, *rest


class CrossSpectrum(Derivatives):
    """``S[c, c', k, l] = sum Z^a_c Z^b_c'``: (a, b, rows, columns, signed, backend, precision) -> a spectrum."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, rows: int, columns: int, signed: bool, backend: str, precision: str) -> Tensor:
        """Apply the backend's kernel."""
        return _implementation(backend, "cross_spectrum", a, b, rows, columns, signed, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives need."""
        a, b, *ctx.options = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Products of the incoming spectrum with the other argument."""
        a, b = ctx.saved_tensors
        options = ctx.options[-2:]
        grad_a = _product(b, grad, *options).to(a.dtype) if ctx.needs_input_grad[0] else None
        grad_b = _product(a, transpose(grad), *options).to(b.dtype) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, a_t: Tensor | None, b_t: Tensor | None, *_: None) -> Tensor | None:
        """Bilinear."""
        a, b = ctx.saved_tensors
        by_a = None if a_t is None else _cross_spectrum(a_t, b, *ctx.options)
        by_b = None if b_t is None else _cross_spectrum(a, b_t, *ctx.options)
        return _sum(by_a, by_b)


def _product(gradient: Tensor, spectrum: Tensor, backend: str, precision: str) -> Tensor:
    return call("product", backend, gradient, spectrum, precision)


def _cross_spectrum(
    a: Tensor, b: Tensor, rows: int, columns: int, signed: bool, backend: str, precision: str
) -> Tensor:
    return call("cross_spectrum", backend, a, b, rows, columns, signed, precision)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _scaled(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its factor, in the wider type; the result has the images' dtype."""
    return (images.to(factor.dtype) * factor[:, None, None, None]).to(images.dtype)


def _spectrum_gradient(a: Tensor, b: Tensor, spectrum: Tensor, backend: str, precision: str) -> Tensor:
    rows, columns = spectrum.shape[-2:]
    signed = spectrum.dim() == 5
    return _cross_spectrum(a, b, rows, columns, signed, backend, precision).to(spectrum.dtype)


def _fake_product(gradient: Tensor, spectrum: Tensor, precision: str) -> Tensor:
    return gradient.new_empty(gradient.shape)


def _fake_quadratic_form(
    gradient: Tensor, spectrum: Tensor, with_product: bool, precision: str
) -> tuple[Tensor, Tensor]:
    q = gradient.new_empty(gradient.shape[0], dtype=compute_dtype(gradient.dtype))
    return q, gradient.new_empty(gradient.shape if with_product else (0,))


def _fake_cross_spectrum(a: Tensor, b: Tensor, rows: int, columns: int, signed: bool, precision: str) -> Tensor:
    shape = (a.shape[1], a.shape[1], rows, columns)
    return a.new_empty((4, *shape) if signed else shape, dtype=compute_dtype(a.dtype))


def _map_batch(operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """The rule of ``torch.func.vmap`` for products and quadratic forms: a mapped gradient is a larger batch."""
    gradient, spectrum, *options = args
    if in_dims[0] is None or in_dims[1] is not None:
        return _map_slices(operator, info, in_dims, *args)
    mapped = gradient.movedim(in_dims[0], 0)
    results = operator(mapped.flatten(0, 1), spectrum, *options)
    if isinstance(results, Tensor):
        return results.view(mapped.shape), 0
    q, v = results
    return (q.view(mapped.shape[:2]), v.view(mapped.shape) if v.dim() == 4 else v.expand(info.batch_size, 0)), (0, 0)


def _map_slices(operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """The general rule: slice by slice. Of no slices the result has the shape that a slice of zeros gives."""

    def select(arg: Any, dim: int | None, i: int) -> Any:
        if dim is None:
            return arg
        return arg.select(dim, i) if info.batch_size else arg.sum(dim)  # of nothing: zeros

    results = [operator(*(select(arg, d, i) for arg, d in zip(args, in_dims))) for i in range(max(1, info.batch_size))]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(c)[: info.batch_size] for c in zip(*results)), (0,) * len(results[0])
    return torch.stack(results)[: info.batch_size], 0


def _fake_arranged(
    gradient: Tensor, spectrum: Tensor, arranged: Tensor, with_product: bool, precision: str
) -> tuple[Tensor, Tensor]:
    return _fake_quadratic_form(gradient, spectrum, with_product, precision)


_MAPS = {
    "product": _map_batch,
    "quadratic_form": _map_batch,
    "cross_spectrum": _map_slices,
    "arranged_quadratic_form": _map_batch,
}
_FAKES: dict[str, Callable[..., Any]] = {
    "product": _fake_product,
    "quadratic_form": _fake_quadratic_form,
    "cross_spectrum": _fake_cross_spectrum,
    "arranged_quadratic_form": _fake_arranged,
}
_DERIVATIVES: dict[str, Any] = {
    "product": Product,
    "quadratic_form": QuadraticForm,
    "cross_spectrum": CrossSpectrum,
    "arranged_quadratic_form": ArrangedQuadraticForm,
}


def _define(backend: str, operator: str) -> None:
    name = f"{backend}_{operator}"
    function = _DERIVATIVES[operator]

    def autograd_kernel(*args: Any) -> Any:
        if not _within_transforms():
            return function.apply(*args[:-1], backend, args[-1])
        with enable_single_level_autograd_function():
            return function.apply(*args[:-1], backend, args[-1])

    schema = {**SCHEMAS, **CUDA_SCHEMAS}[operator]
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, autograd_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[operator], lib=_library)
    overload = getattr(torch.ops.sgr_kernels, name).default
    torch.library.register_vmap(f"{NAMESPACE}::{name}", functools.partial(_MAPS[operator], overload), lib=_library)


for _backend in SPECTRAL_BACKENDS:
    for _operator in SCHEMAS:
        _define(_backend, _operator)
for _operator in SCHEMAS:
    _library.impl(f"torch_{_operator}", getattr(torch_spectral, _operator), "CompositeExplicitAutograd")
for _backend in ("native", "triton"):
    _define(_backend, "arranged_quadratic_form")
for _name in ("native_update", "native_arrange", "triton_arrange"):
    _library.define(_name + CUDA_SCHEMAS[_name.partition("_")[2]], tags=(torch.Tag.pt2_compliant_tag,))
triton_spectral.register_operators(_library)


def call(operator: str, backend: str, *args: Any) -> Any:
    """Call an operator of a backend with its derivatives; ``args`` as in `SCHEMAS`."""
    if torch.compiler.is_compiling() or _within_transforms():
        return getattr(torch.ops.sgr_kernels, f"{backend}_{operator}")(*args)
    # What a transform saved may outlive it, in its wrapper; the dispatcher takes that off by itself.
    plain = (unwrap_if_dead(arg) if isinstance(arg, Tensor) else arg for arg in args[:-1])
    return _DERIVATIVES[operator].apply(*plain, backend, args[-1])


def in_place(operator: str, backend: str, source: Tensor, state: tuple[Tensor, ...], *settings: Any) -> None:
    """Call an operator of `CUDA_SCHEMAS` that rewrites ``state``."""
    getattr(torch.ops.sgr_kernels, f"{backend}_{operator}")(source, *state, *settings)
    torch.autograd.graph.increment_version(state)  # which the dispatcher leaves to autograd's kernels
