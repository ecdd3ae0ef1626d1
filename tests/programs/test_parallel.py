"""The programs with one site per chain against those that scan, on the same paths, under the same handlers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from conftest import assert_mean, long_but, release_but
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.util import log_density

import probdiff
from probdiff._chunks import inputs_at_once
from probdiff.oracles import GaussianOracle

ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
X = np.array([[0.3, -1.0], [1.2, 0.1], [-0.4, 0.5]])


def diffusion(num_steps, **kwargs):
    schedule = probdiff.log_snr_schedule(num_steps, 4.0, -2.0)
    return probdiff.Diffusion(schedule, ORACLE.network(schedule, 0.9), dim=2, **kwargs)


def mixture():
    network = probdiff.networks.CategoricalHead(lambda z, n: jnp.sin(z[..., None] * jnp.arange(3)), 3)
    schedule, likelihood = probdiff.log_snr_schedule(4, 4.0, -2.0), probdiff.DiscretizedNormalLikelihood(3)
    return probdiff.Diffusion(schedule, network, likelihood, dim=2, kernel=probdiff.chain.MixtureKernel(3))


def predicted():
    schedule = probdiff.log_snr_schedule(4, 4.0, -2.0)
    head = probdiff.networks.VarianceHead(lambda z, n: jnp.stack([0.5 * z, jnp.sin(z + n[..., None])], -1))
    return probdiff.Diffusion(schedule, head, dim=2, reverse_variance="predicted")


MODELS = {
    "one step": lambda: diffusion(1),
    "three steps": lambda: diffusion(3),
    "forward": lambda: diffusion(8, reverse_variance="forward"),
    "learned": lambda: probdiff.Diffusion(probdiff.LearnedSchedule(5, 4.0, -2.0), lambda z, n: 0.5 * z, dim=2),
    "mixture": mixture,
    "predicted": predicted,
}


def data_of(model):
    return np.array([[0, 2], [1, 1], [2, 0]]) if model.likelihood.levels else X


def joint(program, path, x, **kwargs):
    return jax.jit(lambda path: log_density(handlers.seed(program, 0), (x,), kwargs, {"z": path})[0])(path)


@pytest.mark.parametrize("name", long_but(["three steps", "mixture"], MODELS, ["learned", "predicted"]))
def test_the_densities_of_a_path_are_those_of_the_scanned_programs(name, float64):
    """Step by step for the model, in all for the guides; also as a minibatch."""
    model, x = MODELS[name](), data_of(MODELS[name]())
    programs, kwargs = probdiff.programs.ParallelPrograms(model), {"num_data": 7}
    path = jax.random.normal(jax.random.key(1), (model.schedule.num_steps, 3, 2))
    expected = joint(model.posterior_guide, path, x, **kwargs)
    for guide in (programs.guide, programs.posterior_guide):
        np.testing.assert_allclose(joint(guide, path, x, **kwargs), expected, rtol=1e-11)
    np.testing.assert_allclose(joint(programs.model, path, x, **kwargs), joint(model.model, path, x, **kwargs), rtol=1e-11)
    sites = [handlers.trace(handlers.seed(handlers.substitute(program.model, {"z": path}), 0)).get_trace(x) for program in (programs, model)]
    factors = [site["z"]["fn"].log_prob(path) for site in sites]
    assert factors[0].shape == (model.schedule.num_steps, 3)
    np.testing.assert_allclose(*factors, rtol=1e-10, atol=1e-12)


@pytest.mark.release
@pytest.mark.parametrize("name", MODELS)
def test_either_encoding_can_be_the_guide_of_the_other(name, float64):
    """Trace_ELBO on the path of the one guide, with either model; and its gradient."""
    model, x = MODELS[name](), data_of(MODELS[name]())
    programs = probdiff.programs.ParallelPrograms(model)
    for guide in (model.guide, model.posterior_guide, programs.guide, programs.posterior_guide):

        @jax.jit
        def losses(key, guide=guide):
            return [Trace_ELBO().loss(key, {}, program, guide, x) for program in (model.model, programs.model)]

        np.testing.assert_allclose(*losses(jax.random.key(3)), rtol=1e-10)


@pytest.mark.release
def test_the_gradient_is_that_of_the_scanned_programs(float64, patched):
    """In one call of the network, and in parts of which the last is smaller, computed again for the gradient."""
    schedule = probdiff.log_snr_schedule(7, 4.0, -2.0)
    model = probdiff.Diffusion(schedule, probdiff.MLP(2, key=jax.random.key(0), hidden=4, num_blocks=1))
    params = {"diffusion$params": jax.tree.map(lambda a: a + 0.1, model.trainable())}
    programs = probdiff.programs.ParallelPrograms(model)
    path = jax.random.normal(jax.random.key(1), (7, 3, 2))

    def gradient(program):
        return jax.jit(jax.grad(lambda p, z: joint(handlers.substitute(program, p), z, X), (0, 1)))(params, path)

    expected = gradient(model.model)
    for rows in (4096, 3 * 4):
        patched(inputs_at_once, lambda network, rows=rows: rows)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradient(programs.model), expected)


def test_paths_are_those_of_the_forward_chain(float64):
    """Mean and covariance over steps, in closed form: Cov(z_m, z_n) = √(ᾱ_n/ᾱ_m) (1 − ᾱ_m) for m ≤ n."""
    model, size = diffusion(6), 200_000
    x0 = jnp.broadcast_to(X[:1], (size, 2))
    path = np.asarray(probdiff.programs.ForwardChain(model.schedule, x0).sample(jax.random.key(0)))[::-1]
    signal, variance = model.schedule.signal_scale, model.schedule.one_minus_alpha_bar
    centred = path - signal[:, None, None] * X[0]
    assert_mean(centred.transpose(1, 0, 2), 0.0)
    for m in range(6):
        for n in range(m, 6):
            products = (centred[m] * centred[n]).reshape(-1)
            assert_mean(products[:, None], signal[n] / signal[m] * variance[m], power=0.05)
    assert_mean((centred[..., 0] * centred[..., 1]).T, 0.0)


@pytest.mark.long
def test_a_long_chain_does_not_overflow():
    """At N = 10 000 √ᾱ_N underflows float32, by which a cumulative sum would divide."""
    schedule = probdiff.NoiseSchedule.from_betas(np.full(10_000, 0.03))
    path = jax.jit(probdiff.programs.ForwardChain(schedule, jnp.ones((2, 1))).sample)(jax.random.key(0))
    assert np.isfinite(path).all() and abs(float(path[:5000].std()) - 1) < 0.05


@pytest.mark.long
def test_samples_of_the_reverse_chain_are_those_of_the_model(float64):
    """Mean and covariance of x and of z_1, against the linear-Gaussian model's in closed form by the scanned programs' own recursion."""
    model, size = diffusion(6), 100_000
    programs = probdiff.programs.ParallelPrograms(model)
    drawn = [
        handlers.trace(handlers.seed(program, key)).get_trace(None, num_data=size)
        for program, key in ((programs.model, 0), (model.model, 1))
    ]
    for name in ("x", "z"):
        a, b = (np.asarray(trace[name]["value"]) for trace in drawn)
        assert a.shape == b.shape
        for power in (1, 2):
            first, second = (np.moveaxis(v**power, -2, 0) for v in (a, b))
            assert_mean(first - second, 0.0, power=0.15)


@pytest.mark.long
@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
def test_under_the_handlers(guide, float64):
    """seed, trace, substitute, condition, replay, scale and Predictive, of both guides and the model."""
    model = diffusion(4)
    programs = probdiff.programs.ParallelPrograms(model)
    chosen = getattr(programs, guide)
    trace = handlers.trace(handlers.seed(chosen, 0)).get_trace(X)
    path = trace["z"]["value"]
    assert path.shape == (4, 3, 2)
    for handler in (handlers.substitute, handlers.condition):
        for program in (chosen, programs.model):
            given = handlers.trace(handlers.seed(handler(program, {"z": path}), 1)).get_trace(X)
            np.testing.assert_array_equal(given["z"]["value"], path)
    replayed = handlers.trace(handlers.seed(handlers.replay(chosen, trace), 1)).get_trace(X)
    np.testing.assert_array_equal(replayed["z"]["value"], path)
    halved = handlers.scale(programs.model, scale=0.5)
    np.testing.assert_allclose(joint(halved, path, X), joint(programs.model, path, X) / 2, rtol=1e-12)
    many = Predictive(chosen, num_samples=3)(jax.random.key(0), X)
    assert many["z"].shape == (3, 4, 3, 2)
    posterior = Predictive(programs.model, {"z": many["z"]})(jax.random.key(0), None, num_data=3)
    assert posterior["x"].shape == (3, 3, 2)


@pytest.mark.release
def test_svi_fits_it_and_the_estimators_agree():
    """With dropout, a minibatch and two particles; Trace_ELBO and TraceMeanField_ELBO, which has no KL of chains, are one number."""
    network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, dropout=0.2)
    model = probdiff.Diffusion(probdiff.log_snr_schedule(6, 4.0, -2.0), network)
    programs, x = probdiff.programs.ParallelPrograms(model), X.astype(np.float32)
    svi = SVI(programs.model, programs.guide, optax.adam(1e-2), Trace_ELBO(num_particles=2))
    result = svi.run(jax.random.key(1), 60, x, num_data=30, progress_bar=False)
    assert np.mean(result.losses[-10:]) < np.mean(result.losses[:10])
    fitted = model.bind(result.params)
    assert not np.array_equal(fitted.network.write.weight, network.write.weight)
    bound = probdiff.programs.ParallelPrograms(fitted)
    losses = [
        jax.jit(lambda key, elbo=elbo: elbo.loss(key, {}, bound.model, bound.guide, x))(jax.random.key(2))
        for elbo in (Trace_ELBO(), TraceMeanField_ELBO())
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_what_it_refuses():
    with pytest.raises(TypeError, match="diffusion: Expected"):
        probdiff.programs.ParallelPrograms("digits")
    programs = probdiff.programs.ParallelPrograms(diffusion(3))
    with pytest.raises(ValueError, match="shape"):
        handlers.seed(programs.model, 0)(X[0])
    with pytest.raises(ValueError, match="x: Expected data"):
        handlers.seed(programs.guide, 0)(None)
    with pytest.raises(ValueError, match="z: Expected shape"):
        probdiff.programs.ForwardChain(diffusion(3).schedule, jnp.zeros((2, 2))).log_prob(jnp.zeros((4, 2, 2)))


def in_plate(program, dim):
    """The program inside of a plate of two."""

    def plated(*args, **kwargs):
        with numpyro.plate("outer", 2, dim=dim):
            return program(*args, **kwargs)

    return plated


@pytest.mark.parametrize("name", release_but(["three steps"], MODELS))
def test_inside_of_a_plate_they_are_independent_copies(name, float64):
    """The density of two paths is the sum of theirs; what is drawn is each from its own path."""
    model, x = MODELS[name](), data_of(MODELS[name]())
    programs = probdiff.programs.ParallelPrograms(model)
    paths = jax.random.normal(jax.random.key(1), (2, model.schedule.num_steps, 3, 2))
    for program in (programs.model, programs.guide, programs.posterior_guide):
        apart = sum(joint(program, path, x, num_data=7) for path in paths)
        np.testing.assert_allclose(joint(in_plate(program, -3), paths, x, num_data=7), apart, rtol=1e-11)
    drawn = handlers.trace(handlers.seed(handlers.substitute(in_plate(programs.model, -3), {"z": paths}), 0)).get_trace(None, 3)["x"]
    alone = [handlers.trace(handlers.seed(handlers.substitute(programs.model, {"z": path}), 0)).get_trace(None, 3)["x"] for path in paths]
    assert drawn["value"].shape == (2, 1, 3, 2)
    own = [np.asarray(site["fn"].log_prob(drawn["value"][k, 0])) for k, site in enumerate(alone)]
    np.testing.assert_allclose(drawn["fn"].log_prob(drawn["value"])[:, 0], own, rtol=1e-10)


@pytest.mark.parametrize("method", ["model", "guide", "posterior_guide"])
def test_a_plate_in_the_way_is_named(method):
    """None can be around a program that scans; around the others, one that leaves the last two places to theirs."""
    scanned, programs = diffusion(3), probdiff.programs.ParallelPrograms(diffusion(3))
    for program, dim, expected in (
        (scanned, None, "no plate around a program that scans; got 'outer' with dim=-1"),
        (scanned, -3, "no plate around a program that scans; got 'outer' with dim=-3"),
        (programs, None, "a plate with dim=-3 or less; got 'outer' with dim=-1"),
        (programs, -2, "a plate with dim=-3 or less; got 'outer' with dim=-2"),
    ):
        with pytest.raises(NotImplementedError, match=f"numpyro.plate: Expected {expected}.*ParallelPrograms.*dim=-3"):
            handlers.seed(in_plate(getattr(program, method), dim), 0)(X)
