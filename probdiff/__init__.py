"""Denoising diffusion models as pairs of NumPyro programs, with the bound computed two ways.

Every name is imported when it is first asked for, so that ``import probdiff`` is quick and Ctrl-C is heard meanwhile.
"""

import importlib

__version__ = "0.1.0"

# The names that each module of probdiff provides.
_NAMES = {
    "chain.forward": ["forward_marginal", "forward_posterior", "forward_step"],
    "chain.learned_schedules": ["LearnedSchedule"],
    "chain.mixture_kernel": ["MixtureKernel"],
    "chain.reverse": ["GaussianKernel"],
    "chain.schedules": [
        "NoiseSchedule",
        "cosine_schedule",
        "geometric_schedule",
        "linear_schedule",
        "log_snr_schedule",
    ],
    "chain.score": [
        "conditional_score",
        "eps_from_score",
        "eps_from_vp_score",
        "noising",
        "score",
        "score_from_eps",
        "ve_from_vp",
        "vp_conditional_score",
        "vp_from_ve",
        "vp_score_from_eps",
    ],
    "diagnostics.agreement": ["TwoWays", "compute_both_ways"],
    "diagnostics.compare_estimators": ["compare_estimators"],
    "diagnostics.compare_models": ["compare_models"],
    "diagnostics.datatree": ["to_datatree"],
    "diagnostics.gap": ["ledger"],
    "diffusion": ["Diffusion"],
    "elbo.estimators": ["ESTIMATORS"],
    "elbo.importance": ["iwae", "pareto_khat", "path_elbo", "sandwich"],
    "elbo.objective": ["AnalyticELBO"],
    "elbo.score_matching": ["ScoreMatching", "likelihood_weights"],
    "elbo.terms": ["ELBOMoments", "ELBOTerms", "bits_per_dim", "elbo_terms"],
    "flow": ["flow_likelihood", "flow_log_prob"],
    "likelihoods": ["DiscretizedNormalLikelihood", "NormalLikelihood"],
    "networks.base": ["MLP", "Ensemble"],
    "networks.convnet": ["ConvNet"],
    "networks.heads": ["CategoricalHead", "DensityHead", "VHead", "X0Head"],
    "optimal": ["optimal_variance"],
    "programs.parallel": ["ForwardChain", "ParallelPrograms", "PosteriorChain", "ReverseChain"],
    "samplers": ["SAMPLERS", "ancestral", "annealed_langevin", "ddim", "probability_flow"],
    "storage.checkpoint": ["Checkpoint"],
    "storage.run": ["create_run", "open_run"],
    "training": ["fit"],
}
# The modules that are themselves names.
_MODULES = [
    "chain",
    "cli",
    "datasets",
    "diagnostics",
    "elbo",
    "flow",
    "likelihoods",
    "networks",
    "oracles",
    "presets",
    "programs",
    "samplers",
    "storage",
    "training",
]
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_PATH_OF = {name: name for name in _MODULES} | {"plots": "diagnostics.plots"}

__all__ = sorted([*_MODULE_OF, *_PATH_OF])


def __getattr__(name):
    if name in _PATH_OF:
        value = importlib.import_module(f"{__name__}.{_PATH_OF[name]}")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return __all__
