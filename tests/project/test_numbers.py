"""The numbers on the front page, in docs/ (choose, certify, cost) and beside the kernels are those of the results."""

from __future__ import annotations

import json
import re
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from sgr_kernels.reproduce import stats
from sgr_kernels.reproduce.certified import mean_radius

ROOT = Path(__file__).parents[2]


def page(path: str) -> str:
    """A page as one line, its empty cells alike."""
    return re.sub(r"\n *", " ", re.sub(r"\|(?= \|)", "| ", (ROOT / path).read_text()))


def result(path: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / path).read_text())


def accuracies(method: str) -> list[str]:
    """MNIST, in %: without attack; under noise of 0.7 over 16, 4 and 1 pixels, where there is any; under PGD."""
    attacked, noisy = (result(f"paper/mnist/{name}.json")["methods"].get(method, []) for name in ("table1", "lrc"))
    shares = [fmean(run["test_accuracy"] for run in attacked)]
    for length in ("16", "4", "1") if noisy else ():
        curves = [run["curves"][length] for run in noisy]
        shares.append(fmean(curve["accuracy"][curve["eps"].index(0.7)] for curve in curves))
    shares.append(fmean(fmean(run["curves"]["pgd"]["accuracy"]) for run in attacked))
    return [f"{100 * share:.1f}" for share in shares]


def cost(way: str, network: str = "carlini-wagner-mnist", entry: str = "time_ratio") -> str:
    (row,) = (row for row in result("step-cpu.json")["rows"] if (row["network"], row["way"]) == (network, way))
    return f"{row[entry]:.2f}"


def kept(way: str, path: str = "lazy-cpu.json") -> list[str]:
    """Of every step's gain under PGD and under noise, and the test accuracy."""
    test, *gains = result(path)["summary"][way].values()
    return [*(f"{100 * gain['kept']:.0f} %" if "kept" in gain else "" for gain in gains), f"{100 * test['mean']:.1f}"]


def smooth(kind: str, method: str, data: str = "mnist") -> list[str]:
    """In %: without attack; noise over 16 pixels and over 1; PGD and AutoAttack at the largest eps."""
    runs = result(f"beyond/{data}/smooth.json")["networks"][kind][method]
    test = 100 * sum(run["test_accuracy"] for run in runs) / len(runs)  # the page's formula: its rounding of ties
    shares = [fmean(run["noise"][length]["accuracy"][0] for run in runs) for length in ("16", "1")]
    shares += [fmean(run[attack]["accuracy"][-1] for run in runs) for attack in ("pgd", "autoattack")]
    return [f"{test:.1f}", *(f"{100 * share:.1f}" for share in shares)]


def interval(kind: str, method: str, under: str) -> str:
    """Accuracy on MNIST with half its 95 % interval."""
    return stats.mean([run[under] for run in result("beyond/mnist/smooth.json")["networks"][kind][method]]).percent()


def gain(kind: str, method: str, under: str, data: str = "mnist", *, on: str = "clean") -> str:
    """Points of accuracy gained on another training of the same network, with half their 95 % interval."""
    found = result(f"beyond/{data}/smooth.json")["networks"][kind]
    return stats.difference(*([run[under] for run in found[name]] for name in (method, on))).points().lstrip("+")


def radius(kind: str, method: str, *, half: bool = False) -> str:
    """Mean certified radius under noise over 16 pixels, and half of its 95 % interval."""
    found = mean_radius([run["certified"] for run in result("beyond/mnist/smooth.json")["networks"][kind][method]])
    return f"{found.mean:.2f}" + (f" ± {found.half:.2f}" if half else "")


def short_range_radius(method: str) -> str:
    """Mean certified radius of ReLU networks under noise over one pixel, at the main sigma."""
    found = result("beyond/mnist/certified.json")
    wanted = (method, 1.0, found["certified_sigmas"][0])
    runs = [run for run in found["certificates"] if (run["method"], run["decay_length"], run["sigma"]) == wanted]
    return f"{mean_radius(runs).mean:.2f}"


def corrupted(way: str, kind: str) -> str:
    """Points gained on plain training under a corruption, on CIFAR-10, as the page has them in its summary."""
    text = page("benchmarks/results/beyond/cifar10/corruptions.md")
    what = {"data": "Training on the corruption", "sgr": "SGR with a corruption's covariance"}[way]
    (found,) = re.findall(rf"{what} against plain training, on that corruption: [^)]*{kind} ([^,)]+)", text)
    return found.lstrip("+")


CERTIFIED = ("clean", "gn", "sgr_exp", "lrc")
RELU, GELU = "ReLU, max-pooling", "GELU, average pooling"


def ensembles() -> list[str]:
    """Rows of MNIST's and CIFAR-10's networks under three attacks; what the weaker two overrate."""
    found = {data: result(f"beyond/{data}/ensemble.json")["networks"] for data in ("mnist", "cifar10")}

    def accuracy(row: dict[str, Any], attack: str) -> float:
        return 100 * row[attack]["accuracy"][0]

    def overrated(attack: str, data: str) -> list[float]:
        return [accuracy(row, attack) - accuracy(row, "autoattack") for row in found[data]]

    attacks = ("pgd", "strong", "autoattack")
    pairs = zip(*found.values(), strict=True)
    rows = [f"| {' | '.join(f'{accuracy(row, attack):.1f}' for row in pair for attack in attacks)} |" for pair in pairs]
    mnist, cifar10 = (overrated("pgd", data) for data in found)
    most = max(abs(gap) for data in found for gap in overrated("strong", data))
    return [
        *rows,
        f"overrates by {min(mnist):.1f} to {max(mnist):.1f} points",
        f"on CIFAR-10 by {min(cifar10):.1f} to {max(cifar10):.1f}",
        f"within {most:.1f} points of each other on all ten networks",
    ]


def front_page() -> list[str]:
    attacked = {method: smooth(RELU, method)[-1] for method in ("sgr_sign", "pgd", "clean")}
    eighth = "an eighth by importance"
    return [
        f"| plain | {' | '.join(accuracies('clean'))} | 1 |",
        f"| gradient norm | {' | '.join(accuracies('gn'))} | {cost('gn')} |",
        f"| SGR, covariance of gradient signs | {' | '.join(accuracies('sgr_sign'))} | {cost('sgr')} |",
        f"| SGR, exponential covariance over 16 pixels | {' | '.join(accuracies('sgr_exp'))} | ≤ {cost('sgr')} |",
        "adversarial training (one seed) | {} |  |  |  | {} | {} |".format(*accuracies("pgd"), cost("pgd-7")),
        f"costs {cost(f'sgr, {eighth}')} plain ones, and of the gain under noise {kept(eighth)[1]} are kept",
        "the whole penalty takes {} plain steps in the median, {} at most".format(*zoo("double-backward")[::3]),
        f"| plain | {' | '.join(smooth(GELU, 'clean'))} |",
        f"| L1 norm of the gradient | {' | '.join(smooth(GELU, 'l1'))} |",
        f"| SGR, covariance of gradient signs | {' | '.join(smooth(GELU, 'sgr_sign'))} |",
        f"| SGR, exponential covariance over 16 pixels | {' | '.join(smooth(GELU, 'sgr_exp'))} |",
        f"| PGD adversarial training | {' | '.join(smooth(GELU, 'pgd'))} |",
        "AutoAttack leaves {sgr_sign} % to SGR by gradient signs on MNIST, {pgd} % to adversarial training, and "
        "{clean} % to plain training".format_map(attacked),
        f"{interval(GELU, 'sgr_sign', 'autoattack')} and {interval(GELU, 'pgd', 'autoattack')}",
        f"gradient signs gain {gain(GELU, 'sgr_sign', 'autoattack', 'cifar10')} points under AutoAttack on the smooth "
        f"network, adversarial training {gain(GELU, 'pgd', 'autoattack', 'cifar10')}",
        f"{gain(GELU, 'sgr_sign', 'corruptions')} points where",
        f"gains {gain(GELU, 'pgd', 'corruptions')}",
        "changes them by {}, with the exponential covariance by {}".format(
            *(gain(RELU, method, "corruptions") for method in ("sgr_sign", "sgr_exp"))
        ),
        "gained {} points under fog and {} under blur".format(*(corrupted("data", kind) for kind in ("fog", "blur"))),
        "[{} and {}]".format(*(corrupted("sgr", kind) for kind in ("fog", "blur"))),
        f"to {ensembles()[-1].split(' of each')[0]} on ten networks",
        f"is {radius(GELU, 'sgr_exp')}, plain training's {radius(GELU, 'clean')}, adversarial training's "
        f"{radius(GELU, 'pgd')}",
    ]


def choose() -> list[str]:
    ways = {"every step": "sgr", "every 4th": "sgr, every 4th step"}
    ways |= {
        way: f"sgr, {way}" for way in ("an eighth by importance", "a sixteenth by importance", "a quarter at random")
    }
    methods = ("sgr", "sgr, forward-mode", "sgr, finite-difference")
    batch_norm = [row["cosine"] for row in result("batch-norm-cpu.json")["rows"] if "whole" in row["way"]]
    agreement = {
        (row["epochs"], row["precision"], row["strength"]): row["cosine"]["mean"]
        for row in result("agreement-cpu.json")["rows"]
    }
    searches = result("paper/mnist/search.json")["searches"]
    strongest = searches["sgr_sign, pgd"]["trials"][-1]
    cifar10 = result("paper/cifar10/search.json")["searches"]
    columns = [itemgetter(place) for place in (0, 1, 4)]
    return [
        *ensembles(),
        *(f"| {' | '.join(accuracies(method))} |" for method in ("clean", "gn", "sgr_sign", "sgr_exp")),
        *(
            f"| {' | '.join(kept(way))} | {cost(timed)} | {cost(timed, 'carlini-wagner-cifar10')} |"
            for way, timed in ways.items()
        ),
        *(f"{cost(way)} ({cost(way, entry='memory_ratio')})" for way in methods),
        f"an eighth keeps {kept('an eighth by importance', 'lazy-cifar10-cpu.json')[1]} of the gain under noise",
        f"has a cosine of {min(batch_norm):.2f} to {max(batch_norm):.2f} to the exact one",
        f"the exact one is {agreement[1, 'float32', 1.0]:.2f} at strength 1",
        "it found {gn, pgd[strength]:g} for the gradient norm, {sgr_sign, pgd[strength]:g} for gradient signs and "
        "{sgr_exp, noise[strength]:g} for the exponential covariance".format_map(searches),
        "on CIFAR-10 {gn, pgd[strength]:g} to {gn, noise[strength]:g} for the gradient norm and "
        "{sgr_exp, noise[strength]:g} for both others".format_map(cifar10),
        *(
            f"| {' | '.join(pick(smooth(kind, method, data)) for kind in (RELU, GELU) for pick in columns)} |"
            for data in ("mnist", "cifar10")
            for method in ("clean", "gn", "l1", "sgr_sign", "sgr_exp", "pgd", "lrc")
        ),
        "gradient signs {} points (ReLU: {}), the L1 norm {} ({}), adversarial training {} ({})".format(
            *(
                gain(kind, method, "autoattack", "cifar10")
                for method in ("sgr_sign", "l1", "pgd")
                for kind in (GELU, RELU)
            )
        ),
        "loses {} points on MNIST and {} on CIFAR-10, by gradient signs {} and {}".format(
            *(
                gain(RELU, "clean", "corruptions", data, on=method)
                for method in ("sgr_exp", "sgr_sign")
                for data in ("mnist", "cifar10")
            )
        ),
        f"{gain(GELU, 'l1', 'autoattack', 'cifar10', on='pgd')} points ahead of adversarial training",
        "costs {} plain ones of MNIST's GELU network and {} of CIFAR-10's".format(
            *(f"{result(f'beyond/{data}/smooth.json')['cost'][GELU]['sgr_sign']:.1f}" for data in ("mnist", "cifar10"))
        ),
        f"at {strongest['strength']:g} cost 7 points of validation accuracy, from "
        f"{100 * searches['sgr_sign, pgd']['clean_accuracy']:.1f} to {100 * strongest['accuracy']:.1f} %",
    ]


def certify() -> list[str]:
    clean, gn, *close = (radius(RELU, method, half=method in ("sgr_exp", "lrc")) for method in CERTIFIED)
    return [
        f"is {clean} for plain training, {gn} for the gradient norm, {close[0]} for SGR with an exponential covariance",
        f"and {close[1]} for training on such noise",
        "they are {}, {}, {} and {}".format(
            *(radius(GELU, method, half=method in ("sgr_exp", "lrc")) for method in CERTIFIED)
        ),
        f"the ReLU network of SGR has a radius of {short_range_radius('sgr_exp')}, plain training's "
        f"{short_range_radius('clean')} and the gradient norm's {short_range_radius('gn')}",
    ]


def zoo(method: str, entry: str = "time_ratio") -> list[str]:
    """Median, the middle nine tenths and the most of a ratio over all real models."""
    lines = (ROOT / "benchmarks" / "results" / "zoo.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if (row["pass"], row["method"]) == ("times", method) and entry in row]
    ratios = sorted(row[entry] for row in rows)
    return [f"{ratios[int(share * len(ratios))]:.1f}" for share in (0.5, 0.05, 0.95)] + [f"{ratios[-1]:.1f}"]


def ratios(row: dict[str, Any]) -> str:
    """Of a row of steps: time in plain steps, and in brackets memory."""
    return f"{row['time_ratio']:.2f} ({row['memory_ratio']:.2f})"


def large(network: str) -> str:
    """The row of a network at 224 pixels: time, memory, shares of the operator and of the covariance's update."""
    (_, *ways) = result(f"step-{network}-cpu.json")["rows"]
    shares = (f"{100 * ways[0][part]:.1f} %" for part in ("penalty_share", "update_share"))
    return f"step-{network}-cpu.json) | {' | '.join(map(ratios, ways))} | {', '.join(shares)} |"


def costs() -> list[str]:
    middle, low, high, most = zoo("double-backward")
    first = [f"{float(value):.0f}" for value in zoo("double-backward", "first_ratio")]
    return [
        *(large(network) for network in ("resnet50", "vit-s")),
        f"double backward takes {middle} plain steps in the median ({low} to {high} for nine in ten models, {most} at "
        "most)",
        "forward mode {} ({} to {})".format(*zoo("forward-mode")),
        "finite differences {} ({} to {})".format(*zoo("finite-difference")),
        f"takes {first[0]} plain ones in the median, {first[3]} at most, once",
    ]


def solves() -> list[str]:
    """Times in ms or s, and those of others in ours, at decay lengths 1, 4 and 16."""
    cells = sorted(result("solve-cpu.json")["cells"], key=itemgetter("decay_length"))

    def row(pixels: int, provider: str, digits: int = 0, unit: float = 1) -> str:
        found = [row for c in cells if c["problem"]["height"] == pixels for row in c["rows"]]
        found = [row for row in found if row["provider"] == provider]
        values = [row["milliseconds"] / unit if provider == "sgr" else row["over sgr"]["ratio"] for row in found]
        return "{}, {} and {}".format(*(f"{value:.{digits}f}" for value in values))

    others = [
        phrase
        for pixels in (32, 64)
        for phrase in (
            f"{row(pixels, 'dense solve float32')} times as long in float32",
            f"{row(pixels, 'dense solve float64')} times in float64",
            f"{row(pixels, 'dense Cholesky float64 prepared', 1)} times",
        )
    ]
    return [*others, *(f"{row(pixels, 'sgr')} ms" for pixels in (32, 64)), f"{row(224, 'sgr', 2, 1000)} s"]


def kernels() -> list[str]:
    """The CUDA kernels' rows but for their goals, and what is said of T: 2F numbers a line, across four times."""
    counts, phrases = result("cuda-static.json")["sm_90"], []

    def moved(case: dict[str, Any], what: str) -> float:
        return (case["bytes"][f"{what}read"] + case["bytes"][f"{what}written"]) / 1e6

    for name, case in counts.items():
        if not case["bytes"]:
            continue
        warps = [
            f"{kernel['warps']} x {kernel['instructions a warp and image']:.0f}"
            for kernel in case["kernels"].values()
            if "instructions a warp and image" in kernel
        ]
        floors = [case["floors in us"][what] for what in ("issue", "tensor cores", "L2", "memory, H100", "launches")]
        cells = [name, str(case["launches"]), *(warps or ["–"])]
        cells.append(f"{moved(case, 'distinct '):.3g} / {moved(case, ''):.3g}")
        phrases.append(" | ".join([*cells, *(f"{floor:.3g}" if floor else "–" for floor in floors)]) + " |")
    crossings = []
    for images, side in ((64, 224), (8, 512)):
        total = moved(counts[f"v+q ({images},3,{side},{side})"], "distinct ")
        crossings.append(f"{4 * 8 * images * 3 * side**2 / 1e6:.0f} of the {total:.0f}")
    return [
        *phrases,
        f"{crossings[0]} MB and {crossings[1]}.",
        f"as those of 80, {counts['v+q (64,3,65,65)']['floors in us']['issue']:.1f} us to issue for 64",
        "issues {} instructions".format(
            *(kernel["instructions around them"] for kernel in counts["v+q (1024,3,32,32)"]["kernels"].values())
        ),
    ]


@pytest.mark.parametrize(
    ("path", "numbers"),
    [
        ("README.md", front_page),
        ("csrc/cuda/README.md", kernels),
        ("docs/choose.md", choose),
        ("docs/certify.md", certify),
        ("docs/cost.md", costs),
        ("benchmarks/results/README.md", solves),
    ],
)
def test_numbers_are_those_of_committed_results(path: str, numbers: Any) -> None:
    text = page(path)
    for wanted in numbers():
        assert wanted in text, wanted


def test_differences_are_those_that_the_claims_page_found() -> None:
    claims, text = page("benchmarks/results/paper/mnist/README.md"), page("docs/choose.md")
    for found, said in {
        "+15.3 ± 1.9": "by 15.3 ± 1.9 points",
        "1 -16.3 ± 2.5": "over one pixel it loses 16.3 ± 2.5",
        "gn +6.4 ± 3.4, sgr_sign +4.5 ± 3.9": "gains 4.5 ± 3.9 points under PGD on MNIST, the gradient norm 6.4 ± 3.4",
        "sgr_grad -1.3 ± 1.1": "within 1.3 ± 1.1 points",
        "lrc +2.5 ± 1.3": "it is 2.5 ± 1.3 points behind SGR",
    }.items():
        assert found in claims
        assert said in text, said
