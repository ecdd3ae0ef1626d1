"""The bound two ways, term by term on common paths."""

import dataclasses

import jax
import numpy as np
import pytest
from numpyro import handlers
from numpyro.infer import Trace_ELBO

import probdiff
from probdiff.chain import forward
from probdiff.diagnostics import CommonPaths, common_paths, compare_on_common_paths
from probdiff.oracles.distributions import GaussianOracle

ORACLE = GaussianOracle(np.zeros(3), np.diag([1.0, 0.5, 2.0]))
X = ORACLE.sample(np.random.default_rng(0), 4).astype(np.float32)
KEY = jax.random.key(0)


def model(num_steps=6, reverse_variance="posterior"):
    schedule = probdiff.log_snr_schedule(num_steps, 12.0, -4.0)
    return probdiff.Diffusion(schedule, ORACLE.network(schedule, 0.8), dim=3, reverse_variance=reverse_variance)


@pytest.mark.parametrize("num_steps, variance", [(1, "posterior"), (6, "posterior"), (6, "forward")])
def test_every_term_is_the_same_but_for_rounding(num_steps, variance):
    found = compare_on_common_paths(model(num_steps, variance), X, key=KEY)
    assert found.agree and found.wrong == [] and found.largest < 1e-9
    assert found.analytic["step_kl"].shape == (num_steps - 1, 4) and found.analytic["prior_kl"].dtype == np.float64


@pytest.mark.long
def test_levels_on_a_grid_and_a_sampled_kl():
    schedule = probdiff.log_snr_schedule(5, 6.0, -4.0)
    network = probdiff.networks.CategoricalHead(probdiff.MLP(2, key=KEY, hidden=8, num_blocks=1, outputs=5), 5)
    diffusion = probdiff.Diffusion(schedule, network, probdiff.DiscretizedNormalLikelihood(levels=5))
    x = np.array([[0, 4], [2, 1]])
    assert compare_on_common_paths(diffusion, x, key=KEY).agree
    mixture = diffusion.with_kernel(probdiff.chain.MixtureKernel(5))
    assert compare_on_common_paths(mixture, x, key=KEY) is None


@pytest.mark.long
def test_what_is_traced_adds_up_to_trace_elbo(monkeypatch):
    """NumPyro's own sum over a path is the traced terms with their terms of mean zero put back."""
    diffusion, seen = model(), {}
    traced = common_paths._traced.__wrapped__

    def spy(diffusion, x, eps, xi):
        seen.update(eps=eps, xi=xi)
        return traced(diffusion, x, eps, xi)

    monkeypatch.setattr(common_paths, "_traced", spy)
    found = compare_on_common_paths(diffusion, X, key=KEY)
    with jax.enable_x64(True):
        schedule, eps, xi = diffusion.schedule, seen["eps"], seen["xi"]
        z = schedule.signal_scale[:, None, None] * np.asarray(X, np.float64) + schedule.noise_scale[:, None, None] * eps
        guide = handlers.substitute(diffusion.posterior_guide, {"z": z[::-1]})
        elbo = -Trace_ELBO().loss(KEY, {}, diffusion.bind({}).model, guide, X.astype(np.float64))
        weight, eps, xi, z = (np.asarray(each, np.float64) for each in (diffusion.network.weight, eps, xi, z))
        error = np.einsum("nij,nkj->nki", weight, z) + np.asarray(diffusion.network.bias, np.float64)[:, None] - eps
        elbo = float(elbo)
    # With v_n = β̃_n a step has the term ξ·(μ̃ − μ_θ)/√v_n; the prior the same with μ̃ = √ᾱ_N x_0 and its own variance.
    slope = (schedule.beta / np.sqrt(schedule.alpha * schedule.one_minus_alpha_bar))[1:] / np.sqrt(schedule.posterior_variance[1:])
    steps = (slope[:, None, None] * error[1:] * xi[:-1]).sum(-1)
    final = schedule.alpha_bar[-1]
    scaled = np.sqrt(final * (1 - final)) * np.asarray(X, np.float64) * xi[-1] - final * (xi[-1] ** 2 - 1) / 2
    total = sum(found.traced["reconstruction"]) - sum(found.traced["prior_kl"]) - found.traced["step_kl"].sum()
    assert total - steps.sum() - scaled.sum() == pytest.approx(elbo, rel=1e-9)


def without(name, index=slice(None)):
    def change(terms):
        value = np.array(getattr(terms, name))
        value[..., index, :] = 0
        return dataclasses.replace(terms, **{name: value})

    return change


DROPPED = {
    "the prior KL": (lambda terms: dataclasses.replace(terms, prior_kl=0 * terms.prior_kl), ["prior KL"]),
    "the reconstruction": (without("reconstruction"), ["reconstruction"]),
    "a step": (without("step_kl", 3), ["KL of step 5"]),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_dropped_term_is_named(name, patched):
    change, wrong = DROPPED[name]
    terms = probdiff.elbo_terms
    patched(terms, lambda *args, **kwargs: change(terms(*args, **kwargs)))
    both = probdiff.diagnostics.compute_both_ways(model(), X, key=KEY, num_draws=2)
    assert both.common.wrong == wrong and not both.agree


def test_a_wrong_program_is_named(patched, compiled_anew):
    """The posterior guide half a percent too narrow at one step: far below any Monte Carlo error."""
    posterior = forward.forward_posterior

    def narrow(schedule, z, x0, n):
        q = posterior(schedule, z, x0, n).base_dist
        return type(q)(q.loc, q.scale * (1 - 0.005 * (np.asarray(1.0) * (n == 4)))).to_event(1)

    patched(posterior, narrow)
    assert compare_on_common_paths(model(), X, key=KEY).wrong == ["KL of step 4"]


@pytest.mark.parametrize("change, wrong", [(0.0, []), (1e-9, []), (1e-4, ["reconstruction"]), (-1e-4, ["reconstruction"]), (np.nan, ["reconstruction"])])
def test_the_verdict_on_a_term(change, wrong):
    terms = {"prior_kl": np.ones(3), "step_kl": np.ones((2, 3)), "reconstruction": np.full(3, -5.0)}
    found = CommonPaths(terms | {"reconstruction": np.array([-5.0, -5.0, -5.0 + change])}, terms)
    assert found.wrong == wrong and found.agree is not bool(wrong)
    assert np.isnan(change) or found.largest == pytest.approx(abs(change), abs=1e-12)


def test_the_difference_that_would_have_been_seen():
    """Nine times in ten, of simulated verdicts on a difference of that size."""
    rng, size = np.random.default_rng(0), 4.2816
    disagreed = (np.abs(size + rng.standard_normal(200_000)) > 3).mean()
    assert disagreed == pytest.approx(0.9, abs=0.003)
    levels = rng.standard_normal((8, 30))
    both = probdiff.diagnostics.TwoWays(probdiff.elbo.ELBOTerms(np.zeros(30), np.zeros((8, 0, 30)), levels), levels[::-1] + 0.1)
    assert both.detectable == pytest.approx(size * both.difference[1])
