"""Networks of one's own: made from a name, with weights that fit; and trained as the paper's are."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgr_kernels.models import Normalize
from sgr_kernels.training import checkpoint
from sgr_kernels.training.images import DataError, DataSet
from sgr_kernels.training.loop import CHECKPOINT_FILE, Trainer
from sgr_kernels.training.methods import METHODS, Settings
from sgr_kernels.training.network import NetworkError, Source, classes_of, located
from sgr_kernels.training.trained import load_model
from sgr_kernels.training.weights import load_weights
from tests.own_network import write_network
from tests.training.test_loop import assert_same, stop_after


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory, monkeypatch):
    """What a person has asked for is remembered here."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    return home


@pytest.fixture
def file(tmp_path):
    return write_network(tmp_path)


def test_a_network_is_what_the_callable_returns(file):
    make = Source(f"{file}:small", '{"width": 5}').maker()
    torch.manual_seed(0)
    made = make()
    assert made.first.weight.shape == (5, 1, 3, 3)
    torch.manual_seed(0)
    assert torch.equal(make().first.weight, made.first.weight)
    assert isinstance(Source("torch.nn:Linear", '{"in_features": 2, "out_features": 3}').maker()(), nn.Linear)
    assert isinstance(Source("torch:nn.Identity").maker()(), nn.Identity)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("net.py:small", "[1]", r"model_args: expected a JSON object of names and values, got '\[1\]'"),
        ("net.py:small", "{", r"model_args: expected a JSON object, got '\{'"),
        ("net.py:small", '{"depth": 3}', "model_args: .*net.py:small: got an unexpected keyword argument 'depth'"),
        ("net.py:needs", "{}", "model_args: .*net.py:needs: missing a required argument: 'classes'"),
        ("net.py:large", "{}", "model: .*net.py has no 'large'; it has Small, small, needs"),
        ("net.py:number", "{}", "model: .*net.py:number must be a callable, got int 3"),
        ("net.py:no_module", "{}", r"model: .*no_module must return an nn.Module, got list \[1, 2\]"),
        ("net.py:fails", "{}", "model: .*net.py:fails raised RuntimeError: out of luck"),
        ("net.py:leaves", "{}", "model: .*net.py:leaves raised SystemExit: 5"),
        ("net.py:made", "{}", "model: .*net.py:made must be a callable that returns an nn.Module, got a Linear"),
        ("script.py:main", "{}", "model: .*script.py cannot be imported: SystemExit: 0"),
        ("script:main", "{}", "model: no module 'script' is installed; a file is named as script.py:CALLABLE"),
        ("nowhere.py:small", "{}", "model: there is no file .*nowhere.py"),
        ("broken.py:small", "{}", "model: .*broken.py cannot be imported: SyntaxError"),
        ("no_such_package.models:small", "{}", "model: no module 'no_such_package' is installed"),
        ("torch.nn:Linnear", "{}", "model: torch.nn has no 'Linnear'"),
        ("net.py", "{}", "model: expected MODULE:CALLABLE, FILE.py:CALLABLE or one of mnist, cifar10, got"),
        (":small", "{}", "model: expected MODULE:CALLABLE"),
        ("mnist", '{"classes": 3}', "model_args: 'mnist' takes activation and pooling"),
        ("given", "{}", "model: this network was made in Python"),
    ],
)
def test_what_makes_no_network_is_named_in_one_line(file, tmp_path, monkeypatch, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def small(:")
    (tmp_path / "script.py").write_text("import sys\n\nsys.exit(0)\n")
    with Path(file).open("a") as net:
        net.write("\n\ndef leaves():\n    raise SystemExit(5)\n\n\nmade = nn.Linear(1, 1)\n")
    with pytest.raises(NetworkError, match=message) as error:
        Source(located(name), arguments).maker()()
    assert "\n" not in str(error.value)


def test_each_file_has_its_own_neighbours(tmp_path):
    """Also those that the callable itself asks for, and again after the other file's."""
    for name in ("a", "b"):
        folder = tmp_path / name
        (folder / "parts").mkdir(parents=True)
        (folder / "layers.py").write_text(f"NAME = {name!r}\n")
        (folder / "parts" / "__init__.py").write_text("from layers import NAME\n")
        (folder / "later.py").write_text(f"NAME = {name!r}\n")
        (folder / "net.py").write_text(
            "from torch import nn\n\nimport layers\nfrom parts import NAME\n\n\n"
            "class Named(nn.Identity):\n    pass\n\n\n"
            "def named():\n    import later\n\n    found = Named()\n"
            "    found.names = layers.NAME, NAME, later.NAME\n    return found\n"
        )
    path = list(sys.path)
    makers = {name: Source(f"{tmp_path / name / 'net.py'}:named").maker() for name in ("a", "b")}
    for name in ("a", "b", "a"):
        assert makers[name]().names == (name, name, name)
    assert sys.path == path


def test_normalize_is_the_first_layer_and_no_weight(file):
    made = Source(f"{file}:small", '{"channels": 3}', ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))).maker()()
    images = torch.rand(4, 3, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)))
    made.eval()
    assert torch.allclose(made(images), made.network((images - mean) / std), atol=1e-6)
    assert all(name.startswith("network.") for name in made.state_dict())
    with pytest.raises(ValueError, match="normalize: 3 means, but images of 1 channels"):
        made(images[:, :1])
    for mean, std in ((0.5, 0.0), (float("nan"), 1.0), ((0.1, 0.2), (0.1, 0.2, 0.3))):
        with pytest.raises(ValueError, match="normalize: expected means and positive deviations"):
            Normalize(mean, std)


def weights_file(path, state, kind):
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "nested":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    elif kind == "compiled":
        state = {f"model._orig_mod.{name}": value for name, value in state.items()}
        torch.save({"model": {"model_state_dict": state}, "state_dict": "none"}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "plain", "nested", "compiled"])
@pytest.mark.parametrize("normalize", [None, ((0.5,), (0.2,))])
def test_weights_are_read_from_files_of_several_kinds(file, tmp_path, kind, normalize):
    wanted = Source(f"{file}:small").maker()()
    path = weights_file(tmp_path / "weights", wanted.state_dict(), kind)
    made = Source(f"{file}:small", normalize=normalize).maker()()
    load_weights(made, path)
    inner = made if normalize is None else made.network
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in inner.state_dict().items())


def test_weights_that_do_not_fit_are_named(file, tmp_path):
    network = Source(f"{file}:small").maker()()
    state = network.state_dict()
    before = {name: value.clone() for name, value in state.items()}

    def refused(content, message):
        torch.save(content, tmp_path / "weights")
        with pytest.raises(NetworkError, match=message) as error:
            load_weights(network, tmp_path / "weights")
        assert "\n" not in str(error.value)

    refused(
        {**state, "head.weight": torch.zeros(1000, 8)}, r"'head.weight' of shape \(1000, 8\) .*, the network \(10, 8\)"
    )
    refused({k: v for k, v in state.items() if k != "head.bias"}, "lacks 'head.bias'")
    refused({**state, "fc.weight": torch.zeros(1)}, "has 'fc.weight', which the network lacks")
    refused([1, 2], "must hold a state dict")
    refused({3: torch.zeros(1)}, "must hold a state dict, names and tensors")
    weight = state["head.weight"]
    for other, shown in (
        (weight.to(torch.complex64), "complex64"),
        (weight > 0, "bool"),
        (weight.to_sparse(), "sparse or quantized, float32"),
        (weight.to("meta"), "without numbers, float32"),
    ):
        refused({**state, "head.weight": other}, rf"of shape \(10, 8\) \({shown}\), the network \(10, 8\) \(float32\)")
    (tmp_path / "weights").write_bytes(pickle.dumps(print, protocol=2))  # reading it the old way would run code
    with pytest.raises(NetworkError, match="neither safetensors nor a state dict that can be read without running"):
        load_weights(network, tmp_path / "weights")
    (tmp_path / "weights").write_bytes(b"\x10\0\0\0\0\0\0\0{half")
    with pytest.raises(NetworkError, match="neither safetensors nor a state dict"):
        load_weights(network, tmp_path / "weights")
    with pytest.raises(NetworkError, match="there is no file"):
        load_weights(network, tmp_path / "none")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_heads_and_images_that_do_not_fit_are_named(file, digits):
    small = Source(f"{file}:small", '{"classes": 7}').maker()()
    with pytest.raises(DataError, match=r"data: mnist-sample has 10 classes, the network's head 7"):
        classes_of(small, digits.train)
    coloured = Source(f"{file}:small", '{"channels": 3}').maker()()
    with pytest.raises(NetworkError, match="model: on images 1x28x28 of mnist-sample: RuntimeError: Given groups=1"):
        classes_of(coloured, digits.train)
    with pytest.raises(NetworkError, match=r"on images 1x28x28 of mnist-sample: expected logits of shape \(2, classes"):
        classes_of(nn.Flatten(2), digits.train)
    with pytest.raises(NetworkError, match="model: expected a network with parameters to train, got none"):
        Trainer(Settings("given", method="clean"), digits, model=nn.Flatten())


def test_trying_a_network_leaves_no_trace(file, digits):
    small = Source(f"{file}:small").maker()().train()
    before, stream = [t.clone() for t in small.state_dict().values()], torch.get_rng_state()
    assert classes_of(small, digits.train) == 10
    assert small.training
    assert all(torch.equal(a, b) for a, b in zip(before, small.state_dict().values()))
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("pgd_sgr", "sgr_grad", "sgr_sign")])
def test_every_method_trains_it_and_resumes_to_the_same_bits(file, digits, tmp_path, method):
    digits = DataSet(digits.train.first(20), digits.test.first(10))
    settings = Settings(f"{file}:small", method=method, batch_size=8, normalize=((0.13,), (0.31,)), attack_steps=2)
    whole = Trainer(settings, digits)
    assert whole.run(1, progress=False)
    stopped = Trainer(settings, digits)
    assert not stopped.run(1, out=tmp_path, progress=False, stop=stop_after(2))
    resumed = Trainer(settings, digits)
    resumed.resume(tmp_path)
    assert resumed.run(1, progress=False)
    assert_same(resumed, whole)


def test_code_in_a_checkpoint_runs_only_where_it_was_asked_for(file, digits, tmp_path, state_home):
    """The folder of one's own training is read as it is; the same folder in other hands is not."""
    digits = DataSet(digits.train.first(20), digits.test.first(10))
    trainer = Trainer(Settings(f"{file}:small", method="clean", model_args='{"width": 5}'), digits)
    trainer.run(1, out=tmp_path, progress=False)
    model, _ = load_model(tmp_path)
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(model(images), trainer.model.eval()(images))
    ran = tmp_path / "net.ran"

    def refused():
        ran.unlink(missing_ok=True)
        with pytest.raises(
            NetworkError, match=r"code that you have not asked for.*: --model .*net.py:small --model-args"
        ):
            load_model(tmp_path)
        assert not ran.exists()

    notes = [path for path in state_home.rglob("*") if path.is_file()]
    assert len(notes) == 1
    notes[0].unlink()
    refused()
    load_model(tmp_path, Source(f"{file}:small", '{"width": 5}'))  # asked for, and so remembered
    load_model(tmp_path)
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text() + "\n# changed since\n")
    refused()
    state = checkpoint.load(tmp_path / CHECKPOINT_FILE)
    state["settings"] |= {"architecture": "os:system", "model_args": f'{{"command": "touch {ran}"}}'}
    checkpoint.save(tmp_path / CHECKPOINT_FILE, state)
    with pytest.raises(NetworkError, match="code that you have not asked for"):
        load_model(tmp_path)
    assert not ran.exists()


def test_training_begins_with_given_weights_and_a_moved_file_is_the_same(file, digits, tmp_path):
    digits = DataSet(digits.train.first(20), digits.test.first(10))
    first = Trainer(Settings(f"{file}:small", method="clean", seed=1), digits)
    first.run(1, out=tmp_path, progress=False)
    settings = Settings(f"{file}:small", method="clean", seed=2, init_weights=str(tmp_path))
    second = Trainer(settings, digits)
    assert torch.equal(second.model.first.weight, first.model.first.weight)
    (tmp_path / "elsewhere").mkdir()
    moved = Settings(f"{write_network(tmp_path / 'elsewhere')}:small", method="clean", seed=1)
    Trainer(moved, digits).resume(tmp_path)


def test_networks_and_data_from_python(digits, tmp_path):
    """Any module, any data set, any loader; who loads it makes the network again."""
    parts = (digits.train.first(20), digits.test.first(10))
    tensors = [TensorDataset(part.images / 255, part.labels) for part in parts]
    settings = Settings("given", method="sgr_exp", batch_size=8, augment=False)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    ends = {}
    for name, data in {
        "sets": tensors,
        "memory": parts,
        "loaders": [DataLoader(part, batch_size=8, shuffle=True) for part in tensors],
    }.items():
        whole = Trainer(settings, data, model=network())
        whole.run(2, progress=False)
        stopped = Trainer(settings, data, model=network())
        assert not stopped.run(2, out=tmp_path / name, progress=False, stop=stop_after(4))
        resumed = Trainer(settings, data, model=network())
        resumed.resume(tmp_path / name)
        assert resumed.run(2, out=tmp_path / name, progress=False)
        assert_same(resumed, whole)
        ends[name] = whole.model[1].weight
        loaded, _ = load_model(tmp_path / name, network())
        assert torch.equal(loaded[1].weight, whole.model[1].weight)
    assert torch.allclose(ends["sets"], ends["memory"], atol=1e-6)
    assert not torch.allclose(ends["loaders"], ends["memory"], atol=1e-6)  # a loader's order is its own
    with pytest.raises(NetworkError, match="made in Python"):
        load_model(tmp_path / "sets")
    with pytest.raises(NetworkError, match="goes with the architecture 'given'"):
        Trainer(settings, parts)


def test_a_last_batch_of_one_image_is_explained_and_can_be_left_out(digits):
    """BatchNorm of vectors has nothing to normalize by there."""
    parts = DataSet(digits.train.first(17), digits.test.first(10))

    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))

    settings = Settings("given", method="sgr_exp", batch_size=8, augment=False)
    with pytest.raises(ValueError, match=r"^batch_size: the network's BatchNorm has one value.*: drop_last leaves"):
        Trainer(settings, parts, model=network()).run(1, progress=False)
    training = Trainer(replace(settings, drop_last=True), parts, model=network())
    training.run(2, progress=False)
    assert len(training.batches) == 2
    assert [record["epoch"] for record in training.history] == [1, 2]
    with pytest.raises(ValueError, match="drop_last: expected at least a batch of 18 images, got 17"):
        Trainer(replace(settings, drop_last=True, batch_size=18), parts, model=network())
    loader = DataLoader(TensorDataset(parts.train.images / 255, parts.train.labels), batch_size=8)
    with pytest.raises(ValueError, match="drop_last: a DataLoader's batches are its own"):
        Trainer(replace(settings, drop_last=True), (loader, parts.test), model=network())
