# %% [markdown]
# # From a problem of your own to a report
#
# Robust regression on a table of measurements, trained by four worker processes. How stale are
# their gradients, does the loss curve agree with theory, and what should be changed?
#
# This file runs as a script, `python scripts/tutorial.py`, in less than half a minute, and opens as
# a notebook in any editor that knows cells marked by `# %%`. What it writes goes into the directory
# `tutorial`.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import analysis
import asgd
import cluster

Path("tutorial").mkdir(exist_ok=True)
os.chdir("tutorial")

# %% [markdown]
# ## The problem
#
# Some measurements, a few of them far off:

# %%
rng = np.random.default_rng(1)
features = rng.standard_normal((400, 5))
target = features @ [2.0, -1.0, 0.5, 0.0, 1.0] + rng.standard_t(2, 400)
table = np.column_stack([features, target])
np.savetxt("measurements.csv", table, delimiter=",", header="a,b,c,d,e,y")

# %% [markdown]
# A problem is a class with two numbers and three methods. Workers are separate processes and import
# it by its name, so it must be in a file. Written with `x @ a.T` rather than `a @ x`, `loss`
# and `gradient` also take many points at a time, one per row, and predictions get faster.

# %%
Path("robust.py").write_text(
    '''
import numpy as np


class Huber:
    """f_i(x) = h(a_i . x - y_i), h quadratic near zero and linear beyond `width`."""

    def __init__(self, file, width=1.0):
        table = np.loadtxt(file, delimiter=",")
        self.a, self.y, self.width = table[:, :-1], table[:, -1], width
        self.n_samples, self.dim = self.a.shape

    def initial_point(self, rng):
        return np.zeros(self.dim)

    def loss(self, x):
        size, width = np.abs(x @ self.a.T - self.y), self.width
        return np.where(size < width, size**2 / 2, width * (size - width / 2)).mean(-1)

    def gradient(self, x, indices):
        residual = x @ self.a[indices].T - self.y[indices]
        return np.clip(residual, -self.width, self.width) @ self.a[indices] / len(indices)
'''
)
print(Path("robust.py").resolve())

# %% [markdown]
# ## The run
#
# Other keys have defaults; an unknown key or a wrong value is refused with the accepted ones.
# `options` are the arguments of the class. About two milliseconds are added to each gradient, as if
# the problem were larger.

# %%
settings = {
    "problem": {"kind": "robust:Huber", "options": {"file": "measurements.csv"}},
    "optimizer": {"learning_rate": 0.4, "batch_size": 8},
    "cluster": {
        "workers": 4,
        "compute_time": {"law": "gamma", "mean": 0.002, "variation": 0.3},
    },
    "run": {"updates": 600, "eval_every": 10},
}
config = asgd.make_config(settings)
run = asgd.read_run(cluster.run(config))
print(run)

# %% [markdown]
# Every update is on record: which worker computed its gradient, and how many updates were applied
# since it read the parameters.

# %%
print(run.trace[["update", "worker", "read_version", "staleness", "compute_seconds"]].tail())
print(run.loss.tail(3))

# %% [markdown]
# ## How stale?

# %%
fit = analysis.fit_run(run)
print(fit)

# %% [markdown]
# ## Was the loss curve to be expected?
#
# Each model gets the staleness in its own way: not at all, as a geometric law, as the measured law,
# or update by update.

# %%
prediction = analysis.predict(run, fit=fit)
score = analysis.compare(run, prediction)
print(prediction)
print(score)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
analysis.figures.loss_overlay([run.loss], prediction.curves, left)
analysis.figures.staleness_histogram(*fit.histogram(), right)
left.set_title("loss")
right.set_title("staleness")
fig.savefig("tutorial.png")

# %% [markdown]
# ## What to change?
#
# How large a learning rate is stable depends on the law of the staleness, not on its mean. Up to
# the first limit the mean square of the distance from the minimum stays bounded; up to the second,
# runs converge with rare large excursions; beyond it they diverge. Near the minimum:

# %%
minimum, *_ = np.linalg.lstsq(features, target)
curvature = np.linalg.eigvalsh(asgd.make_problem(config).hessian(minimum)).max()
for name, law in {"measured": fit.recommended, "geometric": fit.geometric.law}.items():
    limits = analysis.stability_limits(law, curvature=curvature, workers=4)
    print(f"{name} law: {limits.mean_square.value:.2f}, {limits.almost_sure.value:.2f}")

# %% [markdown]
# Eight workers, tried in virtual time, which takes no more processes than this one:

# %%
settings["cluster"]["workers"] = 8
eight = asgd.read_run(asgd.simulate(asgd.make_config(settings)))
print(eight)
print(analysis.predict(eight, models=["sme_law"]))

# %% [markdown]
# ## The report
#
# One self-contained HTML file, with everything above and more. `asgd report` does the same.

# %%
prediction.save(run.path)
print(analysis.write_report(run.path, "report.html").resolve())
