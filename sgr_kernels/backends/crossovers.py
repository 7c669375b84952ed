"""Where the dense matrix, formed, is faster than a backend: measured, kept as data in ``crossovers.json``.

``sgr bench crossovers`` measures one kind of device and rewrites its entry, source and medians included. A device that
has no entry was not measured, and its dense matrix is formed only where it is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("crossovers.json")


def _read() -> dict[str, dict[str, Any]]:
    data: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
    return data


_DENSE_UP_TO: dict[str, dict[str, dict[str, int]]] = {device: entry["dense_up_to"] for device, entry in _read().items()}


def dense_up_to(device_type: str, backend: str, operator: str) -> int:
    """The dimension ``C H W`` up to which forming Sigma beats ``backend``; 0 where it never does."""
    return _DENSE_UP_TO.get(device_type, {}).get(backend, {}).get(operator, 0)
