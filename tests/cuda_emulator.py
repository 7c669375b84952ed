"""Builds the emulated CUDA device (tests/emulation) and runs the kernels of csrc/cuda on it."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
EMULATION = Path(__file__).parent / "emulation"
KERNELS = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-Og", "-fno-omit-frame-pointer", "-fsanitize=address,alignment,bounds,shift"]
# Checks by calls are soon compiled; what is undefined must end the process, not only be told.
FLAGS += ["-fsanitize-undefined-trap-on-error", "--param", "asan-instrumentation-with-call-threshold=0"]

OPERATORS = {
    "product": 0,
    "quadratic_form": 1,
    "quadratic_form_only": 2,
    "cross_spectrum": 3,
    "update": 4,
    "arrange": 5,
}
PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
BINNINGS = {"rounded": 0, "linear": 1, "even": 2}
ELEMENTS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
GROUPS = 12  # of blocks whose sums an update adds where they arise
STAGED_ONLY = 0  # a limit of shared memory that no fused kernel keeps
HOPPER = 227 << 10


def missing_compiler() -> str | None:
    """Why the emulator cannot be built; None where it can."""
    if shutil.which("g++") is None:
        return "no g++ found"
    probe = subprocess.run(
        ["g++", "-x", "c++", "-fsanitize=address", "-", "-o", "/dev/null"],
        input="_Float16 x; int main() {}",
        capture_output=True,
        text=True,
        check=False,
    )
    return None if probe.returncode == 0 else "g++ has no AddressSanitizer or no _Float16"


def build(directory: Path) -> Path:
    """Compile the emulator into ``directory``, once for given sources, whatever number of processes ask for it."""
    headers = [KERNELS / "rounding.h", KERNELS.parent / "plan.h"]
    sources = sorted([*KERNELS.glob("*.cuh"), *headers, *EMULATION.iterdir()])
    inputs = [" ".join(FLAGS).encode(), *(path.read_bytes() for path in sources)]
    digest = hashlib.sha256(b"".join(inputs)).hexdigest()[:16]
    binary = directory / f"emulator-{digest}"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            partial = binary.with_suffix(".partial")
            include = [f"-I{EMULATION}", f"-I{KERNELS}"]
            command = ["g++", *FLAGS, *include, str(EMULATION / "emulator.cpp"), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.rename(binary)
    return binary


def _storage(tensor: Tensor) -> bytes:
    """The bytes of a tensor's whole storage."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


def _sparse(images: Tensor) -> bool:
    """Whether the emulator is given the images alone, as their storage is more than a file should hold."""
    return images.untyped_storage().nbytes() > 1 << 30


def _images(images: Tensor) -> bytes:
    """What the emulator reads of images: their storage, or themselves."""
    return _storage(images.contiguous() if _sparse(images) else images)


def _tensor(data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


@dataclass
class Emulator:
    """Runs operators, one process per call, so that AddressSanitizer's verdict belongs to the call."""

    binary: Path
    directory: Path
    launches: int = 0
    """Of the last call."""

    def _run(self, fields: list[int], payload: list[bytes], order: str) -> bytes:
        cases, results = self.directory / "cases", self.directory / "results"
        cases.write_bytes(np.array(fields, np.int64).tobytes() + b"".join(payload))
        command = [str(self.binary), str(cases), str(results), order]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr[:4000] or f"ended with {process.returncode}"
        raw = results.read_bytes()
        self.launches = int(np.frombuffer(raw[-8:], np.int64)[0])
        return raw[:-8]

    def lengths(self) -> list[int]:
        """Numbers of frequencies that have Fourier transforms."""
        text = subprocess.run([str(self.binary), "lengths"], check=True, capture_output=True, text=True).stdout
        return [int(line) for line in text.split()]

    def _fields(
        self, operator: str, images: Tensor, frequencies: tuple[int, int], parts: int, precision: str, shared: int
    ) -> list[int]:
        storage = images.untyped_storage().nbytes() // images.element_size()
        head = [OPERATORS[operator], PRECISIONS[precision], ELEMENTS[images.dtype], *images.shape, *frequencies]
        stored = -storage if _sparse(images) else storage
        return [*head, parts, shared, images.storage_offset(), *images.stride(), stored]

    def product(
        self,
        gradient: Tensor,
        spectrum: Tensor,
        operator: str = "quadratic_form",
        precision: str = "highest",
        shared: int = HOPPER,
        order: str = "ascending",
        arranged: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute q and v, as far as ``operator`` does; ``arranged`` is the spectrum as `update` left it."""
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        parts = 4 if spectrum.dim() == 5 else 1
        fields = self._fields(operator, gradient, spectrum.shape[-2:], parts, precision, shared)
        fields += [int(arranged is not None), *spectrum.stride()[-4:]]
        lam = spectrum.to(wide)
        assert lam.untyped_storage().nbytes() == lam.numel() * lam.element_size(), "a dense spectrum"
        payload = [_images(gradient), _storage(lam)] + ([] if arranged is None else [_storage(arranged)])
        raw = self._run(fields, payload, order)
        q = v = None
        if operator != "product":
            size = gradient.shape[0] * wide.itemsize
            q, raw = _tensor(raw[:size], (gradient.shape[0],), wide), raw[size:]
        if operator != "quadratic_form_only":
            v = _tensor(raw, gradient.shape, gradient.dtype)
        return q, v

    def cross_spectrum(
        self,
        a: Tensor,
        b: Tensor | None,
        frequencies: tuple[int, int],
        signed: bool = False,
        precision: str = "highest",
        shared: int = HOPPER,
        order: str = "ascending",
    ) -> Tensor:
        """The cross spectrum of a and b (None: of a with itself); b has the strides of a."""
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        fields = self._fields("cross_spectrum", a, frequencies, 4 if signed else 1, precision, shared)
        fields += [int(b is not None), 0, 0, 0, 0]
        payload = [_images(a)] + ([] if b is None else [_images(b)])
        shape = (a.shape[1], a.shape[1], *frequencies)
        return _tensor(self._run(fields, payload, order), (4, *shape) if signed else shape, wide)

    def arrange(self, spectrum: Tensor, size: tuple[int, int], order: str = "ascending") -> Tensor:
        """A symmetric spectrum (C, C, Fh, Fw) in the order in which the fused kernels read it, for images of a size."""
        images = torch.zeros(1, spectrum.shape[0], *size)
        fields = self._fields("arrange", images, spectrum.shape[-2:], 1, "highest", HOPPER)
        lam = spectrum.contiguous()
        fields += [0, *lam.stride()]
        shape = self.arranged(spectrum, size).shape
        return _tensor(self._run(fields, [_images(images), _storage(lam)], order), shape, torch.float32)

    @staticmethod
    def arranged(spectrum: Tensor, size: tuple[int, int]) -> Tensor:
        """Room for an arranged spectrum of images of a size, with NaN in it."""
        channels, blocks = len(spectrum), 2 if max(size) <= 32 else 4
        return spectrum.new_full((channels * (channels + 1) // 2 * blocks * blocks * 256 + 4,), torch.nan)

    def update(
        self,
        perturbation: Tensor,
        state: dict[str, Tensor],
        binning: str,
        decay: float,
        target_variance: float | None,
        clip: bool,
        precision: str = "highest",
        order: str = "ascending",
    ) -> None:
        """Let a batch enter a running covariance: its ``state``, by name, is rewritten."""
        names = ("values", "mean", "scale", "updates", "skipped", "arrivals", "table", "spectrum", "arranged")
        bins = [*state["values"].shape[2:], 1][:2]
        fields = self._fields("update", perturbation, (1, 1), 1, precision, HOPPER)
        fields += [0] * 5
        own = [BINNINGS[binning], *bins, int(clip), *state["table"].shape[-2:], *state["spectrum"].shape[-2:]]
        settings = np.array(own, np.int64).tobytes() + np.array([decay, target_variance or 0.0]).tobytes()
        payload = [_images(perturbation), settings, *(_storage(state[name]) for name in names[:6])]
        raw = self._run(fields, payload, order)
        for name in names:
            size = state[name].numel() * state[name].element_size()
            state[name].copy_(_tensor(raw[:size], state[name].shape, state[name].dtype))
            raw = raw[size:]
        assert not raw
