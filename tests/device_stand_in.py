"""A stand-in for a GPU in all that asks where tensors lie: memory of its own, which is the host's.

Its tensors say that they are on ``cuda:0`` and hold a tensor of the host. Operators compute with those, and fail where
a GPU's would: on tensors of both places, on a generator of the other one, on a NumPy array asked of the device. Zeros
of the host pass where autograd makes such; what ``vmap`` maps hides where it lies. Its kernels: `tests.device_kernels`.
"""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._decomp.decompositions_for_jvp  # which compiles what it finds in PyTorch, and may not find a wrapper
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from tests.device_kernels import Kernels

DEVICE = torch.device("cuda", 0)

_aten = torch.ops.aten
# Operators that take tensors of both places; of an index the places may lie on the host.
_ACROSS = {_aten.copy_.default, _aten._to_copy.default}
_OF_BACKWARD = {_aten.add.Tensor, _aten.mm.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class Device(Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Device:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device="cpu",
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"{self.held!r} of the stand-in"

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = Device(self.held.detach().clone(memory_format=torch.preserve_format))
            copied.requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if _is_parameter(self) else copied
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        _require_one_place(function, args, kwargs)
        # Where Python asks for a place, it was seen to before; what C++ asks for is the wrapper's, or no place at all.
        on_device = asked is None or torch.device(asked).type != "meta"
        kernel = _kernel(function)
        if kernel is not None:
            return _wrapped(kernel(*_host(args), **_host(kwargs)))
        found = function(*_host(args), **_host(kwargs))
        if function._schema.is_mutable:
            return _written(function, args, kwargs, found)
        return _wrapped(found) if on_device else found


_compiled: dict[str, Kernels | None] = {"kernels": None}


def _kernel(function: Any) -> Callable[..., Any] | None:
    """A compiled kernel for GPUs, in the place of the host's of the same name."""
    kernels = _compiled["kernels"]
    if kernels is None or function.namespace != "sgr_kernels":
        return None
    return kernels.get(function._schema.name.partition("::")[2])


def _is_parameter(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "_is_param", False))


def _host(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, Device) else leaf, tree)


def _wrapped(tree: Any) -> Any:
    return tree_map(
        lambda leaf: Device(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, Device) else leaf, tree
    )


def _written(function: Any, args: Any, kwargs: Any, found: Any) -> Any:
    """The very tensors that the operator wrote into, where it returns them."""
    mutated = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = kwargs.get(argument.name, args[place] if place < len(args) else None)
            mutated += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    for leaf in mutated:
        if isinstance(leaf, Device) and (leaf.size() != leaf.held.size() or leaf.stride() != leaf.held.stride()):
            raise NotImplementedError(f"{function}: changes a tensor's shape")
    by_held = {id(leaf.held): leaf for leaf in mutated if isinstance(leaf, Device)}
    return tree_map(lambda leaf: by_held.get(id(leaf), _wrapped(leaf)) if isinstance(leaf, Tensor) else leaf, found)


def _require_one_place(function: Any, args: Any, kwargs: Any) -> None:
    """As on a GPU, whose element-wise operators take numbers from the host, and its indices places."""
    if function in _ACROSS:
        return
    checked = [*args[:1], *args[2:]] if function in _INDEXED and isinstance(args[0], Device) else [*args]
    leaves = [leaf for leaf in tree_leaves((checked, kwargs)) if isinstance(leaf, Tensor)]
    on_device = [leaf for leaf in leaves if isinstance(leaf, Device)]
    numbers = torch.Tag.pointwise in function.tags or function in _INDEXED or function is _aten.fill_.Tensor
    host = [leaf for leaf in leaves if not isinstance(leaf, Device) and (leaf.dim() or not numbers)]
    # Zeros that stand for absent derivatives autograd makes where the wrapper lies, which is on the host.
    if forward_ad._current_level >= 0 or (function in _OF_BACKWARD and not torch.is_grad_enabled()):
        host = [leaf for leaf in host if leaf.count_nonzero()]
    written = function._schema.is_mutable and leaves and not isinstance(leaves[0], Device)
    if on_device and (host or written):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({function})"
        )


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return Device(tensor.detach().clone(memory_format=torch.preserve_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ToHost.apply(grad)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        return tensor.held.detach().clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ToDevice.apply(grad)


_HostGenerator = torch.Generator


class _Kind(type(torch.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _HostGenerator)


class Generator(_HostGenerator, metaclass=_Kind):
    """Of either place."""

    _place: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = _HostGenerator.__new__(cls)
        made._place = DEVICE if torch.device(device).type == "cuda" else torch.device("cpu")
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._place


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _to_device(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, Device) else _ToDevice.apply(tensor)


def _to_host(tensor: Tensor) -> Tensor:
    return _ToHost.apply(tensor) if isinstance(tensor, Device) else tensor


def _moved(tensor: Tensor, device: Any) -> Tensor:
    return tensor if device is None else _to_device(tensor) if _is_cuda(device) else _to_host(tensor)


def _making(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a tensor where it is told to, by default on the host."""

    def call(*args: Any, device: Any = None, **options: Any) -> Tensor:
        _check_generator(options.get("generator"), device)
        if not _is_cuda(device):
            return make(*args, **options) if device is None else make(*_host(args), device=device, **options)
        if options.pop("pin_memory", False):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        requires_grad = options.pop("requires_grad", False)
        return Device(make(*_host(args), device="cpu", **options)).requires_grad_(requires_grad)

    return call


def _making_like(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a tensor where another one is, or where it is told to."""

    def call(like: Tensor, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if not isinstance(like, Device) or device is not None:
            options.pop("pin_memory", None)
        if device is None:
            return make(like, *args, **options)
        return _making(make)(like, *args, device=device, **options)

    return call


def _drawing(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that draws into, or for, a tensor."""

    def call(tensor: Any, *args: Any, generator: Any = None, **options: Any) -> Tensor:
        _check_generator(generator, tensor.device if isinstance(tensor, Tensor) else None)
        return draw(tensor, *args, generator=generator, **options)

    return call


def _check_generator(generator: Any, device: Any) -> None:
    wanted = "cuda" if _is_cuda(device) else "cpu"
    if generator is not None and generator.device.type != wanted:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device.type}'")


def _going(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``Tensor.to``."""

    def call(tensor: Tensor, *args: Any, device: Any = None, **options: Any) -> Tensor:
        left = []
        for value in args:
            if isinstance(value, Tensor):
                device, options["dtype"] = value.device, value.dtype
            elif isinstance(value, (str, torch.device, int)) and not isinstance(value, bool):
                device = value
            elif value is not None:
                left.append(value)
        options.pop("non_blocking", None)
        if device is not None and _is_cuda(device) != isinstance(tensor, Device):
            options.pop("copy", None)
        left = [value for value in left if not isinstance(value, bool)]  # non_blocking, copy
        if left or any(value is not None for value in options.values()):
            tensor = to(tensor, *left, **options)
        return _moved(tensor, device)

    return call


_MAKERS = [
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "linspace",
    "logspace",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "tensor",
    "as_tensor",
    "asarray",
    "scalar_tensor",
    "tril_indices",
    "triu_indices",
    "empty_strided",
]
_LIKE = ["zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"]
_NEW = ["new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"]
_DRAWN_FOR = ["bernoulli", "multinomial", "poisson", "normal"]
_DRAWN = ["normal_", "uniform_", "random_", "bernoulli_", "exponential_", "bernoulli", "multinomial"]


class _Event:
    """The host's clock in the place of the device's."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is under way."""

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other._seconds - self._seconds)


class _Graph:
    """A graph that runs its Python again; what `tests.graph_emulator` captures is truer, and of the host's tensors."""

    def __init__(self) -> None:
        self._work: Callable[[], Any] = lambda: None

    def capture(self, work: Callable[[], Any], generators: Any = ()) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


_PROPERTIES = types.SimpleNamespace(L2_cache_size=1 << 10, shared_memory_per_block_optin=227 << 10, major=9, minor=0)


@contextlib.contextmanager
def stand_in(kernels: Kernels | None = None) -> Iterator[torch.device]:
    """A process with a GPU, within.

    Args:
        kernels: Those that the package was compiled with; None: none for GPUs.
    """
    with pytest.MonkeyPatch.context() as patch:
        for place, names, changed in (
            (torch, _MAKERS, _making),
            (torch.fft, ["fftfreq", "rfftfreq"], _making),
            (torch, _LIKE, _making_like),
            (Tensor, _NEW, _making_like),
            (Tensor, _DRAWN, _drawing),
            (torch, _DRAWN_FOR, _drawing),
            (Tensor, ["to"], _going),
        ):
            for name in names:
                patch.setattr(place, name, changed(getattr(place, name)))
        patch.setattr(Tensor, "cuda", lambda tensor, *_, **__: _to_device(tensor))
        patch.setattr(Tensor, "cpu", lambda tensor, *_, **__: _to_host(tensor))
        patch.setattr(Tensor, "is_pinned", lambda tensor, *_: True)
        patch.setattr(torch, "Generator", Generator)
        for name, answer in {
            "is_available": True,
            "is_initialized": True,
            "is_current_stream_capturing": False,
            "device_count": 1,
            "current_device": 0,
            "is_bf16_supported": True,
            "get_device_properties": _PROPERTIES,
            "synchronize": None,
            "empty_cache": None,
            "reset_peak_memory_stats": None,
            "memory_allocated": 0,
            "max_memory_allocated": 1,
            "device": contextlib.nullcontext(),
            "device_of": contextlib.nullcontext(),
            "graph": contextlib.nullcontext(),
            "get_device_capability": (9, 0),
            "get_device_name": "a stand-in for an H100",
        }.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "CUDAGraph", _Graph)
        patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state))
        patch.setitem(_compiled, "kernels", kernels)
        patch.setattr("sgr_kernels.backends.native._KERNELS", ["cpu"] if kernels is None else ["cpu", "cuda"])
        patch.setattr("sgr_kernels.backends.native._ARCHITECTURES", ["sm_90"])
        patch.setattr("sgr_kernels.backends.native._obstacles", {})
        # The steps that `sgr_kernels.training` captures have a stand-in of their own, `tests.graph_emulator`.
        patch.setattr("sgr_kernels.training.loop.graphs_on", lambda device: None)
        patch.setattr("benchmarks.step.cuda_graphs.graphs_on", lambda device: None)
        patch.setattr("benchmarks.timing.graphs_on", lambda device: _Graph)
        # A module's parameters stay the same objects when they move, as they do on a GPU.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield DEVICE
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
