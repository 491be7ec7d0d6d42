"""Problems of the user: which classes are usable, and how others are refused."""

from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest

from asgd.config.make import make_config
from asgd.errors import InputError, RunFailedError
from asgd.problems.linear import LeastSquares
from asgd.problems.make import make_problem
from asgd.simulation.simulate import simulate

PLAIN = """
    import numpy as np

    class Regression:
        def __init__(self, n=50, l2=0.1, seed=3):
            rng = np.random.default_rng(seed)
            self.features, self.target = rng.normal(size=(n, 3)), rng.normal(size=n)
            self.l2, self.dim, self.n_samples = l2, 3, n
            self.calls = 0

        def initial_point(self, rng):
            return rng.normal(size=3)

        def loss(self, x):
            return 0.5 * np.mean((self.features @ x - self.target) ** 2) + 0.5 * self.l2 * x @ x

        def gradient(self, x, indices):
            self.calls += 1
            a = self.features[indices]
            return a.T @ (a @ x - self.target[indices]) / len(a) + self.l2 * x
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Write a module into the current directory and load a factory of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])

    def load(source: str, factory: str = "Regression", options=None, module="user_problem"):
        sys.modules.pop(module, None)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(PLAIN) + textwrap.dedent(source))
        problem = {"kind": f"{module}:{factory}", "options": options or {}}
        return make_problem(make_config({"problem": problem}))

    yield load
    sys.modules.pop("user_problem", None)


def same_regression(n=50, l2=0.1) -> LeastSquares:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(n, 3))
    return LeastSquares(features, rng.normal(size=n), l2)


def test_a_plain_class_becomes_a_problem(plugin):
    problem, same = plugin(""), same_regression()
    x = np.random.default_rng(0).normal(size=(2, 4, 3))
    batch = np.array([3, 3, 17])
    own = np.random.default_rng(1).integers(50, size=(2, 4, 5))
    for value, expected in (
        (problem.loss(x), same.loss(x)),
        (problem.gradient(x), same.gradient(x)),
        (problem.gradient(x, batch), same.gradient(x, batch)),
        (problem.gradient(x, own), same.gradient(x, own)),
        (problem.gradient(x[0, 0], own), same.gradient(x[0, 0], own)),
        (problem.gradient(x[0, 0]), same.gradient(x[0, 0])),
        (problem.sample_gradients(x), same.sample_gradients(x)),
        (problem.gradient_covariance(x), same.gradient_covariance(x)),
    ):
        assert value.shape == expected.shape
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(problem.hessian(x[0, 0]), same.hessian(x[0, 0]), atol=1e-8)
    assert problem.gradient(x.astype(np.float32)).dtype == np.float32
    assert problem.initial_point(np.random.default_rng(5)).shape == (3,)


@pytest.mark.parametrize("given", ["np.float32(mean)", "mean.tolist()"])
def test_a_gradient_of_any_floats_becomes_float64(plugin, given):
    source = f"""
    class Other(Regression):
        def gradient(self, x, indices):
            mean = super().gradient(x, indices)
            return {given}
    """
    x, batch = np.array([1.0, -2.0, 0.5]), np.array([3, 3, 17])
    value = plugin(source, "Other").gradient(x, batch)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, same_regression().gradient(x, batch), rtol=1e-6)


def test_options_are_the_arguments_of_the_factory(plugin):
    assert plugin("", options={"n": 7, "l2": 2.0}).n_samples == 7


def test_the_noise_of_many_samples_takes_few_calls(plugin):
    problem = plugin("", options={"n": 5000})
    user = problem._user
    user.calls = 0
    x = np.broadcast_to(np.array([0.3, -0.2, 0.5]), (4, 3))
    problem.gradient_and_noise(x, np.random.default_rng(0))
    assert user.calls <= 8
    draws = np.broadcast_to(x[0], (4000, 3))
    _, xi = problem.gradient_and_noise(draws, np.random.default_rng(1))
    products = xi[:, :, None] * xi[:, None, :]
    error = products.mean(axis=0) - same_regression(5000).gradient_covariance(x[0])
    assert np.abs(error / (products.std(axis=0) / np.sqrt(4000))).max() < 4.0


ROWWISE = """
    class Rowwise(Regression):
        def loss(self, x):
            residual = x @ self.features.T - self.target
            return 0.5 * (residual**2).mean(-1) + 0.5 * self.l2 * (x**2).sum(-1)

        def gradient(self, x, indices=None):
            self.calls += 1
            a, y = self.features, self.target
            if indices is not None:
                a, y = a[indices], y[indices]
            return (x @ a.T - y) @ a / len(a) + self.l2 * x
"""


def test_a_class_that_works_row_by_row_gets_all_points_in_one_call(plugin):
    problem, same = plugin(ROWWISE, "Rowwise"), same_regression()
    x = np.random.default_rng(0).normal(size=(2, 30, 3))
    problem._user.calls = 0
    np.testing.assert_allclose(problem.gradient(x), same.gradient(x))
    np.testing.assert_allclose(
        problem.gradient(x, np.array([1, 2])), same.gradient(x, np.array([1, 2]))
    )
    assert problem._user.calls == 2
    np.testing.assert_allclose(problem.loss(x), same.loss(x))


def test_a_class_that_misreads_a_square_of_points_gets_them_one_by_one(plugin):
    problem = plugin("")
    x = np.random.default_rng(0).normal(size=(3, 3))  # square, so that a @ x does not fail
    np.testing.assert_allclose(problem.gradient(x), same_regression().gradient(x))


def test_a_gradient_that_mixes_points_gets_them_one_by_one(plugin):
    mixing = """
        class Cubic:
            dim, n_samples = 2, 1

            def initial_point(self, rng):
                return np.ones(2)

            def loss(self, x):
                return (x**2).sum(-1) ** 1.5 / 3

            def gradient(self, x, indices):
                return np.linalg.norm(x) * x
    """
    x = np.array([[1.0, 2.0], [3.0, -1.0]])
    size = np.sqrt([[5.0], [10.0]])
    np.testing.assert_allclose(plugin(mixing, "Cubic").gradient(x), size * x)


OPTIONAL = """
    class Complete(Regression):
        def sample_gradients(self, x):
            residual = self.features @ x - self.target
            return residual[:, None] * self.features + self.l2 * x

        def hessian(self, x):
            return np.diag([1.0, 2.0, 3.0])

    class Noisy(Regression):
        def gradient_noise(self, x, rng):
            return rng.normal(size=3) * [1.0, 2.0, 3.0]
"""


def test_optional_methods_are_used(plugin):
    complete = plugin(OPTIONAL, "Complete", {"n": 5000})
    x = np.zeros((2, 3))
    complete._user.calls = 0
    complete.gradient_and_noise(x, np.random.default_rng(0))
    assert complete._user.calls == 0
    assert complete.hessian(x).shape == (2, 3, 3)
    np.testing.assert_array_equal(complete.hessian(x[0]), np.diag([1.0, 2.0, 3.0]))
    noisy = plugin(OPTIONAL, "Noisy")
    mean, xi = noisy.gradient_and_noise(np.zeros((4000, 3)), np.random.default_rng(0))
    np.testing.assert_allclose(mean, np.broadcast_to(noisy.gradient(x[0]), (4000, 3)))
    z = (np.mean(xi**2, axis=0) / [1.0, 4.0, 9.0] - 1.0) / np.sqrt(2.0 / 4000)
    assert np.abs(z).max() < 4.0


def test_a_subclass_of_problem_is_used_as_it_is(plugin):
    good = """
        from asgd.problems.linear import LeastSquares

        def make(n):
            rng = np.random.default_rng(3)
            return LeastSquares(rng.normal(size=(n, 3)), rng.normal(size=n))
    """
    assert type(plugin(good, "make", {"n": 9})) is LeastSquares
    bad = """
        from asgd.problems.base import Problem

        class Unvectorised(Regression, Problem):
            def gradient(self, x, indices=None):
                return super().gradient(x, np.arange(50) if indices is None else indices)
    """
    with pytest.raises(InputError, match="differs from the points one by one"):
        plugin(bad, "Unvectorised")


BROKEN = """
    class NoLoss:
        dim, n_samples = 3, 5
        initial_point = gradient = None

    class ZeroDim(Regression):
        def __init__(self):
            super().__init__()
            self.dim = 0

    class WrongStart(Regression):
        def initial_point(self, rng):
            return np.zeros(4)

    class VectorLoss(Regression):
        def loss(self, x):
            return x

    class WrongShape(Regression):
        def gradient(self, x, indices):
            return super().gradient(x, indices)[:2]

    class WholeNumbers(Regression):
        def gradient(self, x, indices):
            return super().gradient(x, indices).astype(int)

    class Infinite(Regression):
        def loss(self, x):
            return np.inf

    class Raising(Regression):
        def gradient(self, x, indices):
            raise RuntimeError("no\\ndata")

    class WrongSamples(Regression):
        def sample_gradients(self, x):
            return np.ones((50, 3))

    class WrongHessian(Regression):
        def hessian(self, x):
            return np.ones(3)

    class WrongNoise(Regression):
        def gradient_noise(self, x, rng):
            return 0.0

    class MetricsOfALayer(Regression):
        def metrics(self, x):
            return {"norm": x}

    class MetricsInAList(Regression):
        def metrics(self, x):
            return [1.0]

    class UnnamedMetrics(Regression):
        def metrics(self, x):
            return {3: 1.0}

    class ManyMetrics(Regression):
        def metrics(self, x):
            return {str(i): 1.0 for i in range(65)}

    class Masked(Regression):
        def gradient(self, x, indices):
            return np.ma.masked_array(super().gradient(x, indices), [True, False, False])

    class Unready(Regression):
        @property
        def dim(self):
            raise RuntimeError("no data yet")

        @dim.setter
        def dim(self, value):
            pass

    class Silent(Exception):
        def __str__(self):
            raise RuntimeError

    class Unshowable(Regression):
        def gradient(self, x, indices):
            raise Silent

    not_callable = 3
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("NoLoss", "NoLoss has no loss: expected dim, n_samples, initial_point"),
        ("ZeroDim", "dim = 0: expected an integer >= 1"),
        ("WrongStart", r"initial_point\(rng\) has shape \(4,\): expected shape \(3,\)"),
        ("VectorLoss", r"loss\(x\) has shape \(3,\): expected a number"),
        ("WrongShape", r"gradient\(x\) has shape \(2,\): expected shape \(3,\)"),
        ("WholeNumbers", r"gradient\(x\) is of type int64: expected floats"),
        ("Infinite", r"loss\(x\) is not finite"),
        ("Raising", r"gradient\(x\) raised RuntimeError: no data \(.*user_problem.py:\d+\)"),
        ("WrongSamples", r"mean of sample_gradients\(x\) over the samples is not gradient\(x\)"),
        ("WrongHessian", r"hessian\(x\) has shape \(3,\): expected shape \(3, 3\)"),
        ("WrongNoise", r"gradient_noise\(x, rng\) has shape \(\): expected shape \(3,\)"),
        ("MetricsOfALayer", r"metrics\(x\): norm is an object of type ndarray: expected a number"),
        ("MetricsInAList", r"metrics\(x\) returned an object of type list: expected numbers by"),
        ("UnnamedMetrics", r"metrics\(x\) has the name 3: expected printable text"),
        ("ManyMetrics", r"metrics\(x\) has 65 entries: expected at most 64"),
        ("Masked", r"gradient\(x\) returned masked values: expected shape \(3,\); fill them"),
        ("Unready", r"problem raised RuntimeError: no data yet \(.*user_problem.py:\d+\)"),
        ("Unshowable", r"gradient\(x\) raised Silent: its message cannot be shown \(.*py:\d+\)"),
        ("not_callable", "has no factory 'not_callable'; it has Regression, NoLoss"),
        ("absent", "has no factory 'absent'"),
        ("", "has no factory ''"),
    ],
)
def test_an_unusable_class_is_refused_in_one_line(plugin, factory, message):
    with pytest.raises(InputError, match=message) as caught:
        plugin(BROKEN, factory)
    assert str(caught.value).startswith(f"problem.kind = 'user_problem:{factory}': ")
    assert "\n" not in str(caught.value)


def test_a_factory_that_raises_is_refused(plugin):
    raising = """
        def make(n):
            raise LookupError("no data")
    """
    with pytest.raises(
        InputError, match=r"factory raised LookupError: no data \(.*user_problem.py"
    ):
        plugin(raising, "make", {"n": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 5, "absent": 1}, "got an unexpected keyword argument 'absent'; Ridge takes n, l2"),
        ({"l2": 1.0}, "missing a required argument: 'n'; Ridge takes n, l2"),
    ],
)
def test_the_refusal_of_an_option_names_the_class_and_its_options(plugin, options, message):
    source = """
        class Ridge(Regression):
            def __init__(self, n, l2=0.1):
                super().__init__(n, l2)
    """
    with pytest.raises(InputError, match=message) as caught:
        plugin(source, "Ridge", options)
    assert "plugin.py" not in str(caught.value)


def test_a_method_with_wrong_arguments_is_named_with_the_class_of_the_user(plugin):
    source = """
        class NoIndices(Regression):
            def gradient(self, x):
                return x
    """
    with pytest.raises(InputError, match=r"NoIndices.gradient\(\) takes 2 positional") as caught:
        plugin(source, "NoIndices")
    assert "plugin.py" not in str(caught.value)


FOREIGN = """
    class Tensor:
        def __init__(self, values, dtype="float32", why=None):
            self.values, self.dtype, self.why = values, dtype, why

        def __array__(self, dtype=None, copy=None):
            if self.why is not None:
                raise RuntimeError(self.why)
            if self.dtype == "bfloat16" and dtype != np.float32:
                raise TypeError("NumPy has no bfloat16")
            return np.asarray(self.values, dtype=dtype)

    class Layers(Regression):
        def gradient(self, x, indices):
            whole = super().gradient(x, indices)
            return [whole[:2], whole[2:]]

    class Graph(Regression):
        def gradient(self, x, indices):
            return Tensor(x, why="Can't call numpy() on Tensor that\\nrequires grad")

    class Device(Regression):
        def loss(self, x):
            return Tensor(0.0, why="can't convert cuda:0 device type tensor to numpy")

    class Start(Regression):
        def initial_point(self, rng):
            return [np.zeros(2), np.zeros(1)]

    class Samples(Regression):
        def sample_gradients(self, x):
            return Tensor(x, why="on a device")

    class Nothing(Regression):
        def loss(self, x):
            pass

    class MissingData(Regression):
        def __init__(self):
            super().__init__()
            self.target[7] = np.nan

    class Half(Regression):
        def loss(self, x):
            with np.errstate(over="ignore"):
                return np.float16(1e6 * super().loss(x))

    class Brain(Regression):
        def gradient(self, x, indices):
            return Tensor(super().gradient(x, indices), "bfloat16")

        def sample_gradients(self, x):
            rows = (self.features @ x - self.target)[:, None] * self.features + self.l2 * x
            cut = rows.astype(np.float32).view(np.int32) & ~0xFFFF  # 8 bits are left
            return Tensor(cut.view(np.float32), "bfloat16")
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "Layers",
            r"gradient\(x\) returned an object of type list, which does not become an array",
        ),
        ("Layers", r"shape \(3,\); np.concatenate\(\[np.ravel\(layer\) for layer in layers\]\)"),
        ("Graph", r"gradient\(x\) returned an object of type Tensor, .*that requires grad\): exp"),
        ("Graph", r"expected shape \(3,\); tensor.detach\(\).cpu\(\).numpy\(\) makes an array"),
        ("Device", r"loss\(x\) returned .*cuda:0 device.*: expected a number; tensor.detach"),
        ("Start", r"initial_point\(rng\) returned an object of type list"),
        ("Samples", r"sample_gradients\(x\) returned .* on a device\): expected shape \(50, 3\)"),
        ("Nothing", r"loss\(x\) returned an object of type NoneType: expected a number"),
        ("MissingData", r"loss\(x\) is NaN at the initial point: check the data for NaN"),
        (
            "Half",
            r"loss\(x\) is not finite in float16, which ends at 65504: return float32 or float64",
        ),
    ],
)
def test_an_unusable_value_is_refused_in_one_line(plugin, factory, message):
    with pytest.raises(InputError, match=message) as caught:
        plugin(FOREIGN, factory)
    assert "\n" not in str(caught.value)


def test_a_gradient_of_bfloat16_becomes_float64(plugin):
    """The class `Tensor` stands in for a library with bfloat16, which NumPy lacks."""
    x, batch = np.array([1.0, -2.0, 0.5]), np.array([3, 3, 17])
    problem = plugin(FOREIGN, "Brain")
    expected = same_regression().gradient(x, batch)
    for points in (x, np.array([x, x])):
        value = problem.gradient(points, batch)
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, np.broadcast_to(expected, points.shape), rtol=1e-6)


def test_an_overflow_in_float16_is_named(plugin, tmp_path):
    steep = """
        class Steep(Regression):
            def gradient(self, x, indices):
                with np.errstate(over="ignore"):
                    return (-5.0 * super().gradient(x, indices)).astype(np.float16)
    """
    plugin(steep, "Steep")
    run = {"divergence_factor": 1e300}
    config = make_config({"problem": {"kind": "user_problem:Steep"}, "run": run})
    with pytest.raises(
        RunFailedError, match=r"update \d+: Steep.gradient is not finite in float16"
    ):
        simulate(config, tmp_path / "run")


def test_a_first_gradient_that_is_not_finite_hints_at_the_data(plugin, tmp_path):
    """The trial does not find it, because only batches of 16 cause it."""
    later = """
        class Later(Regression):
            def gradient(self, x, indices):
                return (np.nan if len(indices) == 16 else 1.0) * super().gradient(x, indices)
    """
    plugin(later, "Later")
    config = make_config({"problem": {"kind": "user_problem:Later"}})
    with pytest.raises(
        RunFailedError, match=r"update 0: .* not finite; .*: check the data for NaN or very large"
    ):
        simulate(config, tmp_path / "run")


def test_a_module_that_cannot_be_imported_is_refused(plugin):
    with pytest.raises(InputError, match="No module named 'nowhere_at_all'; looked for in"):
        make_problem(make_config({"problem": {"kind": "nowhere_at_all:make"}}))
    with pytest.raises(InputError, match="No module named 'absent_dependency'"):
        plugin("import absent_dependency")
    with pytest.raises(InputError, match="cannot be imported: SyntaxError"):
        plugin("\ndef broken(:")
    with pytest.raises(
        InputError, match=r"cannot be imported: ZeroDivisionError: .*user_problem.py"
    ):
        plugin("\n1 / 0")


def test_nothing_is_imported_for_other_kinds(plugin):
    make_problem(make_config({"problem": {"kind": "quadratic"}}))
    assert "user_problem" not in sys.modules


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("os:system", {"command": "touch harm"}),
        ("subprocess:Popen", {"args": ["touch", "harm"]}),
        ("pathlib:Path.touch", {}),
        ("pandas:read_pickle", {"filepath_or_buffer": "harm.pickle"}),
        ("joblib:load", {"filename": "harm.pickle"}),
        ("asgd.rundir.files:replace_file", {"path": "harm", "content": ""}),
        ("cluster.local_ray.guard:subprocess", {}),
        ("user_problem:run", {"args": ["touch", "harm"]}),
    ],
)
def test_an_untrusted_configuration_cannot_call_any_function(plugin, tmp_path, kind, options):
    """A run directory may come from somebody else, and its configuration names a factory."""
    plugin("from subprocess import run")
    (tmp_path / "harm.pickle").write_bytes(
        b"cposix\nsystem\n(S'touch harm'\ntR."  # a pickle that calls os.system("touch harm")
    )
    with pytest.raises(InputError, match=r"in a module of your own|has no factory"):
        make_problem(make_config({"problem": {"kind": kind, "options": options}}))
    assert not (tmp_path / "harm").exists()


def test_only_classes_of_an_installed_package_are_called(plugin, tmp_path, monkeypatch):
    make = "def make(**options):\n        return Regression(**options)"
    assert plugin(make, "make").dim == 3
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (tmp_path / "user_problem.py").rename(packages / "installed_problem.py")
    monkeypatch.syspath_prepend(packages)
    assert make_problem(make_config({"problem": {"kind": "installed_problem:Regression"}})).dim == 3
    with pytest.raises(
        InputError,
        match="make is not defined in a module of your own: expected a",
    ):
        make_problem(make_config({"problem": {"kind": "installed_problem:make"}}))
    sys.modules.pop("installed_problem")


IN_PLACE = """
    class InPlace(Regression):
        def gradient(self, x, indices):
            x -= 1.0
            return x
"""


def test_a_gradient_that_writes_to_its_parameters_is_refused_at_once(plugin):
    with pytest.raises(InputError, match=r"gradient\(x\) raised ValueError: output array is read-"):
        plugin(IN_PLACE, "InPlace")


def test_a_worker_does_not_repeat_the_trial_of_a_problem(plugin, tmp_path):
    """The trial of a large problem needs memory for about ten vectors of parameters."""
    plugin(
        """
        class Once(Regression):
            def _refuse(self, *_):
                raise AssertionError("tried again")
            initial_point = loss = gradient = _refuse
        """,
        "Regression",
    )
    settings = {"kind": "user_problem:Once", "initial_from": str(tmp_path / "nowhere.npz")}
    config = make_config({"problem": settings})
    assert make_problem(config, tried=True).dim == 3
    with pytest.raises(InputError, match="tried again"):
        make_problem(config)
