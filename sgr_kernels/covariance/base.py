"""The interface of all covariances, and the running estimate that two of them share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from sgr_kernels import checks
from sgr_kernels.backends.torch_spectral import compute_dtype
from sgr_kernels.checks.caller import warn_caller
from sgr_kernels.covariance.counters import Counting
from sgr_kernels.covariance.derived import Derived
from sgr_kernels.functional.solve import check_solver, definite_factor
from sgr_kernels.toeplitz.constants import tracing, wide_dtype


class LogDeterminant(NamedTuple):
    """The logarithm of a determinant, as found.

    Attributes:
        value: Exact, or the mean of an unbiased estimator.
        standard_error: Of that mean; 0 where the value is exact.
    """

    value: float
    standard_error: float


class Covariance(nn.Module):
    """What a covariance offers to the loss and to the attacks."""

    frozen: bool = True
    """A frozen covariance takes no updates."""

    def update(self, perturbation: Tensor) -> None:
        """Let a batch of perturbations (m, C, H, W) enter the estimate."""
        raise RuntimeError(f"{type(self).__name__}: this covariance is frozen and takes no updates")

    def product(self, gradient: Tensor) -> Tensor:
        """``v = Sigma g``, like ``gradient``."""
        raise NotImplementedError

    def quadratic_form(self, gradient: Tensor) -> Tensor:
        """``q_b = g_b^T Sigma g_b``, (B,), float32 or better."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The matrix that `product` applies, (D, D)."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` zero-mean Gaussian perturbations with the covariance `dense`, (n, C, H, W)."""
        raise NotImplementedError

    def solve(self, x: Tensor, *, tolerance: float = 1e-6, max_iterations: int | None = None) -> Tensor:
        """``y = Sigma^-1 x``, like ``x`` (B, C, H, W); differentiable in x.

        Args:
            x: Right sides.
            tolerance: Of methods that iterate, the relative residual to reach.
            max_iterations: Of methods that iterate.

        Raises:
            ValueError: If Sigma is not positive definite, or the tolerance is not reached.
        """
        check_solver(tolerance, max_iterations)
        self._check("x", x)
        factor = self._cholesky()
        columns = x.flatten(1).to(factor.device, factor.dtype).mT
        if len(columns) != len(factor):
            raise ValueError(f"x: expected samples of {len(factor)} entries, got shape {tuple(x.shape)}")
        return torch.cholesky_solve(columns, factor).mT.reshape(x.shape).to(x)

    def mahalanobis(self, delta: Tensor, *, tolerance: float = 1e-6, max_iterations: int | None = None) -> Tensor:
        """Length of perturbations in units of Sigma, ``sqrt(delta^T Sigma^-1 delta)``, (B,), float32 or better.

        Differentiable in ``delta`` (B, C, H, W); at zero the derivative is taken as zero.

        Raises:
            ValueError: As for `solve`.
        """
        self._check("delta", delta)
        wide = delta.to(wide_dtype(delta.device))
        flat = wide.detach().flatten(1)
        peak = flat.abs().amax(1) if flat.numel() else flat.new_ones(len(flat))
        peak = torch.where(peak == 0, 1, peak)  # a constant: lengths are in proportion to it, whose squares may not fit
        wide = wide / peak.view(-1, *(1,) * (wide.dim() - 1))
        solved = self.solve(wide, tolerance=tolerance, max_iterations=max_iterations)
        square = torch.linalg.vecdot(wide.flatten(1), solved.flatten(1))
        zero = square == 0
        length = torch.where(zero, 0, torch.where(zero, 1, square).sqrt())
        return (length * peak).to(compute_dtype(delta.dtype))

    @torch.no_grad()
    def log_determinant(self) -> LogDeterminant:
        """``log det Sigma``.

        Raises:
            ValueError: If Sigma is not positive definite.
        """
        return LogDeterminant(2 * float(self._cholesky().diagonal().log().sum()), 0.0)

    def check_shape(self, name: str, value: Tensor) -> None:
        """Expect a batch of what the covariance is of; one that knows no shape takes any.

        Raises:
            ValueError: If it has another shape.
        """

    def _check(self, name: str, value: Tensor) -> None:
        """Expect a batch of what Sigma multiplies."""
        checks.check_floating_point(name, value)

    def _cholesky(self) -> Tensor:
        """Cholesky factor of `dense`, in the widest type."""
        sigma = self.dense()
        return definite_factor(sigma.to(wide_dtype(sigma.device)))

    def scaled_mean(self) -> Tensor | None:
        """Running mean perturbation (C, H, W) in the scale of Sigma; None where there is no estimate of it."""
        return None

    def warn_if_skipped(self) -> None:
        """Warn of batches that did not enter the estimate since the last warning."""


class Estimate(Counting, Covariance):
    """A running second moment in the buffer ``values``, brought to a target variance when it is read.

    Args:
        values: Zeros in the shape of the estimate.
        shape: Shape of one perturbation.
        decay: Weight beta of the current batch (Eq. 14), in [0, 1].
        target_variance: Mean diagonal entry of Sigma, or None for the estimate's own.
        process_group: Processes whose batches enter the estimate together, by their true counts, so that all hold
            bitwise the same one. ``"auto"``: all, where ``torch.distributed`` is initialized; None: this one alone.
    """

    values: Tensor
    mean: Tensor
    updates: Tensor
    skipped: Tensor
    scale: Tensor
    target_variance: float | None

    def __init__(
        self,
        values: Tensor,
        shape: tuple[int, ...],
        decay: float,
        target_variance: float | None,
        process_group: Any = "auto",
    ) -> None:
        super().__init__()
        self.shape, self.target_variance = shape, None
        self.decay = checks.number("decay", decay, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        if target_variance is not None:
            wanted = "a positive number or None"
            self.target_variance = checks.number("target_variance", target_variance, wanted, lambda x: 0 < x < math.inf)
        if process_group not in ("auto", None) and not distributed.is_initialized():
            raise ValueError(
                "process_group: torch.distributed is not initialized; call torch.distributed.init_process_group first"
            )
        self.process_group = process_group
        self.frozen = False
        self._skipped_reported = 0
        self._any_mean = Derived()
        values = values.to(compute_dtype(values.dtype))  # the default dtype may be a low-precision one
        self.register_buffer("values", values)
        self.register_buffer("mean", values.new_zeros(shape))
        self.register_counter("updates")
        self.register_counter("skipped")
        self.register_buffer("scale", values.new_ones(()), persistent=False)

    def _second_moment(self, perturbation: Tensor) -> Tensor:
        """Second moment of one batch (Eq. 15 or 16), like ``values``."""
        raise NotImplementedError

    def _average_variance(self, values: Tensor) -> Tensor:
        """Mean diagonal entry of the matrix that values stand for."""
        raise NotImplementedError

    def _transposed(self, values: Tensor) -> Tensor:
        """Values of the transposed matrix."""
        return values.transpose(0, 1)

    def _refresh(self) -> None:
        """Rewrite in place what is derived from ``values``, so that a captured CUDA graph sees it."""
        if self.target_variance is not None:
            ratio = self.target_variance / self._average_variance(self.values)
            # A zero estimate, or one too small to divide by, means a zero penalty.
            self.scale.copy_(torch.where((ratio > 0) & ratio.isfinite(), ratio, 0.0))

    @torch.no_grad()
    def update(self, perturbation: Tensor) -> None:
        """Let a batch of perturbations enter the estimate (Eq. 14); the first one sets it.

        A batch with non-finite values is skipped, on the device, and counted in ``skipped``. An empty one is ignored.
        With several processes, all must call this equally often, with whatever batch each has.

        Args:
            perturbation: ``(m, *shape)``, any floating-point dtype.

        Raises:
            RuntimeError: If the covariance is frozen.
            TypeError: If the perturbation is not a real floating-point tensor.
            ValueError: If its shape or device do not fit.
        """
        if self.frozen:
            super().update(perturbation)
        self._check("perturbation", perturbation)
        shared = self.process_group is not None and distributed.is_available() and distributed.is_initialized()
        if perturbation.shape[0] == 0 and not shared:
            return
        if not shared and self._update_on_device(perturbation.detach()):
            return
        moment, mean, samples, skipped = self._batch_statistics(perturbation.detach())
        if shared:
            moment, mean, samples, skipped = self._reduced(moment, mean, samples, skipped)
        weight = torch.where(self.updates == 0, 1.0, self.decay).to(self.values.dtype)
        for state, new in ((self.values, moment), (self.mean, mean)):
            state.copy_(torch.where(samples > 0, torch.lerp(state, new.to(state.dtype), weight), state))
        self.updates += samples > 0
        self.skipped += skipped
        self._refresh()

    def _update_on_device(self, perturbation: Tensor) -> bool:
        """All of an update by one operator, where there is one; False where there is none."""
        return False

    def _batch_statistics(self, perturbation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Second moment and mean of a batch, the number of samples in them, and of batches left out."""
        xi = perturbation.to(torch.promote_types(perturbation.dtype, self.values.dtype))
        if xi.shape[0] == 0:
            none = self.updates.new_zeros(())
            return torch.zeros_like(self.values), torch.zeros_like(self.mean), none, none
        with torch.autocast(xi.device.type, enabled=False):
            moment = self._second_moment(xi)
            mean = xi.mean(0).view(self.mean.shape)
        finite = moment.isfinite().all() & mean.isfinite().all()
        moment, mean = (torch.where(finite, value, 0) for value in (moment, mean))
        return moment, mean, finite * xi.shape[0], (~finite).long()

    def _reduced(
        self, moment: Tensor, mean: Tensor, samples: Tensor, skipped: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same over all processes, each batch weighted by its samples, in one reduction."""
        wide = wide_dtype(moment.device)
        parts = [moment.to(wide).flatten() * samples, mean.to(wide).flatten() * samples, samples, skipped]
        packed = torch.cat([part.to(wide).reshape(-1) for part in parts])
        distributed.all_reduce(packed, group=None if self.process_group == "auto" else self.process_group)
        total = packed[-2].round().long()
        packed = packed / total.clamp(min=1)
        cut = moment.numel()
        skipped = (packed[-1] * total.clamp(min=1)).round().long()
        return packed[:cut].view(moment.shape), packed[cut:-2].view(mean.shape), total, skipped

    def scaled_mean(self) -> Tensor | None:
        """Running mean perturbation in the scale of Sigma, that is, times the square root of its scale factor.

        None where there is none and never will be: of a frozen covariance that was made without one.
        """
        # Asked for once, not at every step: a frozen mean changes by hand alone.
        if self.frozen and not tracing() and not self._any_mean((self.mean,), lambda: bool(self.mean.any())):
            return None
        return self.mean * self.scale.sqrt()

    def warn_if_skipped(self) -> None:
        """Warn of batches that were skipped since the last warning; synchronizes with the device."""
        skipped = int(self.skipped)
        if skipped > self._skipped_reported:
            count, self._skipped_reported = skipped - self._skipped_reported, skipped
            warn_caller(
                f"{type(self).__name__}: {count} batches with non-finite perturbations did not enter the estimate",
                RuntimeWarning,
            )

    def check_shape(self, name: str, value: Tensor) -> None:
        if value.dim() == 0 or tuple(value.shape[1:]) != self.shape:
            expected = ", ".join(map(str, ("B", *self.shape)))
            raise ValueError(f"{name}: expected shape ({expected}), the covariance's, got {tuple(value.shape)}")

    def _check(self, name: str, value: Tensor) -> None:
        checks.check_floating_point(name, value)
        self.check_shape(name, value)
        checks.check_same_device(name, value, "the covariance", self.values)

    def check_values(self, values: Tensor) -> None:
        """Expect finite values of a symmetric matrix; synchronizes with the device.

        Raises:
            ValueError: If a value is NaN or infinite, or the matrix asymmetric.
        """
        if not bool(values.isfinite().all()):
            raise ValueError("values: expected finite numbers, got NaN or infinity")
        difference = float((values - self._transposed(values)).abs().max())
        if difference > 1e-5 * float(values.abs().max()):
            raise ValueError(
                f"values: expected the values of a symmetric matrix, got a difference of {difference:.3g} "
                "from its transpose"
            )

    def check_variance(self, values: Tensor) -> None:
        """Expect a variance, of values that are to stay, that can be brought to the target; waits for the device.

        Raises:
            ValueError: If there is a target and no positive variance: the penalty would be zero for ever.
        """
        variance = float(self._average_variance(values))
        if self.target_variance is not None and not variance > 0:
            raise ValueError(
                f"target_variance: expected values with a positive variance to bring to {self.target_variance:g}, "
                f"got an average of {variance:g}; the penalty would always be zero"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or convert the state, but never below float32."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.is_floating_point() and result.dtype.itemsize < 4:
                return tensor.to(result.device, torch.promote_types(tensor.dtype, torch.float32))
            return result

        dtype = self.values.dtype
        super()._apply(at_least_float32, recurse)
        if self.values.dtype != dtype:
            with torch.no_grad():
                self._refresh()  # what is derived is not converted but derived anew, in the new precision
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        values, mean, error_messages = state_dict.get(prefix + "values"), state_dict.get(prefix + "mean"), args[-1]
        try:
            if isinstance(values, Tensor) and values.shape == self.values.shape:
                self.check_values(values)
                if self.frozen:
                    self.check_variance(values)
            if isinstance(mean, Tensor) and not bool(mean.isfinite().all()):
                raise ValueError("mean: expected finite numbers, got NaN or infinity")
        except ValueError as error:
            error_messages.append(f"{prefix}{error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._apply(lambda tensor: tensor)  # where tensors were assigned, they may be of low precision
        with torch.no_grad():
            self._refresh()

    def extra_repr(self) -> str:
        """Shape and settings."""
        return f"shape={self.shape}, decay={self.decay}, target_variance={self.target_variance}, frozen={self.frozen}"
