"""The objective: its chunks, particles, state, and what it refuses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_mean, long_but
from numpyro import handlers
from numpyro.infer import SVI

import probdiff
from probdiff._chunks import inputs_at_once


def make(num_steps=6, dim=2, schedule=None, **kwargs):
    network = probdiff.MLP(dim, key=jax.random.key(0), hidden=16, num_blocks=1)
    network = eqx.tree_at(lambda m: m.write.weight, network, jnp.full((dim, 16), 0.05))
    return probdiff.Diffusion(schedule or probdiff.log_snr_schedule(num_steps, 5.0, -4.0), network, **kwargs)


X = jax.random.normal(jax.random.key(1), (7, 2))
COMBINED = {"steps": "stratified_importance", "control": "linear"}


CHUNKED = [(7, {}), (7, {"noise": "path"}), (7, {"noise": "antithetic", "control": "linear"}), (1, {})]


@pytest.mark.release
@pytest.mark.parametrize("num_steps, options", CHUNKED)
def test_chunks_change_nothing(num_steps, options, patched, float64):
    diffusion = make(num_steps)
    objective = probdiff.AnalyticELBO(diffusion, **options)
    params = {"diffusion$params": diffusion.trainable()}

    def results():
        def loss(params):
            return 3 * objective.loss(jax.random.key(3), params, diffusion.model, diffusion.guide, X)

        def both(params):
            return *jax.value_and_grad(loss)(params), objective.of(diffusion.bind(params)).per_datum(jax.random.key(3), X)

        return jax.jit(both)(params)

    expected = results()
    patched(inputs_at_once, lambda network: 1)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(results())):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_working_memory_of_an_update_does_not_grow_with_steps():
    def working_memory(num_steps):
        diffusion = make(num_steps)
        svi = SVI(diffusion.model, diffusion.guide, optax.sgd(1e-3), probdiff.AnalyticELBO(diffusion))
        compiled = jax.jit(svi.update).lower(svi.init(jax.random.key(0), X), X).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert working_memory(10_000) <= 1.2 * working_memory(2_000)


@pytest.mark.release
@pytest.mark.parametrize("steps", ["all", "uniform", "stratified"])
def test_num_particles_averages_independent_estimates(steps):
    diffusion = make()
    one, many = (probdiff.AnalyticELBO(diffusion, steps=steps, num_particles=k) for k in (1, 50))
    keys = jax.random.split(jax.random.key(0), 400)

    def variance(objective):
        losses = jax.jit(jax.vmap(lambda k: objective.loss(k, {}, diffusion.model, diffusion.guide, X)))(keys)
        return losses.var()

    assert 35 < variance(one) / variance(many) < 70


@pytest.mark.long
@pytest.mark.parametrize("options", long_but([COMBINED], [{}, {"steps": "uniform"}, COMBINED]))
def test_the_bound_is_a_program(options):
    objective = probdiff.AnalyticELBO(make(), **options)
    kinds = {}

    @jax.jit
    def sites():
        trace = handlers.trace(handlers.seed(objective.program, 0)).get_trace(X, num_data=70)
        kinds.update({name: site["type"] for name, site in trace.items()})
        values = [trace[name]["value"] for name in ("noise_free_bound", "excess")]
        return *values, trace["elbo"]["fn"].log_prob(None), trace["elbo"]["scale"]

    noise_free_bound, excess, log_prob, scale = sites()
    assert kinds.pop("elbo") == "sample" and kinds.pop("diffusion$params") == "param"
    assert kinds.pop("diffusion$learned", "mutable") == "mutable"
    assert kinds == {"noise_free_bound": "deterministic", "excess": "deterministic"}
    np.testing.assert_allclose(log_prob, (noise_free_bound - excess).sum(), rtol=1e-5)
    assert scale == 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": "everything"}, r"steps: Expected one of \['all', 'uniform', .*; got 'everything'"),
        ({"steps": None}, "steps: Expected one of"),
        ({"steps": 3}, "steps: Expected one of"),
        ({"noise": "white"}, "noise: Expected one of"),
        ({"noise": None}, "noise: Expected one of"),
        ({"noise": "path", "steps": "uniform"}, "noise: Expected steps='all' with noise='path'; got steps='uniform'"),
        ({"control": "quadratic"}, "control: Expected one of"),
        ({"adapt_to": "speed"}, "adapt_to: Expected one of"),
        ({"points": np.zeros((3, 5), np.float32)}, r"points: x: Expected shape \(datum, 2\)"),
        ({"points": "all"}, "points: Expected"),
        ({"num_particles": 0}, "num_particles: Expected a positive integer; got 0"),
    ],
)
def test_options_that_are_not_there_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        probdiff.AnalyticELBO(make(), **options)


@pytest.mark.long
def test_a_model_or_guide_of_another_diffusion_is_refused():
    diffusion, other = make(), make(7)
    objective = probdiff.AnalyticELBO(diffusion)

    def loss(model, guide):
        return jax.jit(lambda key: objective.loss(key, {}, model, guide, X))(jax.random.key(0))

    scaled = handlers.scale(diffusion.model, scale=0.5)
    for model, guide, message in [
        (other.model, diffusion.guide, "model: Expected diffusion.model"),
        (diffusion.model, other.guide, "guide: Expected diffusion.guide or diffusion.posterior_guide"),
        (diffusion.guide, diffusion.guide, "model: Expected"),
        (diffusion.model, diffusion.model, "guide: Expected"),
        (lambda x: diffusion.model(x), diffusion.guide, "model: Expected"),
        (handlers.block(diffusion.model), diffusion.guide, "no handlers but scale and mask around it; got handlers.block"),
        (scaled, diffusion.guide, "the same handlers.scale"),
        (scaled, handlers.scale(diffusion.guide, scale=0.3), "the same handlers.scale"),
        (handlers.scale(diffusion.model, scale=jnp.ones((6, 7))), diffusion.guide, "by a number, or one for each datum"),
        (handlers.scale(diffusion.model, scale=jnp.ones(7)), diffusion.guide, "the same handlers.scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(model, guide)
    assert np.isfinite(loss(scaled, handlers.scale(diffusion.posterior_guide, scale=0.5)))


SCALED = [name for name in probdiff.ESTIMATORS if name != "kl_posterior_target"]
WEIGHT = np.array([0.5, 2.0, 0.1, 1.0, 3.0, 0.2, 1.5])


@pytest.mark.long
@pytest.mark.parametrize("name", long_but(["kl_combined"], SCALED, [name for name in SCALED if name not in ("trace", "kl_combined")]))
def test_scale_and_mask_by_datum(name, float64):
    """Value and gradient, on the same noise: a mask leaves one datum, whatever the others are; a scale weighs them; as NumPyro's own ELBO does."""
    diffusion = make()
    guide, elbo = probdiff.ESTIMATORS[name](diffusion)

    def compiled(*wrappers):
        """The value and a gradient for data, with these handlers around the programs, each of the array that is given for it."""

        def loss(params, x, *arrays):
            programs = [diffusion.model, guide]
            for wrap, array in zip(wrappers, arrays):
                programs = [wrap(program, array) for program in programs]
            return elbo.loss(jax.random.key(3), {"diffusion$params": params, **getattr(elbo, "initial_state", {})}, *programs, x)

        def both(*arguments):
            value, gradient = jax.value_and_grad(loss)(diffusion.trainable(), *arguments)
            return jnp.append(gradient.network.write.weight, value)

        return jax.jit(both)

    def mask(program, keep):
        return handlers.mask(program, mask=keep)

    def scale(program, by):
        return handlers.scale(program, scale=by)

    masked, close = compiled(mask), dict(rtol=1e-9, atol=1e-9)
    alone = np.array([masked(X, np.arange(7) == i) for i in range(7)])
    np.testing.assert_allclose(alone.sum(0), compiled()(X), **close)
    np.testing.assert_allclose(WEIGHT @ alone, compiled(scale)(X, WEIGHT), **close)
    some = compiled(mask, scale, scale)(X, np.arange(7) < 3, 0.3, WEIGHT)
    np.testing.assert_allclose(0.3 * WEIGHT[:3] @ alone[:3], some, **close)
    assert not masked(X, np.zeros(7, bool)).any()
    if name not in ("kl_combined", "kl_controlled"):  # (its control variate is fitted to the batch)
        np.testing.assert_allclose(alone[2], masked(X.at[3:].add(1.0), np.arange(7) == 2), **close)


def test_the_posterior_target_counts_its_points_as_their_terms(float64):
    """The mean is the weighted sum of the bounds; data that do not count are as if they were not there; all alike is no weight."""
    # (At an early loss of signal, many points may be what z_n was made of.)
    diffusion, weight = make(schedule=probdiff.log_snr_schedule(6, 1.0, -4.0)), np.array([3.0, 0, 0, 0.2, 0, 0.1, 0])
    guide, elbo = probdiff.ESTIMATORS["kl_posterior_target"](diffusion)

    def loss(key, x, weight, elbo=elbo):
        programs = [handlers.mask(handlers.scale(p, scale=np.where(weight, weight, 1)), mask=weight > 0) for p in (diffusion.model, guide)]
        return elbo.loss(key, elbo.initial_state, *programs, x)

    # On the same noise; with all points alike the difference would be 0.2.
    known, drawn = (probdiff.AnalyticELBO(diffusion, points=points) for points in ("batch", None))
    difference = jax.jit(jax.vmap(lambda key: loss(key, X, weight, known) - loss(key, X, weight, drawn)))
    assert_mean(difference(jax.random.split(jax.random.key(3), 6000)), 0.0, power=0.2)
    of_all = jax.jit(lambda x: [loss(jax.random.key(5), x, each) for each in (weight, np.zeros(7), np.full(7, 2.0), np.ones(7))])
    (one, none, twice, once), (other, *_) = of_all(X), of_all(X + 10 * (weight == 0)[:, None])
    assert none == 0
    np.testing.assert_allclose([other, twice], [one, 2 * once], rtol=1e-10)
    of_a_set = probdiff.AnalyticELBO(diffusion, "uniform", points=np.asarray(X))
    with pytest.raises(ValueError, match="points: Expected 'batch' with a scale or mask by datum"):
        loss(jax.random.key(5), X, weight, of_a_set)
