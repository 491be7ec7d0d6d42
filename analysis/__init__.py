"""Staleness profiles and loss predictions: reads runs, simulates models, never starts workers.

    study = analysis.Study.open("runs/digits")
    study.fit                              # staleness laws and a verdict
    study.predict()                        # the loss curve of each model, and how far off it is
    analysis.write_report(study)
    analysis.figures.loss_overlay([run.loss], prediction.curves)

Public names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# At once: an import of the module of the same name would else hide the function.
from analysis.sme_law import sme_law as sme_law
from analysis.sme_replay import sme_replay as sme_replay
from analysis.sme_sgd import sme_sgd as sme_sgd
from asgd.lazy import lazy

if TYPE_CHECKING:
    from analysis import figures as figures
    from analysis.activity import events_table as events_table
    from analysis.activity import timeline as timeline
    from analysis.activity import workers_table as workers_table
    from analysis.control import optimal_batch_schedule as optimal_batch_schedule
    from analysis.discrete import asgd_iid as asgd_iid
    from analysis.discrete import asgd_server as asgd_server
    from analysis.discrete import momentum_sgd as momentum_sgd
    from analysis.discrete import sgd as sgd
    from analysis.ensemble import Ensemble as Ensemble
    from analysis.experiment import fit_runs as fit_runs
    from analysis.fit import StalenessFit as StalenessFit
    from analysis.fit import compare_fits as compare_fits
    from analysis.fit import fit_run as fit_run
    from analysis.fit import fit_staleness as fit_staleness
    from analysis.langevin import sme_langevin as sme_langevin
    from analysis.langevin import sme_msgd as sme_msgd
    from analysis.limits import Limit as Limit
    from analysis.limits import StabilityLimits as StabilityLimits
    from analysis.limits import stability_limits as stability_limits
    from analysis.moments import asgd_moments as asgd_moments
    from analysis.moments import stationary_variance as stationary_variance
    from analysis.planning import Plan as Plan
    from analysis.planning import plan as plan
    from analysis.prediction import Prediction as Prediction
    from analysis.prediction import predict as predict
    from analysis.prediction import read_prediction as read_prediction
    from analysis.queue import ServerTimes as ServerTimes
    from analysis.queue import config_staleness as config_staleness
    from analysis.queue import queue_staleness as queue_staleness
    from analysis.report import write_report as write_report
    from analysis.score import Score as Score
    from analysis.score import compare as compare
    from analysis.sme import sme_asgd as sme_asgd
    from analysis.stability import max_stable_learning_rate as max_stable_learning_rate
    from analysis.study import Study as Study
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "analysis": ["figures"],
            "analysis.activity": ["events_table", "timeline", "workers_table"],
            "analysis.control": ["optimal_batch_schedule"],
            "analysis.discrete": ["asgd_iid", "asgd_server", "momentum_sgd", "sgd"],
            "analysis.ensemble": ["Ensemble"],
            "analysis.experiment": ["fit_runs"],
            "analysis.fit": ["StalenessFit", "compare_fits", "fit_run", "fit_staleness"],
            "analysis.langevin": ["sme_langevin", "sme_msgd"],
            "analysis.limits": ["Limit", "StabilityLimits", "stability_limits"],
            "analysis.moments": ["asgd_moments", "stationary_variance"],
            "analysis.planning": ["Plan", "plan"],
            "analysis.prediction": ["Prediction", "predict", "read_prediction"],
            "analysis.queue": ["ServerTimes", "config_staleness", "queue_staleness"],
            "analysis.report": ["write_report"],
            "analysis.score": ["Score", "compare"],
            "analysis.sme": ["sme_asgd"],
            "analysis.sme_law": ["sme_law"],
            "analysis.sme_replay": ["sme_replay"],
            "analysis.sme_sgd": ["sme_sgd"],
            "analysis.stability": ["max_stable_learning_rate"],
            "analysis.study": ["Study"],
        },
    )
