"""Values that are costly to derive from buffers, kept while the buffers stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sgr_kernels.toeplitz.constants import plainly, tracing


class Derived:
    """What was last derived from some tensors; derived anew once one of them is rewritten in place or replaced."""

    def __init__(self) -> None:
        self._sources: list[tuple[Tensor, int]] = []
        self._value: Any = None

    def __call__(self, sources: tuple[Tensor, ...], derive: Callable[[], Any]) -> Any:
        """``derive()``, or its last value if the sources have not changed since."""
        if tracing() or any(source.is_inference() for source in sources):  # these do not count their changes
            return derive()
        fresh = len(self._sources) == len(sources) and all(
            source is known and source._version == version for source, (known, version) in zip(sources, self._sources)
        )
        if not fresh:
            with plainly():
                self._value = derive()
            self._sources = [(source, source._version) for source in sources]
        return self._value

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        """Copies and pickles begin empty."""
        return Derived, ()
