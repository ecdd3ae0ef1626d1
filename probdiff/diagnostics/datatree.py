"""The terms of the bound as an xarray DataTree, the container of ArviZ, and back."""

import jax.numpy as jnp
import numpy as np

from probdiff._checks import require_type
from probdiff.elbo.terms import ELBOTerms


def to_datatree(terms):
    """Put the terms of the bound into a DataTree that ArviZ's functions take.

    Group ``posterior`` has ``step_kl`` with dimensions (chain, draw, step, datum), and ``reconstruction`` and
    ``elbo`` with (chain, draw, datum); group ``constant_data`` has ``prior_kl`` with (datum,). One chain: the draws are
    independent. Coordinate ``step`` is n = 2 … N; everything is in nats.

    Args:
        terms: :class:`~probdiff.ELBOTerms`.
    """
    import arviz as az

    require_type("terms", terms, ELBOTerms)
    num_steps = terms.step_kl.shape[1] + 1
    posterior = {name: np.asarray(getattr(terms, name))[None] for name in ("step_kl", "reconstruction", "elbo")}
    tree = az.from_dict(
        {"posterior": posterior, "constant_data": {"prior_kl": np.asarray(terms.prior_kl)}},
        dims={
            "step_kl": ["step", "datum"],
            "reconstruction": ["datum"],
            "elbo": ["datum"],
            "prior_kl": ["datum"],
        },
        coords={"step": np.arange(2, num_steps + 1), "datum": np.arange(len(terms.prior_kl))},
    )
    long_names = {
        "prior_kl": "KL of q(z_N | x_0) to N(0, I)",
        "step_kl": "KL of step n, q(z_{n-1} | z_n, x_0) to p(z_{n-1} | z_n)",
        "reconstruction": "log p(x | z_1)",
        "elbo": "evidence lower bound",
    }
    if not terms.closed_form:
        long_names["step_kl"] += " (sampled log-ratio)"
    for group in ("posterior", "constant_data"):
        for name, variable in tree[group].data_vars.items():
            variable.attrs.update(units="nats", long_name=long_names[name])
    tree["posterior"]["step_kl"].attrs["closed_form"] = int(terms.closed_form)
    return tree


def from_datatree(tree):
    """The :class:`~probdiff.ELBOTerms` that :func:`to_datatree` was given."""
    posterior = tree["posterior"]
    values = (tree["constant_data"]["prior_kl"], posterior["step_kl"][0], posterior["reconstruction"][0])
    closed_form = bool(posterior["step_kl"].attrs.get("closed_form", 1))
    return ELBOTerms(*(jnp.asarray(value.values) for value in values), closed_form)
