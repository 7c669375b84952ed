"""Tests that execute the Triton kernels on the CPU; collected where TRITON_INTERPRET=1 is set, before any import.

``tests/backends/test_triton_interpreter.py`` runs this folder in a process of its own.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
