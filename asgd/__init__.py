"""Asynchronous SGD: problems, staleness laws, run directories, simulation. Does not import Ray.

    config = asgd.load_config("run.toml", ["cluster.workers=8"])
    path = asgd.simulate(config)           # in virtual time; `cluster.run` trains on real processes
    run = asgd.read_run(path)
    run.trace, run.loss                    # DataFrames

Public names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgd.lazy import lazy

if TYPE_CHECKING:
    from asgd.config.make import load_config as load_config
    from asgd.config.make import make_config as make_config
    from asgd.config.tables import RunConfig as RunConfig
    from asgd.delays import ComputeTime as ComputeTime
    from asgd.errors import AsgdError as AsgdError
    from asgd.errors import DivergedError as DivergedError
    from asgd.errors import InputError as InputError
    from asgd.errors import RunFailedError as RunFailedError
    from asgd.errors import UnreliableEstimateError as UnreliableEstimateError
    from asgd.problems.base import Problem as Problem
    from asgd.problems.make import make_problem as make_problem
    from asgd.problems.networks.jax_problem import JaxProblem as JaxProblem
    from asgd.problems.networks.torch_problem import TorchProblem as TorchProblem
    from asgd.records.importing import from_frame as from_frame
    from asgd.records.importing import import_log as import_log
    from asgd.records.log import StalenessLog as StalenessLog
    from asgd.records.reader import Record as Record
    from asgd.records.reader import read_record as read_record
    from asgd.rundir.export import export as export
    from asgd.rundir.reader import Run as Run
    from asgd.rundir.reader import read_run as read_run
    from asgd.rundir.repeats import read_runs as read_runs
    from asgd.schedules import with_batch_sizes as with_batch_sizes
    from asgd.simulation.order import simulate_staleness as simulate_staleness
    from asgd.simulation.simulate import simulate as simulate
    from asgd.staleness.counts import ConwayMaxwellPoisson as ConwayMaxwellPoisson
    from asgd.staleness.counts import NegativeBinomial as NegativeBinomial
    from asgd.staleness.counts import Poisson as Poisson
    from asgd.staleness.empirical import Empirical as Empirical
    from asgd.staleness.geometric import ConstantPlusGeometric as ConstantPlusGeometric
    from asgd.staleness.geometric import Geometric as Geometric
    from asgd.staleness.geometric import GeometricMixture as GeometricMixture
    from asgd.staleness.law import StalenessLaw as StalenessLaw
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "asgd.config.make": ["load_config", "make_config"],
            "asgd.config.tables": ["RunConfig"],
            "asgd.delays": ["ComputeTime"],
            "asgd.errors": [
                "AsgdError",
                "DivergedError",
                "InputError",
                "RunFailedError",
                "UnreliableEstimateError",
            ],
            "asgd.records.importing": ["from_frame", "import_log"],
            "asgd.records.log": ["StalenessLog"],
            "asgd.records.reader": ["Record", "read_record"],
            "asgd.rundir.export": ["export"],
            "asgd.rundir.repeats": ["read_runs"],
            "asgd.problems.base": ["Problem"],
            "asgd.problems.make": ["make_problem"],
            "asgd.problems.networks.jax_problem": ["JaxProblem"],
            "asgd.problems.networks.torch_problem": ["TorchProblem"],
            "asgd.schedules": ["with_batch_sizes"],
            "asgd.simulation.order": ["simulate_staleness"],
            "asgd.simulation.simulate": ["simulate"],
            "asgd.staleness.counts": ["ConwayMaxwellPoisson", "NegativeBinomial", "Poisson"],
            "asgd.staleness.empirical": ["Empirical"],
            "asgd.staleness.geometric": [
                "ConstantPlusGeometric",
                "Geometric",
                "GeometricMixture",
            ],
            "asgd.staleness.law": ["StalenessLaw"],
            "asgd.rundir.reader": ["Run", "read_run"],
        },
        optional=["JaxProblem", "TorchProblem"],
    )
