"""Every error names the argument, what was expected, and what came."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import sgr_kernels as sgr
from sgr_kernels import CovarianceFunction, FullCovariance, IdentityCovariance, SGRLoss
from sgr_kernels.functional import covariance_product, covariance_quadratic_form, displacement_covariance

G = torch.zeros(2, 3, 8, 8)
F = torch.zeros(3, 3, 11)
TABLE = torch.zeros(3, 3, 8, 8)

OPERATOR_ARGUMENTS = [
    # gradient, covariance, form, error, words of the message
    (G.numpy(), F, None, TypeError, ["gradient", "tensor", "ndarray"]),
    ([*G], F, None, TypeError, ["gradient", "tensor", "list of 2 tensors, the first (3, 8, 8) torch.float32"]),
    (G.long(), F, None, TypeError, ["gradient", "floating-point", "int64"]),
    (G.to(torch.complex64), F, None, TypeError, ["gradient", "real floating-point", "complex64"]),
    (G[0, 0], F, None, ValueError, ["gradient", "(B, C, H, W)", "(8, 8)"]),
    (G[None], F, None, ValueError, ["gradient", "(B, C, H, W)", "(1, 2, 3, 8, 8)"]),
    (G[:, :0], F[:0, :0], None, ValueError, ["gradient", "at least one channel", "(2, 0, 8, 8)"]),
    (G[..., :0], F, None, ValueError, ["gradient", "one pixel", "(2, 3, 8, 0)"]),
    (G, F.numpy(), None, TypeError, ["covariance", "tensor", "ndarray"]),
    (G, F.int(), None, TypeError, ["covariance", "floating-point", "int32"]),
    (G, F.to(torch.complex128), None, TypeError, ["covariance", "floating-point", "complex128"]),
    (G, F[0], None, ValueError, ["covariance", "(C, C, K)", "(3, 11)"]),
    (G, F[:2, :2], None, ValueError, ["covariance", "3 x 3 channels", "(2, 2, 11)"]),
    (G, F[:, :1], None, ValueError, ["covariance", "3 x 3 channels", "(3, 1, 11)"]),
    (G, torch.zeros(3, 3, 12), None, ValueError, ["covariance", "1 to 11 bins", "(8, 8)", "(3, 3, 12)"]),
    (G, F[..., :0], None, ValueError, ["covariance", "1 to 11 bins", "(3, 3, 0)"]),
    (G, torch.zeros(3, 3, 9, 8), None, ValueError, ["covariance", "1 to 8", "dimension 2", "(3, 3, 9, 8)"]),
    (G, torch.zeros(3, 3, 8, 17), "signed", ValueError, ["covariance", "odd number up to 15", "(3, 3, 8, 17)"]),
    (G, torch.zeros(3, 3, 14, 15), "signed", ValueError, ["covariance", "odd number", "(3, 3, 14, 15)"]),
    (G, F, "even", ValueError, ["covariance", "'even'", "(3, 3, 11)"]),
    (G, TABLE, "radial", ValueError, ["covariance", "'radial'", "(3, 3, 8, 8)"]),
    (G, F, "circular", ValueError, ["form", "'radial'", "'circular'"]),
    (G, F.to("meta"), None, ValueError, ["covariance", "device", "meta"]),
]


def _names(error: pytest.ExceptionInfo, words: list[str]) -> None:
    message = str(error.value)
    assert message.startswith(words[0]), message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.parametrize("operator", [covariance_product, covariance_quadratic_form])
@pytest.mark.parametrize(("gradient", "covariance", "form", "kind", "words"), OPERATOR_ARGUMENTS)
def test_operators(operator, gradient, covariance, form, kind, words):
    with pytest.raises(kind) as error:
        operator(gradient, covariance, form=form)
    _names(error, words)


@pytest.mark.parametrize(
    ("perturbation", "options", "kind", "words"),
    [
        (G.int(), {}, TypeError, ["perturbation", "floating-point", "int32"]),
        (G[0, 0], {}, ValueError, ["perturbation", "(B, C, H, W)", "(8, 8)"]),
        (G, {"form": "round"}, ValueError, ["form", "'signed'", "'round'"]),
        (G, {"max_displacement": -1}, ValueError, ["max_displacement", "non-negative int", "-1"]),
        (G, {"max_displacement": 2.0}, ValueError, ["max_displacement", "non-negative int", "2.0"]),
        (G, {"backend": "cudnn"}, ValueError, ["backend", "'torch'", "'cudnn'"]),
    ],
)
def test_displacement_covariance(perturbation, options, kind, words):
    with pytest.raises(kind) as error:
        displacement_covariance(perturbation, **options)
    _names(error, words)


def test_backends():
    with pytest.raises(ValueError, match=r"backend: expected one of 'auto', .*'reference'.*, got 'nope'"):
        covariance_product(G, F, backend="nope")
    with pytest.raises(ValueError, match=r"name: expected one of 'auto', .*got 'nope'"):
        sgr.use_backend("nope")
    large = torch.zeros(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match=r"'reference' cannot run product: .*dimension 12288 would need 1\.1 GiB"):
        covariance_product(large, F, backend="reference")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 0}, ["channels", "whole number >= 1", "0"]),
        ({"channels": 1.0}, ["channels", "whole number >= 1", "1.0"]),
        ({"size": (4, 0)}, ["size", "positive", "(4, 0)"]),
        ({"size": (4, 4, 4)}, ["size", "(H, W)", "(4, 4, 4)"]),
        ({"size": 8.0}, ["size", "(H, W)", "8.0"]),
        ({"size": None}, ["size", "(H, W)", "None"]),
        ({"decay": -0.1}, ["decay", "[0, 1]", "-0.1"]),
        ({"decay": 1.5}, ["decay", "[0, 1]", "1.5"]),
        ({"decay": float("nan")}, ["decay", "[0, 1]", "nan"]),
        ({"target_variance": 0.0}, ["target_variance", "positive", "0.0"]),
        ({"target_variance": -1}, ["target_variance", "positive", "-1"]),
        ({"max_displacement": -2}, ["max_displacement", "non-negative", "-2"]),
        ({"binning": "cubic"}, ["binning", "'rounded'", "'cubic'"]),
        ({"psd": "maybe"}, ["psd", "'clip'", "'maybe'"]),
    ],
)
def test_covariance_functions(options, words):
    with pytest.raises(ValueError) as error:
        CovarianceFunction(**{"channels": 2, "size": (8, 8)} | options)
    _names(error, words)


def test_other_covariances():
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\], got 2"):
        FullCovariance(2, (8, 8), decay=2)
    with pytest.raises(ValueError, match=r"channels, size: expected whole numbers >= 1, got 2, \(0,\)"):
        FullCovariance(2, (0,))
    with pytest.raises(ValueError, match="variance: expected a finite number >= 0, got -1"):
        IdentityCovariance(-1)
    with pytest.raises(ValueError, match="shape: the identity's size is unknown"):
        IdentityCovariance().sample(3)


@pytest.mark.parametrize("build", [CovarianceFunction, FullCovariance])
def test_gradients_and_perturbations_of_another_size(build):
    covariance = build(3, (8, 8))
    wrong = torch.zeros(2, 3, 9, 8)
    shapes = "expected shape (B, 3, 8, 8), the covariance's, got (2, 3, 9, 8)"
    for name, use in (
        ("gradient", covariance.product),
        ("gradient", covariance.quadratic_form),
        ("perturbation", covariance.update),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name}: {shapes}")):
            use(wrong)
        with pytest.raises(TypeError, match=f"{name}: expected a real floating-point tensor, got .*int64"):
            use(G.long())
        with pytest.raises(ValueError, match=f"{name}: .*device cpu, got meta"):
            use(G.to("meta"))


@pytest.mark.parametrize(
    ("values", "size", "options", "kind", "words"),
    [
        ([[[1.0]]], 4, {}, TypeError, ["values", "tensor", "list"]),
        (torch.ones(1, 1, 3).int(), 4, {}, TypeError, ["values", "floating-point", "int32"]),
        (torch.ones(3), 4, {}, ValueError, ["values", "(3,)"]),
        (torch.ones(1, 2, 3), 4, {}, ValueError, ["values", "1 x 1 channels", "(1, 2, 3)"]),
        (torch.ones(1, 1, 9), 4, {}, ValueError, ["values", "1 to 5 bins", "(1, 1, 9)"]),
        (torch.ones(1, 1, 8), 4, {"binning": "linear"}, ValueError, ["values", "bins", "(1, 1, 8)"]),
        (torch.ones(1, 2, 3), 4, {"binning": "linear"}, ValueError, ["values", "1 x 1 channels", "(1, 2, 3)"]),
        (torch.ones(1, 1, 0), 4, {"binning": "linear"}, ValueError, ["values", "1 to 6 bins", "(1, 1, 0)"]),
        (torch.ones(1, 1, 4, 4), 4, {"binning": "offset"}, ValueError, ["values", "odd number", "(1, 1, 4, 4)"]),
        (torch.tensor([[[1.0, torch.nan]]]), 4, {}, ValueError, ["values", "finite", "NaN"]),
        (torch.tensor([[[1.0, torch.inf]]]), 4, {}, ValueError, ["values", "finite", "infinity"]),
        (torch.tensor([[[1.0], [0.5]], [[0.2], [1.0]]]), 4, {}, ValueError, ["values", "symmetric", "0.3"]),
        (torch.arange(9.0).view(1, 1, 3, 3), 4, {"binning": "offset"}, ValueError, ["values", "symmetric", "8"]),
    ],
)
def test_values_given(values, size, options, kind, words):
    with pytest.raises(kind) as error:
        CovarianceFunction.from_values(values, size, **options)
    _names(error, words)


@pytest.mark.parametrize(
    ("images", "kind", "words"),
    [
        (torch.zeros(0, 1, 4, 4), ValueError, ["images", "at least one", "none"]),
        (torch.zeros(5, 1, 4, 4).long(), TypeError, ["images", "floating-point", "int64"]),
        (torch.zeros(5, 16), ValueError, ["images", "(B, C, H, W)", "(5, 16)"]),
        (torch.full((5, 1, 4, 4), torch.nan), ValueError, ["values", "finite", "NaN"]),
    ],
)
def test_images_given(images, kind, words):
    with pytest.raises(kind) as error:
        CovarianceFunction.from_images(images)
    _names(error, words)


@pytest.mark.parametrize(
    "freeze",
    [
        lambda **o: CovarianceFunction.from_values(torch.zeros(1, 1, 3), 4, **o),
        lambda **o: CovarianceFunction.from_values(-torch.eye(2)[:, :, None], 4, **o),
        lambda **o: CovarianceFunction.from_values(torch.zeros(1, 1, 7, 7), 4, binning="offset", **o),
        lambda **o: CovarianceFunction.from_images(torch.ones(5, 1, 4, 4), **o),
        lambda **o: CovarianceFunction(1, 4, **o).freeze(),
    ],
)
def test_a_variance_that_cannot_be_brought_to_a_target(freeze):
    """The penalty would be zero for ever. As it is, without a target, it may be asked for."""
    with pytest.raises(ValueError, match=r"target_variance: expected values with a positive variance .* to 0\.5, got"):
        freeze(target_variance=0.5)
    freeze(psd="none")


@pytest.mark.parametrize("value", ["1", None, True, [1.0, 2.0], torch.ones(2), torch.nan, object()])
def test_what_is_no_number(value):
    for name, use in (
        ("decay", lambda: CovarianceFunction(1, 4, decay=value)),
        ("target_variance", lambda: FullCovariance(1, 4, target_variance="x" if value is None else value)),
        ("variance", lambda: IdentityCovariance(value)),
        ("decay_length", lambda: CovarianceFunction.exponential(1, 4, value)),
        ("cross_channel", lambda: CovarianceFunction.exponential(1, 4, 2.0, cross_channel=value)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected a .*, got"):
            use()


def test_what_converts_to_a_number_is_one():
    for variance in (torch.tensor(0.5), np.float32(0.5), np.array([0.5])[0]):
        assert CovarianceFunction(1, 4, target_variance=variance).target_variance == 0.5


def test_bytes_are_told_what_to_do():
    covariance, images = CovarianceFunction(1, 4), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for name, use in (
        ("perturbation", covariance.update),
        ("gradient", covariance.product),
        ("gradient", IdentityCovariance().product),
        ("gradient", lambda g: covariance_product(g, torch.ones(1, 1, 2))),
        ("perturbation", displacement_covariance),
    ):
        with pytest.raises(TypeError, match=rf"{name}: expected a real floating-point .*uint8; divide by 255"):
            use(images)
    with pytest.raises(ValueError, match="chunk: expected a whole number >= 1, got 0"):
        CovarianceFunction.from_images(images, chunk=0)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, C, H, W\)"):
        CovarianceFunction.from_images(images[0, 0])


def test_a_mean_correction_needs_a_mean():
    """A frozen covariance has one if it was learnt, or loaded."""
    learnt = CovarianceFunction(1, 4)
    SGRLoss(learnt, mean_correction=True)
    learnt.update(torch.rand(3, 1, 4, 4))
    SGRLoss(learnt.freeze(), mean_correction=True)
    images = torch.rand(5, 1, 4, 4)
    SGRLoss(CovarianceFunction.from_images(images, center=False), mean_correction=True)
    without = CovarianceFunction.exponential(1, 4, 2.0)
    for covariance in (without, CovarianceFunction.from_images(images), without.resize(5)):
        with pytest.raises(ValueError, match="mean_correction: CovarianceFunction keeps no mean"):
            SGRLoss(covariance, mean_correction=True)
    without.mean.fill_(0.1)  # by hand
    SGRLoss(without, mean_correction=True)
    loaded = CovarianceFunction.from_values(torch.ones(1, 1, 5), 4)
    loaded.load_state_dict(learnt.state_dict())
    SGRLoss(loaded, mean_correction=True)


def test_exponentials():
    with pytest.raises(ValueError, match="decay_length: expected a positive number of pixels, got 0"):
        CovarianceFunction.exponential(1, 8, 0)
    with pytest.raises(ValueError, match=r"cross_channel: expected a number in \[-1, 1\], got 2"):
        CovarianceFunction.exponential(1, 8, 1.0, cross_channel=2)
    with pytest.raises(ValueError, match=r"binning: expected one of .*got 'cubic'"):
        CovarianceFunction.exponential(1, 8, 1.0, binning="cubic")


def _loaded(build, change):
    state = build().state_dict()
    state.update(change(state))
    build().load_state_dict(state)


def test_a_frozen_state_without_variance_is_not_loaded():
    frozen = CovarianceFunction.exponential(1, 4, 2.0, target_variance=1.0)
    with pytest.raises(RuntimeError, match="target_variance: expected values with a positive variance"):
        frozen.load_state_dict(frozen.state_dict() | {"values": torch.zeros_like(frozen.values)})
    fresh = CovarianceFunction(1, 4, target_variance=1.0)
    fresh.load_state_dict(fresh.state_dict())  # nothing learnt yet


def test_states_that_do_not_fit_are_not_loaded():
    def build() -> CovarianceFunction:
        return CovarianceFunction(2, 4)

    asymmetric = torch.zeros(2, 2, 5)
    asymmetric[0, 1] = 1
    for change, message in (
        (lambda s: {"values": torch.full_like(s["values"], torch.nan)}, "values: expected finite numbers"),
        (lambda s: {"mean": torch.full_like(s["mean"], torch.inf)}, "mean: expected finite numbers"),
        (lambda s: {"values": asymmetric}, "values: expected the values of a symmetric matrix, got a difference of 1"),
        (lambda s: {"values": torch.zeros(2, 2, 9)}, r"size mismatch for values"),
        (lambda s: {"kernel": torch.zeros(1)}, "Unexpected key"),
    ):
        with pytest.raises(RuntimeError, match=message):
            _loaded(build, change)
    nested = nn.ModuleDict({"metric": build()})
    state = nested.state_dict() | {"metric.values": torch.full((2, 2, 5), torch.nan)}
    with pytest.raises(RuntimeError, match=r"metric\.values: expected finite"):
        nested.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"covariance": torch.eye(3)}, TypeError, ["covariance", "covariance module", "(3, 3)"]),
        ({"strength": -0.5}, ValueError, ["strength", ">= 0", "-0.5"]),
        ({"strength": float("inf")}, ValueError, ["strength", "finite", "inf"]),
        ({"update_every": 0}, ValueError, ["update_every", "whole number >= 1", "0"]),
        ({"penalty_every": 1.5}, ValueError, ["penalty_every", "whole number >= 1", "1.5"]),
        ({"penalty_every": 0}, ValueError, ["penalty_every", "whole number >= 1", "0"]),
        ({"nonfinite_patience": 0}, ValueError, ["nonfinite_patience", "whole number >= 1", "0"]),
        ({"fraction": 0.0}, ValueError, ["fraction", "(0, 1]", "0.0"]),
        ({"fraction": 1.5}, ValueError, ["fraction", "(0, 1]", "1.5"]),
        ({"fraction": float("nan")}, ValueError, ["fraction", "(0, 1]", "nan"]),
        ({"method": "magic"}, ValueError, ["method", "'double-backward'", "'magic'"]),
        ({"perturbation": "noise"}, ValueError, ["perturbation", "'sign'", "'noise'"]),
        (
            {"covariance": IdentityCovariance(), "perturbation": "sign"},
            ValueError,
            ["perturbation", "frozen", "'sign'"],
        ),
        ({"covariance": IdentityCovariance(), "mean_correction": True}, ValueError, ["mean_correction", "Identity"]),
    ],
)
def test_losses(options, kind, words):
    with pytest.raises(kind) as error:
        SGRLoss(**{"covariance": CovarianceFunction(3, 8)} | options)
    _names(error, words)


def _classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


@pytest.mark.parametrize(
    ("images", "labels", "kind", "words"),
    [
        (G.long(), torch.zeros(2).long(), TypeError, ["images", "floating-point", "int64"]),
        (G, torch.tensor([0, 4]), ValueError, ["labels", "0 to 3", "0 to 4"]),
        (G, torch.tensor([-1, 2]), ValueError, ["labels", "0 to 3", "-1 to 2"]),
        (G, torch.tensor([0]), ValueError, ["labels", "(2,)", "(1,)"]),
        (G, torch.zeros(2, 5), ValueError, ["labels", "(2, 4)", "(2, 5)"]),
    ],
)
def test_batches(images, labels, kind, words):
    with pytest.raises(kind) as error:
        SGRLoss(IdentityCovariance())(_classifier(), images, labels)
    _names(error, words)


@pytest.mark.parametrize("method", ["double-backward", "forward-mode", "finite-difference", "auto"])
def test_what_is_on_different_devices_is_named(method):
    labels = torch.zeros(2).long()

    def fails(message, *, model=None, covariance=None, on="cpu"):
        model, covariance = model or _classifier(), covariance or CovarianceFunction(3, 8)
        with pytest.raises(ValueError, match=re.escape(message)):
            SGRLoss(covariance, method=method)(model, G, labels.to(on))

    fails("device: got images on cpu, labels on meta, model on cpu; move them to one with .to(device)", on="meta")
    fails("device: got images on cpu, labels on cpu, model on meta; move them", model=_classifier().to("meta"))
    fails("on the covariance's device meta, got cpu", covariance=CovarianceFunction(3, 8).to("meta"))
    fails("on the covariance's device meta, got cpu", covariance=CovarianceFunction.exponential(3, 8, 2.0).to("meta"))


@pytest.mark.parametrize("method", ["double-backward", "forward-mode", "finite-difference", "auto"])
def test_models_that_cannot_be_penalized_by_any_method(method):
    """No path to the images; no loss for each sample."""
    labels, weight = torch.zeros(2).long(), nn.Parameter(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="model: its loss has no path to the images"):
        SGRLoss(CovarianceFunction(3, 8), method=method)(lambda x: weight, G, labels)
    with pytest.raises(ValueError, match="model: its loss has no path to the images"):
        SGRLoss(CovarianceFunction(3, 8), method=method)(lambda x: weight.detach(), G, labels)
    with pytest.raises(ValueError, match=r"loss_fn: expected one loss per sample.*got \(\)"):
        SGRLoss(IdentityCovariance(), method=method, loss_fn=nn.functional.cross_entropy)(_classifier(), G, labels)


def test_a_schedule_that_goes_wrong_is_named():
    criterion = SGRLoss(IdentityCovariance(), lambda step: 1.0 - step)
    labels = torch.zeros(2).long()
    for _ in range(2):
        criterion(_classifier(), G, labels)
    with pytest.raises(ValueError, match=re.escape("strength: expected a finite number >= 0 at step 2, got -1.0")):
        criterion(_classifier(), G, labels)


@pytest.mark.parametrize("method", ["double-backward", "forward-mode", "finite-difference"])
def test_penalties_that_are_not_finite_are_left_out_counted_and_end_training(method):
    model, labels = _classifier(), torch.zeros(2).long()
    huge = CovarianceFunction.exponential(3, 8, 2.0)
    criterion = SGRLoss(huge, method=method, nonfinite_patience=3)
    plain = nn.functional.cross_entropy(model(G), labels)
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    criterion(model, G, labels)
    huge.quadratic_form = lambda g: g.flatten(1).sum(1) * -torch.inf
    for count in range(1, 4):
        loss = criterion(model, G, labels)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted)
        assert int(criterion.nonfinite) == count
    with pytest.warns(RuntimeWarning, match="not finite"):
        _ = criterion.last
    message = r"3 penalties in a row were not finite; last cross-entropy .*, penalty .*, largest input gradient"
    with pytest.raises(RuntimeError, match=message):
        criterion(model, G, labels)


def test_models_and_loss_functions_that_cannot_be_penalized():
    labels = torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"outputs: expected logits \(B, classes\), got \(2, 3, 8, 8\)"):
        SGRLoss(IdentityCovariance())(nn.Identity(), G, labels)
    with pytest.raises(ValueError, match=r"loss_fn: expected one loss per sample.*got \(\)"):
        SGRLoss(IdentityCovariance(), loss_fn=nn.functional.cross_entropy)(_classifier(), G, labels)
    weight = nn.Parameter(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="model: its loss has no path to the images"):
        SGRLoss(IdentityCovariance())(lambda x: weight, G, labels)
    wrong = re.escape("images: expected shape (B, 1, 8, 8), the covariance's, got (2, 3, 8, 8)")
    for covariance in (CovarianceFunction.exponential(1, 8, 2.0), CovarianceFunction(1, 8), FullCovariance(1, 8)):
        with pytest.raises(ValueError, match=wrong):
            SGRLoss(covariance)(_classifier(), G, labels)
