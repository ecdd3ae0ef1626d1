"""Denoising diffusion models as pairs of NumPyro programs, with the bound computed two ways.

Every name is imported when it is first used, so that ``import probdiff`` is quick.
"""

import importlib
from typing import Any

__version__ = "0.2.0.dev0"

# The names used most, with their modules. All others are in the namespaces.
_NAMES = {
    "chain.forward": ["forward_marginal", "forward_posterior", "forward_step"],
    "chain.learned": ["LearnedSchedule"],
    "chain.named_schedules": ["cosine_schedule", "geometric_schedule", "linear_schedule", "log_snr_schedule"],
    "chain.schedules": ["NoiseSchedule"],
    "diagnostics.classification": ["classify"],
    "diagnostics.compare_estimators": ["compare_estimators"],
    "diagnostics.compare_models": ["compare_models"],
    "diagnostics.datatree": ["to_datatree"],
    "diagnostics.findings": ["audit"],
    "diffusion": ["Diffusion"],
    "elbo.analytic": ["AnalyticELBO"],
    "elbo.estimators": ["ESTIMATORS"],
    "elbo.importance": ["iwae", "pareto_khat", "sandwich"],
    "elbo.terms": ["elbo_terms"],
    "flow": ["flow_likelihood"],
    "likelihoods": ["DiscretizedNormalLikelihood", "NormalLikelihood"],
    "networks.mlp": ["MLP"],
    "storage.run": ["open_run"],
    "training": ["fit"],
}
# The namespaces, with their modules.
_NAMESPACES = {
    "chain": "chain",
    "cli": "cli",
    "datasets": "datasets",
    "diagnostics": "diagnostics",
    "elbo": "elbo",
    "flow": "flow",
    "inference": "inference",
    "likelihoods": "likelihoods",
    "networks": "networks",
    "oracles": "oracles",
    "plots": "diagnostics.plots",
    "presets": "presets",
    "programs": "programs",
    "samplers": "samplers",
    "storage": "storage",
    "training": "training",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted([*_MODULE_OF, *_NAMESPACES])


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        value = importlib.import_module(f"{__name__}.{_NAMESPACES[name]}")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
