"""Staleness fits and loss predictions of recorded runs. Nothing here starts a worker.

    study = analysis.Study.open("runs/digits")
    study.fit                              # staleness laws and a verdict
    study.predict()                        # the loss curve of each model, and how far off it is
    analysis.write_report(study)
    analysis.figures.loss_overlay([run.loss], prediction.curves)

Public names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgd.lazy import lazy

if TYPE_CHECKING:
    from analysis import figures as figures
    from analysis.exact.batch_schedule import optimal_batch_schedule as optimal_batch_schedule
    from analysis.exact.limits import Limit as Limit
    from analysis.exact.limits import StabilityLimits as StabilityLimits
    from analysis.exact.limits import stability_limits as stability_limits
    from analysis.exact.moments import asgd_moments as asgd_moments
    from analysis.exact.moments import stationary_variance as stationary_variance
    from analysis.exact.stability import max_stable_learning_rate as max_stable_learning_rate
    from analysis.models.discrete import asgd_iid as asgd_iid
    from analysis.models.discrete import asgd_server as asgd_server
    from analysis.models.discrete import momentum_sgd as momentum_sgd
    from analysis.models.discrete import sgd as sgd
    from analysis.models.ensemble import Ensemble as Ensemble
    from analysis.models.langevin import sme_langevin as sme_langevin
    from analysis.models.langevin import sme_msgd as sme_msgd
    from analysis.models.replay import sme_replay as sme_replay
    from analysis.models.sme_asgd import sme_asgd as sme_asgd
    from analysis.models.sme_law import sme_law as sme_law
    from analysis.models.sme_sgd import sme_sgd as sme_sgd
    from analysis.planning.plan import Plan as Plan
    from analysis.planning.plan import plan as plan
    from analysis.prediction.predict import Prediction as Prediction
    from analysis.prediction.predict import predict as predict
    from analysis.prediction.predict import read_prediction as read_prediction
    from analysis.prediction.score import Score as Score
    from analysis.prediction.score import compare as compare
    from analysis.profile.fit import StalenessFit as StalenessFit
    from analysis.profile.fitting import compare_fits as compare_fits
    from analysis.profile.fitting import fit_run as fit_run
    from analysis.profile.fitting import fit_staleness as fit_staleness
    from analysis.profile.queueing import ServerTimes as ServerTimes
    from analysis.profile.queueing import config_staleness as config_staleness
    from analysis.profile.queueing import queue_staleness as queue_staleness
    from analysis.profile.repeats import fit_runs as fit_runs
    from analysis.report.activity import events_table as events_table
    from analysis.report.activity import timeline as timeline
    from analysis.report.activity import workers_table as workers_table
    from analysis.report.write import write_report as write_report
    from analysis.study import Study as Study
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "analysis": ["figures"],
            "analysis.report.activity": ["events_table", "timeline", "workers_table"],
            "analysis.exact.batch_schedule": ["optimal_batch_schedule"],
            "analysis.models.discrete": ["asgd_iid", "asgd_server", "momentum_sgd", "sgd"],
            "analysis.models.ensemble": ["Ensemble"],
            "analysis.profile.repeats": ["fit_runs"],
            "analysis.profile.fit": ["StalenessFit"],
            "analysis.profile.fitting": ["compare_fits", "fit_run", "fit_staleness"],
            "analysis.models.langevin": ["sme_langevin", "sme_msgd"],
            "analysis.exact.limits": ["Limit", "StabilityLimits", "stability_limits"],
            "analysis.exact.moments": ["asgd_moments", "stationary_variance"],
            "analysis.planning.plan": ["Plan", "plan"],
            "analysis.prediction.predict": ["Prediction", "predict", "read_prediction"],
            "analysis.profile.queueing": ["ServerTimes", "config_staleness", "queue_staleness"],
            "analysis.report.write": ["write_report"],
            "analysis.prediction.score": ["Score", "compare"],
            "analysis.models.sme_asgd": ["sme_asgd"],
            "analysis.models.sme_law": ["sme_law"],
            "analysis.models.replay": ["sme_replay"],
            "analysis.models.sme_sgd": ["sme_sgd"],
            "analysis.exact.stability": ["max_stable_learning_rate"],
            "analysis.study": ["Study"],
        },
    )
