"""The adapters for PyTorch and JAX; tests skip PyTorch where it is not installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

import asgd
from analysis.models.sme_law import sme_law
from asgd.errors import InputError
from asgd.problems.plugin import load_plugin
from asgd.staleness.empirical import Empirical
from tests.support import networks

HAS_TORCH = find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
FRAMEWORKS = [
    pytest.param("jax", id="jax"),
    pytest.param("torch", id="torch", marks=needs_torch),
]


def perceptron(framework, drop=0.0, seeded=True):
    make = networks.jax_perceptron if framework == "jax" else networks.torch_perceptron
    return make(drop, seeded)


def linear(framework, loss="mean", **options):
    """Return least squares with a bias-free linear layer, d = 3, and its data."""
    rng = np.random.default_rng(0)
    a, y = rng.standard_normal((40, 3)), rng.standard_normal(40)
    if framework == "torch":
        import torch

        module = torch.nn.Linear(3, 1, bias=False).double()
        half = {
            "mean": lambda out, y: ((out[:, 0] - y) ** 2).mean() / 2,
            "sum": lambda out, y: ((out[:, 0] - y) ** 2).sum() / 2,
        }
        return asgd.TorchProblem(module, half[loss], (a, y), **options), a, y
    import jax.numpy as jnp

    halves = {
        "mean": lambda p, a, y: jnp.mean((a @ p["w"] - y) ** 2) / 2,
        "sum": lambda p, a, y: jnp.sum((a @ p["w"] - y) ** 2) / 2,
    }
    start = {"w": np.ones(3, np.float32)}
    return asgd.JaxProblem(halves[loss], start, (a, y), **options), a, y


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_linear_layer_equals_least_squares(framework):
    problem, a, y = linear(framework, weight_decay=0.3)
    single = {"rtol": 0, "atol": problem.rounding}
    close = single if problem.dtype == np.float32 else {"rtol": 1e-12}
    x = np.random.default_rng(1).standard_normal((2, 5, 3))
    residual = x @ a.T - y
    np.testing.assert_allclose(
        problem.loss(x), (residual**2).mean(-1) / 2 + 0.15 * (x**2).sum(-1), **close
    )
    full = residual @ a / 40 + 0.3 * x
    np.testing.assert_allclose(problem.gradient(x), full, **close)
    np.testing.assert_allclose(problem.gradient(x[0, 0]), full[0, 0], **close)
    samples = residual[..., None] * a + 0.3 * x[..., None, :]
    np.testing.assert_allclose(problem.sample_gradients(x), samples, **close)
    batches = np.random.default_rng(2).integers(40, size=(2, 5, 7))
    own = np.take_along_axis(samples, batches[..., None], axis=-2).mean(-2)
    np.testing.assert_allclose(problem.gradient(x, batches), own, **close)
    shared = samples[:, :, batches[0, 0]].mean(axis=-2)
    np.testing.assert_allclose(problem.gradient(x, batches[0, 0]), shared, **close)
    np.testing.assert_allclose(problem.gradient(x[1, 1], batches[1, 1]), own[1, 1], **close)
    hessian = a.T @ a / 40 + 0.3 * np.eye(3)
    v = np.random.default_rng(3).standard_normal((2, 5, 3))
    np.testing.assert_allclose(problem.hessian_vector(x, v), v @ hessian, **close)
    np.testing.assert_allclose(problem.hessian_vector(x[0, 0], v), v @ hessian, **close)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_derivatives_of_a_network_agree_with_differences(framework):
    """Gradients and Hessian-vector products are tested along random directions."""
    problem = perceptron(framework)
    rng = np.random.default_rng(0)
    x = problem.initial_point(rng)
    for _ in range(3):
        v = rng.standard_normal(problem.dim)
        v /= np.linalg.norm(v)
        h = 0.05  # float32: rounding of the loss is about 1e-7
        slope = (problem.loss(x + h * v) - problem.loss(x - h * v)) / (2 * h)
        assert abs(problem.gradient(x) @ v - slope) < max(5e-5, problem.rounding)
        curvature = (problem.gradient(x + h * v) - problem.gradient(x - h * v)) / (2 * h)
        np.testing.assert_allclose(
            problem.hessian_vector(x, v), curvature, atol=2 * problem.rounding
        )
    mean = problem.sample_gradients(x).mean(axis=0)
    atol = max(1e-6, 1e-3 * problem.rounding)  # an accelerator multiplies with fewer bits
    np.testing.assert_allclose(mean, problem.gradient(x), atol=atol)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_points_one_by_one_equal_points_in_one_call(framework):
    """They agree to a few units of float32, because sums are taken in another order."""
    problem = perceptron(framework)
    rng = np.random.default_rng(0)
    x = problem.initial_point(rng) + rng.standard_normal((5, problem.dim)).astype(np.float32) / 10
    batches = rng.integers(problem.n_samples, size=(5, 32))
    one_call = [problem.gradient(x, batches), problem.gradient(x, batches[0]), problem.loss(x)]
    alone = [problem.gradient(x[i], batches[i]) for i in range(5)]
    np.testing.assert_allclose(one_call[0], alone, rtol=0, atol=3e-7)
    problem.one_by_one = True
    in_turn = [problem.gradient(x, batches), problem.gradient(x, batches[0]), problem.loss(x)]
    for first, second in zip(one_call, in_turn, strict=True):
        np.testing.assert_allclose(first, second, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_paths_of_a_network_are_the_same_with_any_number_of_threads(framework):
    problem = perceptron(framework)
    problem.one_by_one = True  # as for a large network
    start = problem.initial_point(np.random.default_rng(0))

    def ensemble(threads):
        law = Empirical.from_sample(np.array([0, 1, 1, 2]))
        options = {"batch_size": 8, "initial": start, "dtype": np.float32, "record": [0, 10]}
        return sme_law(problem, 0.1, law, 10, 64, 0, workers=2, threads=threads, **options)

    one, three = ensemble(1), ensemble(3)
    np.testing.assert_array_equal(one.final, three.final)
    assert one.loss_mean[-1] < one.loss_mean[0] - 5 * one.loss_std[-1] / 8


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_named_arrays_restore_the_parameters(framework):
    problem = perceptron(framework)
    x = problem.initial_point(np.random.default_rng(5)).astype(np.float32)
    named = problem.named_arrays(x)
    assert sum(array.size for array in named.values()) == problem.dim == x.size
    np.testing.assert_array_equal(problem.flatten(named), x)
    assert problem.dtype == np.float32
    assert 0.0 <= problem.metrics(x)["test_accuracy"] < 0.4  # untrained: about one in ten


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_start_is_given_or_depends_on_the_seed(framework):
    given, drawn = perceptron(framework, seeded=False), perceptron(framework)

    def start(problem, seed):
        return problem.initial_point(np.random.default_rng(seed))

    np.testing.assert_array_equal(start(given, 0), start(given, 1))
    np.testing.assert_array_equal(start(drawn, 0), start(perceptron(framework), 0))
    assert not np.array_equal(start(drawn, 0), start(drawn, 1))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_random_loss_is_seeded_by_its_batch(framework):
    problem = perceptron(framework, drop=0.5)
    rng = np.random.default_rng(0)
    x = problem.initial_point(rng)
    batch = rng.integers(problem.n_samples, size=8)
    first = problem.gradient(x, batch)
    np.testing.assert_array_equal(problem.gradient(x, batch), first)
    # the same samples in another order have other masks
    assert not np.allclose(problem.gradient(x, batch[::-1]), first, rtol=0.1)
    both = problem.gradient(np.stack([x, x]), np.stack([batch[::-1], batch]))
    np.testing.assert_allclose(both[1], first, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(problem.gradient(x), problem.gradient(x))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_masks_of_different_batches_are_independent(framework):
    """The means of two halves differ by at most three times the variance of independent draws."""
    problem = perceptron(framework, drop=0.5)
    rng = np.random.default_rng(0)
    x = problem.initial_point(rng)
    gradients = np.stack(
        [problem.gradient(x, np.r_[0, 1, 2, rng.integers(problem.n_samples)]) for _ in range(64)]
    )
    # Three of four samples are always the same. If masks depended on the sample alone, they would
    # repeat.
    deviation = gradients - gradients.mean(axis=0)
    halves = gradients[:32].mean(axis=0) - gradients[32:].mean(axis=0)
    variance = (deviation**2).sum() / 63
    assert halves @ halves < 3 * variance * (2 / 32)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_sum_over_the_batch_is_refused(framework):
    with pytest.raises(InputError, match="expected the mean over the batch"):
        linear(framework, loss="sum")


def jax_losses():
    """Return losses that `JaxProblem` refuses, by their defect."""
    import jax
    import jax.numpy as jnp

    def branch(p, a):
        mean = jnp.mean(a @ p["w"])
        return mean if mean > 0 else -mean

    def callback(p, a):
        return jax.pure_callback(
            lambda w: np.float32(w.sum()), jax.ShapeDtypeStruct((), np.float32), p["w"]
        )

    def loop(p, a):
        return jax.lax.while_loop(lambda x: x < 9, lambda x: 2 * x + 1, jnp.mean(a @ p["w"]))

    return {
        "branch": branch,
        "numpy": lambda p, a: np.mean(np.tanh(a @ p["w"])),
        "float": lambda p, a: jnp.mean(a) * float(p["w"][0]),
        "mask": lambda p, a: jnp.mean(p["w"][p["w"] > 0]),
        "callback": callback,
        "loop": loop,
        "vector": lambda p, a: a @ p["w"],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("branch", r"loss in line \d+ of test_networks.py: JAX cannot trace it \(TracerBool"),
        ("numpy", r"JAX cannot trace it \(TracerArrayConversionError\): expected jax.numpy"),
        ("float", r"JAX cannot trace it \(Concret.*with jnp.where or jax.lax.cond"),
        ("mask", r"JAX cannot trace it \(NonConcreteBooleanIndexError\)"),
        (
            "callback",
            r"loss.*: no value or no gradient of it for several points \(vmap is only",
        ),
        (
            "loop",
            r"loss.*: no value or no gradient of it for several points \(Reverse-mode",
        ),
        ("vector", r"loss has the shape \(1,\): expected a number"),
    ],
)
def test_an_unusable_jax_loss_is_refused_in_one_line(name, message):
    data = (np.ones((4, 3), np.float32),)
    with pytest.raises(InputError, match=message) as refusal:
        asgd.JaxProblem(jax_losses()[name], {"w": np.ones(3, np.float32)}, data)
    assert "\n" not in str(refusal.value)


def test_a_loss_with_a_gradient_of_its_own_has_products_with_the_hessian():
    import jax
    import jax.numpy as jnp

    square = jax.custom_vjp(lambda w: jnp.sum(w**2))
    square.defvjp(lambda w: (jnp.sum(w**2), w), lambda w, g: (2 * g * w,))
    given = {"w": np.ones(3, np.float32)}, (np.ones((4, 3), np.float32),)
    own = asgd.JaxProblem(lambda p, a: jnp.mean((a @ p["w"]) ** 2) + square(p["w"]), *given)
    product = own.hessian_vector(np.ones(3), np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(product, [[14, 16, 18], [2, 4, 2]], rtol=1e-6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_bad_arguments_are_named(framework):
    with pytest.raises(InputError, match=r"weight_decay = -1: expected a number >= 0"):
        linear(framework, weight_decay=-1)
    make = asgd.JaxProblem
    arguments = (lambda p, a: a.mean(), {"w": np.ones(2, np.float32)})
    if framework == "torch":
        import torch

        make, arguments = asgd.TorchProblem, (torch.nn.Linear(2, 1), lambda out: out.mean())
    with pytest.raises(InputError, match=r"data = arrays of shapes \(3, 2\), \(4,\): expected"):
        make(*arguments, (np.ones((3, 2)), np.ones(4)))


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_network_passes_the_trial_of_plugins(framework):
    for options in ({}, {"drop" if framework == "jax" else "dropout": 0.2}):
        problem = load_plugin(f"tests.support.networks:{framework}_perceptron", options)
        assert not problem.gives_noise


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_simulated_run_learns_repeats_and_is_verified(framework, tmp_path):
    from cluster.storage.verify import verify

    name = "drop" if framework == "jax" else "dropout"
    config = asgd.make_config(
        {
            "problem": {
                "kind": f"tests.support.networks:{framework}_perceptron",
                "options": {name: 0.1},
            },
            "optimizer": {"learning_rate": 0.5, "batch_size": 16},
            "cluster": {"workers": 3},
            "run": {"updates": 120, "eval_every": 40},
        }
    )
    first, second = (asgd.read_run(asgd.simulate(config, tmp_path / n)) for n in "ab")
    if asgd.make_problem(config).rounding < 1e-3:  # an accelerator sums in any order
        np.testing.assert_array_equal(first.loss["loss"], second.loss["loss"])
    losses = first.loss["loss"].to_numpy()
    assert losses[-1] < 0.7 * losses[0]
    verdict = verify(first)
    assert not verdict.findings
    assert verdict.checked.endswith("; a replay agrees")


@needs_torch
def test_the_problem_never_changes_a_module_that_it_returned():
    problem = perceptron("torch")
    x = problem.initial_point(np.random.default_rng(0)).astype(np.float32)
    module = problem.unflatten(x)
    problem.gradient(0 * x, np.arange(4))
    np.testing.assert_array_equal(problem.flatten(_arrays(module)), x)
    assert all(p.grad is None for p in module.parameters())


def _arrays(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


@needs_torch
def test_running_statistics_are_refused_or_frozen():
    import torch
    from torch import nn

    def module():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    data = (torch.randn(20, 3), torch.randn(20, 1))
    with pytest.raises(InputError, match=r"module.1 = BatchNorm1d: expected no layer with running"):
        asgd.TorchProblem(module(), nn.functional.mse_loss, data)
    frozen = asgd.TorchProblem(module(), nn.functional.mse_loss, data, freeze_statistics=True)
    x = frozen.initial_point(np.random.default_rng(0))
    before = frozen.named_arrays(x)["1.running_mean"]
    frozen.gradient(x, np.arange(8))
    np.testing.assert_array_equal(frozen.named_arrays(x)["1.running_mean"], before)


@needs_torch
def test_parameters_of_several_types_are_refused():
    import torch
    from torch import nn

    mixed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1).double())
    with pytest.raises(InputError, match=r"torch.float32, torch.float64: expected parameters all"):
        asgd.TorchProblem(mixed, nn.functional.mse_loss, (torch.ones(2, 3), torch.ones(2, 1)))


@needs_torch
def test_a_dataset_gives_the_values_of_its_tensors():
    import torch
    from torch import nn

    class Pairs(torch.utils.data.Dataset):
        def __init__(self, x, y):
            self.x, self.y = x, y

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return self.x[i], self.y[i]

    x, y = torch.randn(20, 3), torch.randn(20, 1)
    module = nn.Linear(3, 1)
    of_tensors, of_dataset, of_items = (
        asgd.TorchProblem(module, nn.functional.mse_loss, data)
        for data in ((x, y), torch.utils.data.TensorDataset(x, y), Pairs(x, y))
    )
    points = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    batches = np.random.default_rng(1).integers(20, size=(4, 5))
    for other in (of_dataset, of_items):
        np.testing.assert_array_equal(other.loss(points), of_tensors.loss(points))
        np.testing.assert_allclose(
            other.gradient(points, batches), of_tensors.gradient(points, batches), atol=1e-6
        )


@needs_torch
def test_a_module_that_vmap_cannot_take_is_computed_point_by_point(caplog):
    """A log message gives the reason once."""
    torch = pytest.importorskip("torch")

    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, x):
            scores = self.layer(x)
            return scores if scores.abs().max().item() < 1e3 else scores / 2

    images, labels = networks.digits()
    layers = [Branching(), torch.nn.Linear(64, 10)]
    layers[1].load_state_dict(layers[0].layer.state_dict())
    problems = [
        asgd.TorchProblem(layer, torch.nn.functional.cross_entropy, (images, labels))
        for layer in layers
    ]
    rng = np.random.default_rng(0)
    x = 0.1 * rng.standard_normal((3, problems[0].dim), dtype=np.float32)
    batches = rng.integers(len(labels), size=(3, 5))
    assert not caplog.messages
    assert [problem.points_at_once > 1 for problem in problems] == [False, True]
    (said,) = caplog.messages
    assert said.startswith("module Branching: torch.func.vmap cannot take it with its loss (")
    assert "\n" not in said
    for value in (lambda p: p.gradient(x, batches), lambda p: p.sample_gradients(x[0])[:4]):
        np.testing.assert_allclose(*map(value, problems), rtol=1e-4, atol=1e-6)
    assert len(caplog.messages) == 1


@needs_torch
def test_a_second_derivative_that_autograd_leaves_out_is_logged_once(caplog):
    torch = pytest.importorskip("torch")

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return 2 * ctx.saved_tensors[0] * slope

    class Squared(torch.nn.Linear):
        square = staticmethod(lambda x: x**2)

        def forward(self, x):
            return self.square(super().forward(x))

    class SquaredOnce(Squared):
        square = Square.apply

    data = torch.ones(4, 3), torch.ones(4, 1)
    x = np.ones(4, np.float32)
    for module in (Squared(3, 1), SquaredOnce(3, 1)):
        assert not caplog.messages
        problem = asgd.TorchProblem(module, torch.nn.functional.mse_loss, data)
        for _ in range(2):
            problem.hessian_vector(x, x)
    (said,) = caplog.messages
    assert "module SquaredOnce: a function marked once_differentiable has no second" in said


def test_making_a_problem_avoids_the_slow_imports_of_a_prediction():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    steps = """
import sys, asgd
problem = {"kind": "tests.support.networks:torch_perceptron"}
asgd.make_problem({"problem": problem})
assert "torch" in sys.modules
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", steps], check=True)


@needs_torch
def test_a_random_loss_does_not_change_the_generator_of_torch():
    import torch

    problem = perceptron("torch", drop=0.5)
    x = problem.initial_point(np.random.default_rng(0))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    problem.gradient(x, np.arange(4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(HAS_TORCH, reason="PyTorch is installed")
def test_without_torch_one_line_says_how_to_install_it():
    with pytest.raises(InputError, match=r"TorchProblem: .*pip install '\.\[torch\]'"):
        _ = asgd.TorchProblem
