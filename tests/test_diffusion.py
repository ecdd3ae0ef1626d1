"""Parameters: the same figures however they came into a model, none of which another program can train."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from conftest import release_but
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO

import probdiff
from probdiff.chain.reverse import GaussianKernel
from probdiff.oracles import GaussianOracle
from probdiff.programs.sites import PARAMS

N = 4
KEY = jax.random.key(5)
X = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])


def moved(tree, seed):
    """A module with other numbers."""
    params, rest = eqx.partition(tree, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys)]
    return eqx.combine(jax.tree.unflatten(structure, leaves), rest)


def make(seed=None, learned=True, dropout=0.5):
    """A model whose every part has parameters: initial ones, or others put directly into its parts."""
    change = (lambda part, k: part) if seed is None else lambda part, k: moved(part, seed + k)
    schedule = change(probdiff.LearnedSchedule(N, 4.0, -3.0), 0)
    network = change(probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, dropout=dropout), 1)
    head = probdiff.networks.DensityHead(network)
    diffusion = probdiff.Diffusion(schedule if learned else schedule.fixed(), head, reverse_variance="learned")
    return diffusion.with_kernel(change(diffusion.kernel, 2))


DIRECT = make(seed=10)
BOUND = make().bind({PARAMS: DIRECT.trainable()})


def traced(program, *arguments, **keywords):
    trace = handlers.trace(handlers.seed(program, KEY)).get_trace(*arguments, **keywords)
    return [trace[name]["value"] for name in ("z", "x") if name in trace]


def loss(diffusion, estimator):
    """The loss that SVI has; of a model that is not bound, without dropout."""
    own = diffusion if diffusion.frozen else diffusion.evaluated()
    guide, elbo = estimator(own)
    return elbo.loss(KEY, getattr(elbo, "initial_state", {}), own.model, guide, X)


OPTIMAL = GaussianKernel("optimal", make().schedule, 2)
PUBLIC = {
    "elbo_terms": lambda d: probdiff.elbo_terms(d, X, key=KEY, num_draws=2),
    "elbo_terms, moments": lambda d: probdiff.elbo_terms(d, X, key=KEY, num_draws=2, reduce=True),
    "path_elbo": lambda d: probdiff.elbo.path_elbo(d, X, key=KEY, num_draws=2),
    "compute_both_ways": lambda d: probdiff.diagnostics.compute_both_ways(d, X, key=KEY, num_draws=2).path,
    "data_set_elbo": lambda d: probdiff.elbo.data_set_elbo(d, X, key=KEY).elbo,
    "compare_on_common_paths": lambda d: probdiff.diagnostics.compare_on_common_paths(d, X, key=KEY).analytic["step_kl"],
    "iwae": lambda d: probdiff.iwae(d, X, key=KEY, num_particles=3),
    "sandwich": lambda d: tuple(probdiff.sandwich(d, key=KEY, num_data=3, num_particles=2).upper.values()),
    "compare_models": lambda d: probdiff.compare_models({"a": d, "b": d}, X, key=KEY, num_draws=2).elbo["a"],
    "flow_log_prob": lambda d: probdiff.flow.flow_log_prob(d, X[:2]),
    "flow_likelihood": lambda d: probdiff.flow_likelihood(d, X[:2], key=KEY).log_prob,
    "score": lambda d: probdiff.chain.score.score(d, X, 2),
    "gap_decomposition": lambda d: probdiff.diagnostics.gap_decomposition(d, ORACLE, X, key=KEY).network_per_step,
    **{
        name: lambda d, sampler=sampler: sampler(d, key=KEY, num_samples=3)
        for name, sampler in probdiff.samplers.SAMPLERS.items()
    },
    "reverse_kernel": lambda d: d.evaluated().reverse_kernel(X, 2).base_dist.loc,
    "Predictive": lambda d: Predictive(d.model, num_samples=1)(KEY, None, num_data=3)["x"],
    "the posterior guide": lambda d: traced(d.posterior_guide, X),
    "the parallel guide": lambda d: traced(probdiff.programs.ParallelPrograms(d).guide, X),
    "optimal_variance": lambda d: jax.tree.leaves(probdiff.elbo.optimal_variance(d.with_kernel(OPTIMAL), X, key=KEY).kernel),
    "ScoreMatching": lambda d: loss(d.with_kernel(GaussianKernel("posterior")).evaluated(), lambda own: (own.guide, probdiff.elbo.ScoreMatching(own))),
    **{f"ESTIMATORS[{name!r}]": lambda d, estimator=estimator: loss(d, estimator) for name, estimator in probdiff.ESTIMATORS.items()},
    "AnalyticELBO": lambda d: probdiff.AnalyticELBO(d.evaluated(), "stratified").per_datum(KEY, X),
}


FEW = ["elbo_terms", "flow_likelihood", "gap_decomposition", "ddim", "ancestral", "AnalyticELBO", "the parallel guide"]


@pytest.mark.parametrize("name", release_but(FEW, PUBLIC))
def test_bound_parameters_and_weights_put_in_directly_give_the_same(name):
    """With a learned schedule, learned variances and a head."""
    for bound, direct in zip(*(jax.tree.leaves(PUBLIC[name](d)) for d in (BOUND, DIRECT)), strict=True):
        np.testing.assert_allclose(bound, direct, rtol=1e-4, atol=1e-4)


def test_what_is_bound_is_not_trained_inside_another_program():
    """A prior inside of a larger model: it has no site of its own, and its bound stays what it was."""
    before = probdiff.elbo_terms(BOUND, X, key=KEY).elbo

    def model(y):
        with handlers.scope(prefix="prior"):
            x = BOUND.model(None, num_data=len(y))
        numpyro.sample("y", dist.Normal(x + numpyro.param("shift", 0.0), 1.0).to_event(2), obs=y)

    def guide(y):
        with handlers.scope(prefix="prior"), numpyro.plate("data", len(y)):
            for name, shape in (("z", (N, len(y), 2)), ("x", (len(y), 2))):
                loc = numpyro.param(f"{name}_loc", jnp.zeros(shape))
                numpyro.sample(name, dist.Normal(loc, 0.1).to_event(1))

    trace = handlers.trace(handlers.seed(model, KEY)).get_trace(X)
    assert [name for name, site in trace.items() if site["type"] == "param"] == ["shift"]
    for program in (BOUND.model, BOUND.posterior_guide, BOUND.guide, probdiff.programs.ParallelPrograms(BOUND).model):
        assert all(site["type"] != "param" for site in handlers.trace(handlers.seed(program, KEY)).get_trace(X).values())
    result = SVI(model, guide, optax.adam(0.1), Trace_ELBO()).run(KEY, 3, X, progress_bar=False)
    assert PARAMS not in result.params and set(result.params) == {"shift", "prior/z_loc", "prior/x_loc"}
    np.testing.assert_array_equal(probdiff.elbo_terms(BOUND, X, key=KEY).elbo, before)


def test_unbind_is_exact():
    """The schedule is learned as before, dropout is on, and what was bound is what training begins from."""
    back = BOUND.unbind()
    assert isinstance(back.schedule, probdiff.LearnedSchedule) and back.network.network.dropout == 0.5
    assert jax.tree.structure(back) == jax.tree.structure(make())
    for a, b in zip(jax.tree.leaves(back.trainable()), jax.tree.leaves(DIRECT.trainable()), strict=True):
        np.testing.assert_array_equal(a, b)
    assert make().unbind().bind({}).unbind().bind({}).frozen and make().bind({PARAMS: DIRECT.trainable()}).bind({}).frozen

    def loss(diffusion, seed):
        return Trace_ELBO().loss(jax.random.key(seed), {}, diffusion.model, diffusion.guide, X)

    assert loss(back, 0) == loss(DIRECT, 0) != loss(BOUND, 0)  # with dropout, and without


@pytest.mark.release
def test_a_fit_takes_a_bound_model_further():
    options = {"iterations": 4, "batch_size": 4, "progress": False}
    fits = [probdiff.fit(d, X, **options) for d in (BOUND, DIRECT)]
    fits += [probdiff.fit(BOUND, X, elbo=probdiff.AnalyticELBO(BOUND, "stratified_importance", points="batch"), **options)]
    for other in fits[1:]:
        np.testing.assert_array_equal(fits[0].losses, other.losses)
    assert fits[0].diffusion.frozen and not np.allclose(fits[0].diffusion.schedule.start, BOUND.schedule.start, atol=1e-5)


@pytest.mark.release
def test_gradients_flow_through_the_arrays_of_a_bound_model():
    def bound(diffusion):
        return probdiff.elbo_terms(diffusion, X, key=KEY).elbo.mean()

    found = jax.grad(bound)(BOUND)
    step = 1e-2
    up, down = (eqx.tree_at(lambda d: d.kernel.reverse_variance.logit, BOUND, BOUND.kernel.reverse_variance.logit + s) for s in (step, -step))
    slope = (bound(up) - bound(down)) / (2 * step)
    np.testing.assert_allclose(found.kernel.reverse_variance.logit.sum(), slope, rtol=0.02)
    assert float(found.schedule.start) != 0 and float(jnp.abs(found.network.network.read.weight).max()) > 0


@pytest.mark.release
def test_the_estimators_gradients_are_those_of_the_unbound_model_without_dropout():
    """All parameters of the bound model, those of the schedule too; a model that has no dropout at all gives the same."""
    dry = make(seed=10, dropout=0.0)
    options = {"key": KEY, "num_draws": 2, "estimators": ["kl_uniform"]}
    found, expected = (probdiff.compare_estimators(d, X[:2], **options) for d in (BOUND, dry))
    np.testing.assert_allclose(found.draws, expected.draws, rtol=1e-4, atol=1e-4)
    for a, b in zip(found.projections.values(), expected.projections.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
