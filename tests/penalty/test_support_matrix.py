"""The support matrix: every cell is a check of gradients, and the documentation says what the checks say."""

from __future__ import annotations

import pytest

from sgr_kernels.penalty.choice import METHODS
from tests import support_matrix

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of compilers and process groups, not of this package
    pytest.mark.xdist_group("support_matrix"),
]


def documented() -> dict[tuple[str, str], str]:
    page = support_matrix.PAGE.read_text().partition(support_matrix.MODELS)[0]
    rows = [line.strip("| \n").split(" | ") for line in page.splitlines() if " | " in line]
    return {(row[0], method): cell for row in rows[1:] for method, cell in zip(METHODS, row[1:])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", support_matrix.CASES)
def test_cell(case: str, method: str) -> None:
    assert support_matrix.outcome(case, method) == documented()[case, method]


def test_page_has_no_other_rows() -> None:
    assert {case for case, _ in documented()} == set(support_matrix.CASES)
