"""Denoising diffusion models as pairs of NumPyro programs, with the bound computed two ways.

Names and namespaces are imported when they are first asked for, so that ``import probdiff`` and ``probdiff --help`` need no JAX.
"""

import importlib

__version__ = "0.2.0.dev0"

_NAMESPACES = {
    **{
        name: f"probdiff.{name}"
        for name in (
            "chain cli datasets diagnostics elbo flow likelihoods networks oracles presets programs samplers storage training".split()
        )
    },
    "plots": "probdiff.diagnostics.plots",
}
_NAMES = {
    name: f"probdiff.{module}"
    for module, names in {
        "chain": "LearnedSchedule NoiseSchedule cosine_schedule geometric_schedule linear_schedule log_snr_schedule "
        "forward_marginal forward_posterior forward_step",
        "diffusion": "Diffusion",
        "likelihoods": "DiscretizedNormalLikelihood NormalLikelihood",
        "networks": "MLP",
        "elbo": "AnalyticELBO ESTIMATORS elbo_terms iwae pareto_khat sandwich",
        "flow": "flow_likelihood",
        "training": "fit",
        "diagnostics": "to_datatree",
        "diagnostics.compare_estimators": "compare_estimators",
        "diagnostics.compare_models": "compare_models",
        "storage": "open_run",
    }.items()
    for name in names.split()
}
__all__ = [*_NAMES, *_NAMESPACES, "__version__"]


def __getattr__(name):
    if name in _NAMESPACES:
        value = importlib.import_module(_NAMESPACES[name])
    elif name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
