"""Times from a GPU are put beside the least ones that its own ceilings and the counts allow."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import predictions
from benchmarks.cuda_static import RESULT
from sgr_kernels.cli import main

COUNTS = json.loads(RESULT.read_text())
CASE = "v+q (1024,3,32,32)"


def facts(device="NVIDIA H100 80GB HBM3", microseconds=20.0, **ceilings):
    values = {f"times {CASE}": {"sgr native": {"milliseconds": microseconds / 1e3}}, **ceilings}
    return [
        {"fact": name, "value": value, "machine": {"device": device, "commit": "0"}} for name, value in values.items()
    ]


def test_the_largest_of_the_least_times_counts():
    least = COUNTS["sm_90"][CASE]["floors in us"]
    (row,) = predictions.rows(facts(), COUNTS)
    assert (row["bound"], row["least"]) == ("issue", least["issue"])
    assert row["measured"] == pytest.approx(20.0)
    slow = {"copy bandwidth": {"gigabytes_per_second": 1000.0}}
    (row,) = predictions.rows(facts(**slow), COUNTS)
    assert row["bound"] == "memory"
    assert row["least"] == pytest.approx(1e6 * 2 * 4 * 1024 * 3 * 32 * 32 / 1000e9, rel=1e-3)
    (row,) = predictions.rows(facts(launches={"node_microseconds": 50.0}), COUNTS)
    assert (row["bound"], row["least"]) == ("launches", 50.0)


def test_what_is_far_from_its_least_time_wants_an_explanation(tmp_path, capsys):
    file = tmp_path / "facts.jsonl"
    for microseconds, ratio, end in ((20.0, "1.92", "| 10 | over 1.5: explain |"), (12.0, "1.15", "| 10 |  |")):
        file.write_text("".join(json.dumps(line) + "\n" for line in facts(microseconds=microseconds)))
        assert main(["bench", "predictions", str(file)]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert f"| {ratio} |" in line
        assert line.endswith(end)


def test_facts_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="one machine and commit, got 2"):
        predictions.rows(facts() + facts("NVIDIA H200"), COUNTS)
    with pytest.raises(ValueError, match="an A100, H100 or H200, whose kernels were counted, got AMD"):
        predictions.rows(facts("AMD"), COUNTS)
    failed = [{**line, "value": {"sgr native": {"error": "no"}}} for line in facts()]
    assert predictions.rows(failed, COUNTS) == []


def test_goals_are_those_of_the_kernels_page():
    page = (Path(__file__).parents[2] / "csrc" / "cuda" / "README.md").read_text()
    rows = re.findall(r"^\| ((?:v\+q|accumulation) \([\d,]+\)) \|.* \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {case: float(goal) for case, goal in rows} == predictions.GOALS
