"""Exported parameters: the formats, and runs that start from such a file."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

import asgd
from asgd.errors import InputError
from asgd.problems.base import starting_point
from asgd.problems.make import make_problem
from asgd.simulation.replay import replay

SOFTMAX = {"run": {"updates": 60, "eval_every": 20}, "cluster": {"workers": 3}}
PERCEPTRON = {
    **SOFTMAX,
    "problem": {"kind": "tests.support.networks:jax_perceptron"},
    "optimizer": {"learning_rate": 0.5},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")

    def simulated(name, settings):
        return asgd.read_run(asgd.simulate(asgd.make_config(settings), directory / name))

    return {"softmax": simulated("softmax", SOFTMAX), "jax": simulated("jax", PERCEPTRON)}


def test_a_simulated_run_keeps_its_last_parameters(runs):
    run = runs["softmax"]
    *_, last = replay(run, make_problem(run.config))
    assert run.parameters_update == 60
    np.testing.assert_allclose(run.parameters, last.parameters, rtol=1e-12)


@pytest.mark.slow
def test_an_interrupted_simulation_keeps_its_last_parameters(tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    config = asgd.make_config({"run": {"updates": 10**7, "eval_every": 1}})
    with pytest.raises(Stop):
        asgd.simulate(config, tmp_path / "run", stop)
    run = asgd.read_run(tmp_path / "run")
    assert run.parameters_update == len(run.trace) > 0
    assert float(make_problem(config).loss(run.parameters)) == run.loss["loss"].iloc[-1]


@pytest.mark.slow
def test_a_real_run_keeps_its_last_parameters(tmp_path, shared_ray):
    import cluster

    run = asgd.read_run(cluster.run(asgd.make_config(PERCEPTRON), tmp_path / "run"))
    *_, last = replay(run, make_problem(run.config))
    assert run.parameters_update == 60
    np.testing.assert_allclose(run.parameters, last.parameters, rtol=1e-4, atol=1e-6)


def test_damaged_parameters_are_named(tmp_path):
    path = asgd.simulate(asgd.make_config(SOFTMAX), tmp_path / "run")
    file = path / "parameters.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"no parameters are saved; parameters.bin its checksum"):
        _ = asgd.read_run(path).parameters
    file.unlink()
    with pytest.raises(InputError, match=r"no parameters are saved$"):
        _ = asgd.read_run(path).parameters


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "jax"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_exported_parameters_start_another_run(runs, tmp_path, kind, suffix):
    if suffix == ".pt" and find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    run = runs[kind]
    file = asgd.export(run, tmp_path / f"model{suffix}")
    settings = SOFTMAX if kind == "softmax" else PERCEPTRON
    problem = {**settings.get("problem", {}), "initial_from": str(file)}
    config = asgd.make_config({**settings, "problem": problem})
    np.testing.assert_array_equal(
        starting_point(make_problem(config), seed=9),
        run.parameters if kind == "softmax" else run.parameters.astype(np.float32),
    )
    again = asgd.read_run(asgd.simulate(config, tmp_path / "again"))
    assert again.loss["loss"].iloc[0] == pytest.approx(run.loss["loss"].iloc[-1], rel=1e-6)


@pytest.mark.slow
def test_exported_files_have_names_and_metadata(runs, tmp_path):
    from safetensors import safe_open

    run = runs["jax"]
    with np.load(asgd.export(run, tmp_path / "model.npz")) as stored:
        assert set(stored) == {"hidden/w", "hidden/b", "out/w", "out/b", "__metadata__"}
        assert stored["hidden/w"].shape == (64, 8)
        metadata = json.loads(str(stored["__metadata__"]))
    assert metadata["updates"] == "60"
    assert float(metadata["last_loss"]) == run.loss["loss"].iloc[-1]
    with safe_open(asgd.export(run, tmp_path / "model.safetensors"), "numpy") as stored:
        assert stored.metadata() == metadata


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
def test_pytorch_loads_an_exported_state_without_asgd(tmp_path):
    import torch
    from torch import nn

    from tests.support.networks import HIDDEN, TRAINED, digits

    settings = {**PERCEPTRON, "problem": {"kind": "tests.support.networks:torch_perceptron"}}
    run = asgd.read_run(asgd.simulate(asgd.make_config(settings), tmp_path / "run"))
    state = torch.load(asgd.export(run, tmp_path / "model.pt"), weights_only=True)
    module = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Dropout(0), nn.Linear(HIDDEN, 10))
    module.load_state_dict(state)
    assert state._metadata["asgd"]["updates"] == "60"
    images, labels = digits()
    with torch.no_grad():
        found = module(torch.as_tensor(images[TRAINED:], dtype=torch.float32)).argmax(1).numpy()
    accuracy = make_problem(run.config).metrics(run.parameters)["test_accuracy"]
    assert accuracy == np.mean(found == labels[TRAINED:])


def test_other_files_are_refused_in_one_line(runs, tmp_path):
    run = runs["softmax"]
    with pytest.raises(InputError, match=r"expected a file ending in .npz, .safetensors or .pt"):
        asgd.export(run, tmp_path / "model.h5")
    with pytest.raises(InputError, match="gone"):
        asgd.export(run, tmp_path / "gone" / "model.npz")

    def start(file):
        return make_problem(asgd.make_config({"problem": {"initial_from": str(tmp_path / file)}}))

    with pytest.raises(InputError, match=r"none.npz': cannot be read"):
        start("none.npz")
    for name in ("text.npz", "text.safetensors", "text.pt"):
        (tmp_path / name).write_text("no arrays")
        if name != "text.pt" or find_spec("torch"):
            with pytest.raises(InputError, match=r"cannot be read"):
                start(name)
    if find_spec("torch"):
        import torch

        for number, content in enumerate(([1, 2], {"model": {}, "epoch": 3})):
            torch.save(content, tmp_path / f"{number}.pt")
            with pytest.raises(InputError, match="its values are not all tensors"):
                start(f"{number}.pt")
    np.savez(tmp_path / "other.npz", w=np.ones(3))
    with pytest.raises(InputError, match=r"has w: expected 'parameters' too"):
        start("other.npz")
    np.savez(tmp_path / "short.npz", parameters=np.ones(3))
    with pytest.raises(InputError, match=r"has 3 parameters: expected 650"):
        start("short.npz")
    np.savez(tmp_path / "nan.npz", parameters=np.full(650, np.nan))
    with pytest.raises(InputError, match="not finite"):
        start("nan.npz")
    np.savez(tmp_path / "objects.npz", parameters=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"cannot be read \(Object arrays"):
        start("objects.npz")
