"""Every estimator of the bound, by name.

``ESTIMATORS[name](diffusion, **options)`` gives ``(guide, elbo)`` for ``SVI(diffusion.model, guide, optim, elbo)``. All are
unbiased, for the value and for the gradient: they differ in variance and in cost. The first three are NumPyro's
own; the others are :class:`~probdiff.AnalyticELBO` with different options. ``options`` are passed to the ELBO class.

| name | noise of the terms | steps | network evaluations per datum |
|---|---|---|---|
| ``trace``, ``trace_posterior`` | one path, log p − log q | all | N |
| ``mean_field`` | one path, NumPyro's analytic KLs | all | N |
| ``kl_path`` | one path, analytic KLs | all | N |
| ``kl_marginal`` | independent | all | N |
| ``kl_uniform`` | independent | one, uniform | 1 |
| ``kl_stratified`` | independent | one, evenly spread over the batch | 1 |
| ``kl_importance`` | independent | one, from learned probabilities | 1 |
| ``kl_antithetic`` | ε and −ε | one, uniform | 2 |
| ``kl_controlled`` | independent, minus a control variate | one, uniform | 1 |
| ``kl_combined`` | independent, minus a control variate | one, from learned probabilities, evenly spread | 1 |
| ``kl_posterior_target`` | mean and variance of ε given z_n | one, from learned probabilities, evenly spread | 1 |

``kl_posterior_target`` estimates the mean over the batch as a set (or over ``points``), not the bound of each datum.
"""

import functools
from collections.abc import Callable
from typing import Any

from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.elbo import ELBO

from probdiff.diffusion import Diffusion
from probdiff.elbo.analytic import AnalyticELBO


def _numpyro(elbo: type[ELBO], guide: str, diffusion: Diffusion, **options: Any) -> tuple[Callable[..., Any], ELBO]:
    return getattr(diffusion, guide), elbo(**options)


def _analytic(preset: dict[str, Any], diffusion: Diffusion, **options: Any) -> tuple[Callable[..., Any], ELBO]:
    objective = AnalyticELBO(diffusion, **(preset | options))
    return objective.guide, objective


_PRESETS = {
    "kl_path": {"steps": "all", "noise": "path"},
    "kl_marginal": {"steps": "all"},
    "kl_uniform": {"steps": "uniform"},
    "kl_stratified": {"steps": "stratified"},
    "kl_importance": {"steps": "importance"},
    "kl_antithetic": {"steps": "uniform", "noise": "antithetic"},
    "kl_controlled": {"steps": "uniform", "control": "linear"},
    "kl_combined": {"steps": "stratified_importance", "control": "linear"},
    "kl_posterior_target": {"steps": "stratified_importance", "points": "batch"},
}

ESTIMATORS = {
    "trace": functools.partial(_numpyro, Trace_ELBO, "guide"),
    "trace_posterior": functools.partial(_numpyro, Trace_ELBO, "posterior_guide"),
    "mean_field": functools.partial(_numpyro, TraceMeanField_ELBO, "posterior_guide"),
    **{name: functools.partial(_analytic, preset) for name, preset in _PRESETS.items()},
}


def suitable_estimators(diffusion: Diffusion) -> list[str]:
    """The names of the estimators that suit a model: all, except those with ``points`` if the KL of the kernel is sampled."""
    return [name for name in ESTIMATORS if diffusion.kernel.closed_form or "points" not in _PRESETS.get(name, {})]
