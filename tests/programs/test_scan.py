"""The three programs: right pairing of steps, right density on every path, and clear refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from conftest import long_but
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.util import log_density

import probdiff


def make(num_steps=5, dim=2, **kwargs):
    network = probdiff.MLP(dim, key=jax.random.key(0), hidden=16, num_blocks=1)
    network = jax.tree.map(lambda a: a + 0.1 if eqx.is_inexact_array(a) else a, network)  # wake the zero output
    return probdiff.Diffusion(probdiff.cosine_schedule(num_steps), network, **kwargs)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (4, 2))


def unrolled_log_q(diffusion, x, z):
    """log q(z_1:N | x_0) by the definition, step by step; z in the model's order."""
    total, previous = 0.0, x
    for n in range(1, diffusion.schedule.num_steps + 1):
        value = z[diffusion.schedule.num_steps - n]
        beta = diffusion.schedule.beta[n - 1]
        total += dist.Normal(np.sqrt(1 - beta) * previous, np.sqrt(beta)).log_prob(value).sum()
        previous = value
    return total


def unrolled_log_p(diffusion, x, z):
    """log p(x, z_1:N) by the definition, step by step; z in the model's order."""
    s = diffusion.schedule
    total = dist.Normal(0, 1).log_prob(z[0]).sum()
    for n in range(s.num_steps, 0, -1):
        value = z[s.num_steps - n]
        eps_hat = diffusion.predict_noise(value, n)
        mean = (value - s.beta[n - 1] / np.sqrt(1 - s.alpha_bar[n - 1]) * eps_hat) / np.sqrt(1 - s.beta[n - 1])
        variance = s.beta[0] if n == 1 else s.posterior_variance[n - 1]
        target = x if n == 1 else z[s.num_steps - n + 1]
        total += dist.Normal(mean, np.sqrt(variance)).log_prob(target).sum()
    return total


@pytest.mark.long
@pytest.mark.parametrize("num_steps", long_but([1, 3], [1, 3, 8]))
def test_replay_pairs_each_step_with_itself(num_steps, float64):
    """A guide that emits z_n = n: the loss is −log p of the path in which step n sees n, and of no other path."""
    diffusion, x = make(num_steps), jnp.ones((1, 2))

    def loss(steps, **kwargs):
        def guide(x):
            def step(carry, n):
                with numpyro.plate("data", 1):
                    numpyro.sample("z", dist.Delta(jnp.full((1, 2), n, jnp.float64), event_dim=1))
                return carry, None

            scan(step, None, steps, **kwargs)

        return jax.jit(lambda key: Trace_ELBO().loss(key, {}, diffusion.model, guide, x))(jax.random.key(0))

    descending = jnp.arange(num_steps, 0, -1)
    path = jnp.broadcast_to(descending[:, None, None].astype(jnp.float64), (num_steps, 1, 2))
    right = -jax.jit(lambda path: unrolled_log_p(diffusion, x, path))(path)
    np.testing.assert_allclose(loss(descending), right, rtol=1e-9)
    np.testing.assert_allclose(loss(descending, reverse=True), right, rtol=1e-9)
    if num_steps > 1:  # a guide that stacks its steps upwards is wrong, silently: what the order of the programs avoids
        assert abs(loss(descending[::-1]) - right) > 1


@pytest.mark.parametrize("num_steps", long_but([1, 3], [1, 3, 8]))
def test_densities_on_a_sampled_path(num_steps, x, float64):
    diffusion, x = make(num_steps), jnp.asarray(x, jnp.float64)

    @jax.jit
    def found():
        """A path of either guide and its densities, by the programs and by the definition."""
        rows = []
        for guide in (diffusion.guide, diffusion.posterior_guide):
            trace = handlers.trace(handlers.seed(guide, 3)).get_trace(x)
            z = trace["z"]["value"]
            assert z.shape == (num_steps, 4, 2)
            log_p, _ = log_density(handlers.seed(diffusion.model, 0), (x,), {}, {"z": z})
            rows.append([trace["z"]["fn"].log_prob(z).sum(), unrolled_log_q(diffusion, x, z), log_p, unrolled_log_p(diffusion, x, z)])
        return rows

    for log_q, expected_q, log_p, expected_p in found():
        np.testing.assert_allclose(log_q, expected_q, rtol=1e-9)
        np.testing.assert_allclose(log_p, expected_p, rtol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize(
    "give",
    [
        lambda program, z, trace: handlers.substitute(program, {"z": z}),
        lambda program, z, trace: handlers.condition(program, {"z": z}),
        lambda program, z, trace: handlers.replay(program, trace),
    ],
)
def test_given_paths(give, x, float64):
    """The forward factorisation equals the flipped one on every path; given a path, the forward guide refuses."""
    diffusion, x = make(6), jnp.asarray(x, jnp.float64)
    trace = handlers.trace(handlers.seed(diffusion.guide, 3)).get_trace(x)
    z = trace["z"]["value"]
    flipped = handlers.trace(handlers.seed(give(diffusion.posterior_guide, z, trace), 4)).get_trace(x)["z"]
    np.testing.assert_array_equal(flipped["value"], z)
    forward_log_q = trace["z"]["fn"].log_prob(z).sum(0)
    np.testing.assert_allclose(flipped["fn"].log_prob(z).sum(0), forward_log_q, rtol=1e-9)
    with pytest.raises(ValueError, match="posterior_guide"):
        handlers.trace(handlers.seed(give(diffusion.guide, z, trace), 4)).get_trace(x)


@pytest.mark.long
def test_mean_field_with_the_forward_guide_is_refused(x):
    diffusion = make()
    with pytest.raises(ValueError, match="posterior_guide"):
        TraceMeanField_ELBO().loss(jax.random.key(0), {}, diffusion.model, diffusion.guide, x)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), TraceMeanField_ELBO())
    with pytest.raises(ValueError, match="posterior_guide"):
        svi.run(jax.random.key(0), 2, x, progress_bar=False)


@pytest.mark.long
@pytest.mark.parametrize("elbo", long_but(["trace", "analytic"], ["trace", "trace_posterior", "mean_field", "analytic"]))
def test_minibatch_scale(elbo, x):
    diffusion = make()
    guide = diffusion.guide if elbo == "trace" else diffusion.posterior_guide
    objective = {"mean_field": TraceMeanField_ELBO(), "analytic": probdiff.AnalyticELBO(diffusion)}.get(
        elbo, Trace_ELBO()
    )

    @jax.jit
    def losses(key):
        return jnp.array([objective.loss(key, {}, diffusion.model, guide, x, num_data=k) for k in (None, 4, 40)])

    losses = losses(jax.random.key(0))
    np.testing.assert_allclose(losses, [losses[0], losses[0], 10 * losses[0]], rtol=1e-5)
    with pytest.raises(ValueError, match="num_data: Expected at least 4"):
        objective.loss(jax.random.key(0), {}, diffusion.model, guide, x, num_data=3)


@pytest.mark.long
def test_handlers_scale_applies_to_all_sites(x):
    diffusion = make()
    programs = diffusion.model, diffusion.guide
    scaled = [handlers.scale(program, scale=0.25) for program in programs]
    for objective in (Trace_ELBO(), probdiff.AnalyticELBO(diffusion)):

        @jax.jit
        def losses(key, objective=objective):
            return [objective.loss(key, {}, *each, x) for each in (programs, scaled)]

        plain, quarter = losses(jax.random.key(0))
        np.testing.assert_allclose(quarter, plain / 4, rtol=1e-5)


@pytest.mark.release
@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize(
    "likelihood, kind",
    [(probdiff.NormalLikelihood(), jnp.floating), (probdiff.DiscretizedNormalLikelihood(5), jnp.integer)],
)
def test_generation(num_steps, likelihood, kind):
    diffusion = make(num_steps, likelihood=likelihood)
    drawn = Predictive(diffusion.model, num_samples=3)(jax.random.key(0), None, num_data=7)
    assert drawn["x"].shape == (3, 7, 2) and drawn["z"].shape == (3, num_steps, 7, 2)
    assert jnp.issubdtype(drawn["x"].dtype, kind)
    likelihood.check_data(drawn["x"])
    with pytest.raises(ValueError, match="num_data"):
        handlers.seed(diffusion.model, 0)(None)
    with pytest.raises(ValueError, match="dim: Expected"):
        handlers.seed(probdiff.Diffusion(diffusion.schedule, lambda z, n: z).model, 0)(None, num_data=3)
    plain = probdiff.Diffusion(diffusion.schedule, lambda z, n: z, dim=3)
    assert handlers.seed(plain.model, 0)(None, num_data=2).shape == (2, 3)


@pytest.mark.long
def test_svi_trains_the_network_and_bind_returns_it(x):
    class Network(probdiff.networks.AbstractNetwork):
        mlp: probdiff.MLP
        frequencies: np.ndarray
        dim = 2

        def __call__(self, z, log_snr):
            return self.mlp(z, log_snr) + jnp.sin(z * self.frequencies)

    network = Network(make().network, np.array([1.0, 2.0], np.float32))
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), network)
    svi = SVI(diffusion.model, diffusion.guide, optax.adamw(1e-2, weight_decay=0.1), Trace_ELBO())
    result = svi.run(jax.random.key(0), 20, x, progress_bar=False)
    fitted = diffusion.bind(result.params)
    assert isinstance(fitted.network.frequencies, np.ndarray)
    np.testing.assert_array_equal(fitted.network.frequencies, [1, 2])
    assert fitted.schedule == diffusion.schedule
    assert not np.array_equal(fitted.network.mlp.read.weight, network.mlp.read.weight)

    @jax.jit
    def losses(key):
        return [Trace_ELBO().loss(key, params, model.model, model.guide, x) for model, params in ((fitted, {}), (diffusion, result.params))]

    np.testing.assert_allclose(*losses(jax.random.key(5)))
    with pytest.raises(ValueError, match="params: Expected only the site"):
        diffusion.bind({"network": result.params})
    with pytest.raises(ValueError, match="params: Expected the parameters of this model"):
        make(dim=3).bind(result.params)


def test_plain_function_has_no_parameters(x):
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: 0.5 * z)
    trace = handlers.trace(handlers.seed(diffusion.model, 0)).get_trace(x)
    assert {name: site["type"] for name, site in trace.items()} == {"z": "sample", "data": "plate", "x": "sample"}
    assert np.isfinite(Trace_ELBO().loss(jax.random.key(0), {}, diffusion.model, diffusion.guide, x))


@pytest.mark.release
def test_key_reaches_the_network_in_training_and_never_in_evaluation(x):
    keys = []

    class Network(eqx.Module):
        weight: jax.Array

        def __call__(self, z, n, *, key=None):
            keys.append(key)
            return self.weight * z

    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), Network(jnp.ones(())), dim=2)
    for elbo in (
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        probdiff.AnalyticELBO(diffusion),
        probdiff.AnalyticELBO(diffusion, steps="uniform"),
    ):
        keys.clear()
        svi = SVI(diffusion.model, diffusion.posterior_guide, optax.adam(1e-3), elbo)
        state, _ = jax.jit(svi.update)(svi.init(jax.random.key(0), x), x)
        assert keys and all(key is not None for key in keys)
        keys.clear()
        fitted = diffusion.bind(svi.get_params(state))
        probdiff.elbo_terms(fitted, x, key=jax.random.key(0))
        probdiff.elbo_terms(diffusion, x, key=jax.random.key(0))
        Trace_ELBO().loss(jax.random.key(0), {}, fitted.model, fitted.guide, x)
        Predictive(diffusion.model, num_samples=1)(jax.random.key(0), None, num_data=2)
        assert keys and all(key is None for key in keys)


@pytest.mark.long
def test_compile_size_does_not_grow_with_the_number_of_steps(x):
    def size(num_steps):
        diffusion = make(num_steps)
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), Trace_ELBO())
        return len(jax.jit(svi.update).lower(svi.init(jax.random.key(0), x), x).as_text().splitlines())

    assert size(1000) <= 1.01 * size(10)


@pytest.mark.parametrize("network", [lambda z, n: z[..., :1], lambda z, n: 0.0, lambda z, n: z.sum(-1)])
def test_a_network_of_the_wrong_shape_is_refused(network, x):
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), network)
    with pytest.raises(ValueError, match=r"network\(z, n\): Expected shape"):
        Trace_ELBO().loss(jax.random.key(0), {}, diffusion.model, diffusion.guide, x)


@pytest.mark.long
def test_predictive_of_every_program(x):
    diffusion = make()
    for guide in (diffusion.guide, diffusion.posterior_guide):
        assert Predictive(guide, num_samples=3)(jax.random.key(0), x)["z"].shape == (3, 5, 4, 2)
        drawn = Predictive(diffusion.model, guide=guide, params={}, num_samples=3)(jax.random.key(0), x)
        assert drawn["x"].shape == (3, 4, 2)
    with pytest.raises(ValueError, match="posterior_guide"):
        Predictive(diffusion.guide, posterior_samples={"z": jnp.zeros((3, 5, 4, 2))})(jax.random.key(0), x)


@pytest.mark.release
@pytest.mark.parametrize("objective", long_but(["uniform"], ["trace", "all", "uniform"]))
def test_float64_with_parameters_or_data_in_float32(objective, x, float64):
    for data in (x, jnp.asarray(x, jnp.float64)):
        diffusion = make(40)
        single = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, diffusion.network)
        diffusion = probdiff.Diffusion(diffusion.schedule, single)
        elbo = Trace_ELBO() if objective == "trace" else probdiff.AnalyticELBO(diffusion, steps=objective)
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), elbo)
        assert np.all(np.isfinite(svi.run(jax.random.key(0), 2, data, progress_bar=False).losses))


@pytest.mark.release
def test_num_data_may_be_traced(x):
    diffusion = make()
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), Trace_ELBO())
    state = svi.init(jax.random.key(0), x)
    np.testing.assert_allclose(jax.jit(svi.update)(state, x, 40)[1], jax.jit(lambda state, x: svi.update(state, x, 40))(state, x)[1], rtol=1e-4)
