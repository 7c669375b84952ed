"""The command line: ``sgr COMMAND ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from sgr_kernels._version import __version__

# Each command is a module of its name in sgr_kernels.commands, with add_arguments(parser) and run(arguments).
COMMANDS = {
    "demo": "train clean, gradient-norm and SGR networks on shipped digits and report how they differ",
    "train": "train a network on images, resumably",
    "evaluate": "attack a trained network and report its accuracy",
    "certify": "certify networks under noise of a covariance, and compare them",
    "covariance": "estimate and plot covariance functions of images or of adversarial perturbations",
    "diagnose": "see up to which strength the approximation behind SGR holds for a network",
    "reproduce": "train, attack and tabulate what the paper did, beside its numbers",
    "bench": "measure the cost of the operators and of training steps",
}

# Packages that a plain installation lacks, by the extra that brings them.
_EXTRAS = {
    **dict.fromkeys(("matplotlib", "safetensors", "tqdm"), "train"),
    **dict.fromkeys(("imagecorruptions", "cv2", "scipy", "skimage"), "corruptions"),
    "PIL": "images",
    "torchvision": "vision",
    "pyautoattack": "autoattack",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit status.

    0: done. 1: ended early by an interrupt that was honoured between two steps. 2: the input is at fault.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = argparse.Namespace(traceback=False)
    try:
        arguments = _parser(argv).parse_args(argv)
        return import_module(f"sgr_kernels.commands.{arguments.command}").run(arguments)
    except KeyboardInterrupt:
        print("sgr: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        message = f"{package} is not installed: pip install 'sgr_kernels[{_EXTRAS[package]}]'"
    except (ValueError, OSError) as error:
        if arguments.traceback:
            raise
        message = _with_option(" ".join(str(error).split()), arguments)
    print(f"sgr: error: {message}", file=sys.stderr)
    return 2


def _with_option(message: str, arguments: argparse.Namespace) -> str:
    """An error that begins with the name of an argument, with that of the option that gave it."""
    name, colon, rest = message.partition(":")
    named = colon and name in vars(arguments) and name not in ("checkpoint", "images")  # images themselves
    return f"--{name.replace('_', '-')}:{rest}" if named else message


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser; only the chosen command's module is imported, so that the overview appears at once."""
    parser = argparse.ArgumentParser(
        prog="sgr",
        description="Structured gradient regularization: train robust image classifiers, attack them, look inside.",
        epilog="'sgr COMMAND --help' lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"sgr_kernels {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name == chosen:
            import_module(f"sgr_kernels.commands.{name}").add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
