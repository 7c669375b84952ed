"""The pages: their code runs, their links lead somewhere, and they say all there is to say."""

from __future__ import annotations

import copy
import importlib.util
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import TensorDataset

from sgr_kernels.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/results/**/*.md", "csrc/cuda/*.md")
    for path in sorted(ROOT.glob(pattern))
]
FENCE = re.compile(
    r"^(?P<needs> *<!-- needs: \w+ -->\n)?(?P<indent> *)```(?P<kind>.*)\n(?P<code>(?:.*\n)*?) *```$", re.M
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def page(path: str) -> str:
    return (ROOT / path).read_text()


def blocks(text: str) -> list[tuple[str | None, str]]:
    """Python blocks, and the package that each needs."""
    return [
        (
            needs[0] if (needs := re.findall(r"needs: (\w+)", block["needs"] or "")) else None,
            textwrap.dedent(block["code"]),
        )
        for block in FENCE.finditer(text)
        if block["kind"] == "python"
    ]


WITH_CODE = [path for path in PAGES if blocks(path.read_text())]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages take for granted (docs/start.md), in a process that may be its own group of processes."""
    monkeypatch.chdir(tmp_path)
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(variable, value)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)
    )
    images, labels = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
    return {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "images": images,
        "labels": labels,
        "loader": [(images[:8], labels[:8]), (images[8:], labels[8:])],
        **dict.fromkeys(("train_data", "test_data"), TensorDataset(images, labels)),
        **{name: copy.deepcopy(model) for name in ("network", "network_like_it")},
    }


@pytest.mark.parametrize("path", WITH_CODE, ids=name)
def test_code_runs(path: Path, names: dict[str, Any]) -> None:
    """Block after block, in one namespace; what needs a package that is not installed is left out."""
    if path.name == "sensor.md":  # its frames, digits and network are grey
        names["model"] = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.GELU(), nn.Linear(32, 10))
        names["loader"] = [(images[:, :1, 2:30, 2:30], labels) for images, labels in names["loader"]]
        names["optimizer"] = torch.optim.Adam(names["model"].parameters())
    needed = {package for package, _ in blocks(path.read_text())} - {None}
    missing = {package for package in needed if importlib.util.find_spec(package) is None}
    try:
        for package, code in blocks(path.read_text()):
            if package not in missing:
                exec(compile(code, name(path), "exec"), names)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} is not installed")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_blocks_are_code_that_runs_or_say_that_they_are_none(path: Path) -> None:
    text = path.read_text()
    kinds = {block["kind"] for block in FENCE.finditer(text)}
    assert kinds <= {"python", "", "console", "sh", "text", *(f"{{sgr-command}} {name}" for name in COMMANDS)}
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(list(FENCE.finditer(text)))


def anchors(text: str) -> set[str]:
    """Of headings, as code-hosting sites make them."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = FENCE.sub("", path.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.is_file(), f"{name(path)}: {target}"
        assert not anchor or anchor in anchors(place.read_text()), f"{name(path)}: {target}"


def test_the_front_page_lists_every_page() -> None:
    listed = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^):#]+\.md)\)", page("README.md"))}
    assert listed >= set(ROOT.glob("docs/*.md")) | {ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"}


def test_commands_are_documented() -> None:
    assert set(re.findall(r"^```\{sgr-command\} (\w+)$", page("docs/commands.md"), re.M)) == set(COMMANDS)


def test_environment_variables_are_documented() -> None:
    sources = [
        *ROOT.glob("sgr_kernels/**/*.py"),
        *ROOT.glob("benchmarks/*"),
        ROOT / "setup.py",
        ROOT / "tests/conftest.py",
    ]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    read = set(re.findall(r"environ(?:\.get\(|\[)\s*\"(SGR_\w+)\"", text)) | set(
        re.findall(r"\"(SGR_\w+)\" in os.environ", text)
    )
    assert read == set(re.findall(r"^\| `(SGR_\w+)`", page("docs/environment.md"), re.M))
    assert read >= {"SGR_BUILD", "SGR_BACKEND"}


def test_the_examples_are_short() -> None:
    for path in ROOT.glob("docs/examples/*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name
    for picture in ROOT.glob("docs/**/*.png"):
        assert picture.stat().st_size < 100_000, picture.name
