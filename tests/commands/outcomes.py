"""What a command says when it fails, and the weights that it leaves."""

import pytest

from sgr_kernels.cli import main
from sgr_kernels.training.trained import load_model


def fails(arguments, capsys):
    """The one line that a command with bad input leaves on standard error."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("sgr: error: ")
    assert error.count("\n") == 1
    return error


def refuses(arguments, capsys):
    """What argparse says of an argument."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def weights(folder):
    return load_model(folder)[0].state_dict()
