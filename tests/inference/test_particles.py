"""Sequential Monte Carlo against the exact evidence and posterior of the discrete linear-Gaussian chain."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from conftest import Z_MAX, assert_mean, long_but
from numpyro import distributions as dist
from scipy import stats

import probdiff
from probdiff.inference import (
    Inpainting,
    LinearGaussian,
    NoTwist,
    Posterior,
    Program,
    evidence_bounds,
    log_evidence,
    smc,
)
from probdiff.inference.particles import _multinomial, evidence, make_problem
from probdiff.inference.twists import Twisted
from probdiff.oracles import GaussianOracle, exact_moments

KEY = jax.random.key(0)
SCHEDULE = probdiff.log_snr_schedule(24, 5.0, -4.0)
LIKELIHOOD = probdiff.NormalLikelihood([1.0, 0.0, 2.0], [2.0, 1.0, 0.5])
ORACLE = GaussianOracle([0.3, -0.2, 0.1], [[0.9, 0.4, -0.2], [0.4, 0.7, 0.1], [-0.2, 0.1, 0.5]])
MATRIX = np.array([[0.5, 1.0, -0.3], [0.2, -0.4, 1.0]])
Y = np.array([1.4, 2.5])
MASK, VALUES = np.array([True, False, True]), np.array([2.0, np.nan, 2.4])
OBSERVATIONS = {
    "linear": lambda: LinearGaussian(MATRIX, Y, 0.8),
    "function": lambda: LinearGaussian(lambda x: jnp.asarray(MATRIX) @ x, Y, covariance=[[0.64, 0.1], [0.1, 0.5]]),
    "inpainting": lambda: Inpainting(MASK, VALUES),
    "program": lambda: Program(observed),
}


def observed(x):
    numpyro.sample("y", dist.Normal(jnp.asarray(MATRIX) @ x, 0.8).to_event(1), obs=jnp.asarray(Y))


@functools.cache
def make(variance="forward"):
    return probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.95), LIKELIHOOD, variance).bind({})


def exact(name, variance="forward"):
    """log p_θ(y), and the mean and the covariance of x given y, by conditioning the dense Gaussian."""
    mean, covariance = exact_moments(make(variance))
    a = np.eye(3)[MASK] if name == "inpainting" else MATRIX
    noise = {"inpainting": np.zeros((2, 2)), "function": np.array([[0.64, 0.1], [0.1, 0.5]])}.get(name, 0.64 * np.eye(2))
    y = VALUES[MASK] if name == "inpainting" else Y
    of_y = a @ covariance @ a.T + noise
    gain = covariance @ a.T @ np.linalg.inv(of_y)
    log_prob = stats.multivariate_normal(a @ mean, of_y).logpdf(y)
    return log_prob, mean + gain @ (y - a @ mean), covariance - gain @ a @ covariance


def ratios(name, twist, size, draws, variance="forward"):
    """The estimate of the evidence over the evidence, of independent runs."""
    problem = make_problem(make(variance), OBSERVATIONS[name](), twist, None)
    run = jax.jit(lambda keys: jax.lax.map(lambda key: evidence(problem, size, key), keys, batch_size=max(1, 4096 // size)))
    return np.exp(np.asarray(run(jax.random.split(jax.random.key(1), draws)), float) - exact(name, variance)[0])


CASES = [("linear", twist, size, "forward") for twist in ("tweedie", "none") for size in (1, 4, 64)]
CASES += [("linear", twist, 4, "posterior") for twist in ("tweedie", "none")]
CASES += [("inpainting", "tweedie", 4, "forward"), ("inpainting", "none", 64, "forward")]
CASES += [(name, "tweedie", 4, "forward") for name in ("program", "function")]
QUICK = [("linear", "tweedie", 4, "forward"), ("inpainting", "tweedie", 4, "forward")]
LONG = [("linear", "none", 64, "forward"), ("linear", "tweedie", 4, "posterior"), ("inpainting", "none", 64, "forward"), ("program", "tweedie", 4, "forward")]
DRAWS = {1: 12_000, 4: 3_000, 64: 400}


@pytest.mark.parametrize("name, twist, size, variance", long_but(QUICK, CASES, [case for case in CASES if case not in QUICK + LONG]))
def test_the_evidence_is_unbiased(name, twist, size, variance, float64):
    found = ratios(name, twist, size, DRAWS[size], variance)
    assert_mean(found[:, None], 1.0, power=0.5 if twist == "tweedie" else None)


@pytest.mark.long
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_the_posterior_is_that_of_the_dense_gaussian(name, float64):
    _, mean, covariance = exact(name)
    found = smc(make(), OBSERVATIONS[name](), key=KEY, num_particles=256, num_runs=8)
    runs = [weights @ part / weights.sum() for part, weights in zip(np.split(found.samples, 8), np.split(found.weights, 8))]
    scale = np.sqrt(np.abs(np.diag(covariance)))
    error = np.std(runs, 0, ddof=1) / np.sqrt(8)
    np.testing.assert_allclose(found.mean, mean, atol=Z_MAX * error.max() + 1e-6)
    assert np.all(error < 0.1 * scale.max())
    spread = found.weights @ np.square(found.samples - found.mean)
    np.testing.assert_allclose(spread, np.diag(covariance), rtol=0.15, atol=1e-6)
    assert abs(found.log_evidence - exact(name)[0]) < Z_MAX * found.log_evidence_error
    if name == "inpainting":
        np.testing.assert_array_equal(found.samples[:, MASK], np.broadcast_to(VALUES[MASK], (len(found.samples), 2)))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_last_step_of_much_noise_is_conditioned_on_y(num_steps, float64):
    """Where most of the variance of x is that of the last step: its mean and covariance given y, and y, to which x is nearly tied."""
    schedule = probdiff.log_snr_schedule(2, 0.0, -2.0) if num_steps == 2 else probdiff.NoiseSchedule.from_betas([0.6])
    model = probdiff.Diffusion(schedule, ORACLE.network(schedule, 0.95), LIKELIHOOD, "forward").bind({})
    mean, covariance = exact_moments(model)
    gain = covariance @ MATRIX.T @ np.linalg.inv(MATRIX @ covariance @ MATRIX.T + 0.01 * np.eye(2))
    found = smc(model, LinearGaussian(MATRIX, Y, 0.1), key=KEY, num_particles=2000, num_runs=2)
    draws = found.resample(KEY, 4000)
    np.testing.assert_allclose((draws @ MATRIX.T).mean(0), MATRIX @ (mean + gain @ (Y - MATRIX @ mean)), atol=0.03)
    np.testing.assert_allclose(draws.mean(0), mean + gain @ (Y - MATRIX @ mean), atol=0.15)
    np.testing.assert_allclose(np.cov(draws.T), covariance - gain @ MATRIX @ covariance, atol=0.15)


@pytest.mark.long
def test_learned_variances_and_a_mixture_kernel(float64):
    """Learned variances as they begin, against the same by a long bootstrap; the mixture against the frequency of its own samples."""
    model = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE), LIKELIHOOD, "learned").bind({})
    found = [smc(model, OBSERVATIONS["linear"](), key=KEY, num_particles=k, num_runs=16, twist=twist) for k, twist in ((256, "tweedie"), (1024, "none"))]
    difference = found[0].log_evidence - found[1].log_evidence
    assert abs(difference) < Z_MAX * np.hypot(*(each.log_evidence_error for each in found))
    schedule = probdiff.log_snr_schedule(6, 4.0, -3.0)
    head = probdiff.networks.CategoricalHead(lambda z, n: jnp.stack([z[..., ::-1], 0 * z, -z], -1), 3)
    grid = probdiff.Diffusion(schedule, head, probdiff.DiscretizedNormalLikelihood(3), kernel=probdiff.chain.MixtureKernel(3), dim=2).bind({})
    samples = probdiff.samplers.ancestral(grid, key=KEY, num_samples=20_000)
    for value in range(3):
        share = (samples[:, 0] == value).mean()
        given = Inpainting(np.array([True, False]), np.array([value, 0]))
        posterior = smc(grid, given, key=KEY, num_particles=512, num_runs=16, twist="none")
        error = np.hypot(posterior.log_evidence_error, np.sqrt((1 - share) / share / 20_000))
        assert abs(posterior.log_evidence - np.log(share)) < Z_MAX * error
        hidden = np.bincount(samples[samples[:, 0] == value, 1], minlength=3) / (samples[:, 0] == value).sum()
        weighted = np.bincount(posterior.samples[:, 1], posterior.weights, 3)
        np.testing.assert_allclose(weighted, hidden, atol=0.05)


@pytest.mark.long
def test_a_latent_of_the_observation_is_sampled_exactly(float64):
    """A scale with a prior of two values, by the ratio of evidences that are known."""

    def log_ratio(scale):
        mean, covariance = exact_moments(make())
        return stats.multivariate_normal(MATRIX @ mean, MATRIX @ covariance @ MATRIX.T + scale**2 * np.eye(2)).logpdf(Y)

    def one(scale, key):
        program = Program(lambda x: numpyro.sample("y", dist.Normal(jnp.asarray(MATRIX) @ x, scale).to_event(1), obs=jnp.asarray(Y)))
        return log_evidence(make(), program, key=key, num_particles=16)

    keys = jax.random.split(KEY, 400)
    for scale in (0.6, 2.0):
        draws = jax.jit(lambda keys, scale=scale: jax.lax.map(lambda key: one(scale, key), keys, batch_size=200))(keys)
        assert_mean(np.exp(np.asarray(draws) - log_ratio(scale))[:, None], 1.0, power=0.3)


def ranks_of(draws, x, y, key):
    """The share of the posterior of each y below the x, for each coordinate."""
    found = []
    for k, each in enumerate(jax.random.split(key, len(x))):
        posterior = smc(make(), LinearGaussian(MATRIX, y[k], 0.3), key=each, num_particles=64)
        found.append((posterior.resample(each, draws) < x[k]).mean(0))
    return np.array(found)


@pytest.mark.long
def test_the_posterior_is_calibrated():
    """Simulation-based calibration: x and y from the model, the rank of x among draws of its posterior is uniform, and not among those of another y."""
    x = probdiff.samplers.ancestral(make(), key=KEY, num_samples=150)
    y = x @ MATRIX.T + 0.3 * np.random.default_rng(0).normal(size=(150, 2))
    jitter = np.random.default_rng(1).uniform(0, 1 / 40, (150, 3))
    own, of_another = (ranks_of(39, x, each, jax.random.key(2)) * 39 / 40 + jitter for each in (y, np.roll(y, 1, 0)))
    assert all(stats.kstest(ranks, "uniform").pvalue > 1e-3 for ranks in own.T)
    assert min(stats.kstest(ranks, "uniform").pvalue for ranks in of_another.T) < 1e-4


class UnequalAtFive(NoTwist):
    """A twist that makes the weights unequal at z_5, after which the particles are resampled."""

    def __call__(self, diffusion, observation, z, n):
        return Twisted(jnp.where(n == 5, 40.0, 0.0) * z[0], jnp.zeros_like(z))


def test_the_effective_sample_sizes_are_in_the_order_of_the_steps(constant):
    """Each at the step that it is of, with some steps at a time."""
    constant("EVALUATIONS", 64 * 7)
    ess = smc(make(), OBSERVATIONS["linear"](), key=KEY, num_particles=64, twist=UnequalAtFive()).ess
    assert ess.shape == (24,) and ess[4] < 16
    np.testing.assert_allclose(ess[5:], 64, rtol=1e-4)


def test_particles_without_weight_are_in_no_export():
    """Of two runs of two particles, one of each has all of the weight."""
    log_weights = np.array([-np.inf, 0.0, -1.0, -np.inf])
    found = Posterior(np.arange(4.0)[:, None], log_weights, 0.0, 0.1, np.ones(3), 2)
    np.testing.assert_array_equal(found.to_datatree()["posterior"]["x"].values[..., 0], [[1, 1], [2, 2]])
    assert set(found.resample(KEY, 200)[:, 0]) == {1.0, 2.0}
    np.testing.assert_allclose(found.mean, (1 + 2 / np.e) / (1 + 1 / np.e))


def test_a_program_that_is_scaled_counts_so_often(float64):
    """As for NumPyro's own ``log_density``."""
    x = jnp.array([0.3, -0.1, 0.4])

    def scaled(x):
        with numpyro.handlers.scale(scale=3.0):
            observed(x)

    expected = numpyro.infer.util.log_density(scaled, (x,), {}, {})[0]
    np.testing.assert_allclose(Program(scaled).log_prob(x), expected, rtol=1e-12)
    np.testing.assert_allclose(expected, 3 * Program(observed).log_prob(x), rtol=1e-12)


@pytest.mark.long
def test_given_a_context(float64):
    """The evidence of a conditional model is that of its row."""
    oracle = GaussianOracle(ORACLE.mean, ORACLE.covariance, [[1.0], [-0.5], [0.2]])
    model = probdiff.Diffusion(SCHEDULE, oracle.network(SCHEDULE), LIKELIHOOD, "forward").bind({})
    for c in (-1.0, 2.0):
        mean, covariance = exact_moments(model, context=np.array([[c]]))
        expected = stats.multivariate_normal(MATRIX @ mean[0], MATRIX @ covariance @ MATRIX.T + 0.64 * np.eye(2)).logpdf(Y)
        found = smc(model, OBSERVATIONS["linear"](), context=np.array([[c]]), key=KEY, num_particles=128, num_runs=16)
        assert abs(found.log_evidence - expected) < Z_MAX * found.log_evidence_error


def test_particles_that_overflow_have_no_weight():
    """By the point twist of a precise y every particle runs away: the estimate is 0, not NaN."""
    with pytest.warns(UserWarning, match="smc: the particles have collapsed"):
        found = smc(make(), LinearGaussian(MATRIX, Y, 1e-12), key=KEY, num_particles=8, twist="point")
    assert found.log_evidence == -np.inf and np.all(found.log_weights == -np.inf) and not np.isnan(found.ess).any()


@pytest.mark.long
def test_called_again_nothing_is_compiled():
    model = make()
    given = {"key": KEY, "num_particles": 8}
    smc(model, LinearGaussian(MATRIX, Y, 0.8), **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax._src.interpreters.pxla.MeshComputation, "compile", lambda *a, **k: pytest.fail("something was compiled"))
        found = [smc(model, LinearGaussian(MATRIX + k, Y - k, 0.5 + k), **given).log_evidence for k in (1.0, 2.0)]
    assert found[0] != found[1]


def test_the_posterior_as_a_result():
    found = smc(make(), OBSERVATIONS["linear"](), key=KEY, num_particles=64, num_runs=4)
    assert found.samples.shape == (256, 3) and found.log_weights.shape == (256,) and found.ess.shape == (24,)
    assert found.resample(KEY, 10).shape == (10, 3)
    tree = found.to_datatree()
    assert tree["posterior"]["x"].dims == ("chain", "draw", "dim") and tree["posterior"]["x"].shape == (4, 64, 3)
    assert tree["sample_stats"]["ess"].shape == (24,) and tree["posterior"].attrs["log_evidence"] == found.log_evidence
    assert "log p(y) of the model" in repr(found) and len(repr(found).splitlines()) == 3
    one = smc(make(), OBSERVATIONS["linear"](), key=KEY, num_particles=64)
    assert np.isnan(one.log_evidence_error) and "±" not in repr(one)
    left, right = found.plot("a title").axes
    np.testing.assert_allclose(left.collections[0].get_offsets(), found.samples[:, :2])
    np.testing.assert_array_equal(right.lines[0].get_ydata(), found.ess)
    with pytest.warns(UserWarning, match="smc: the particles have collapsed: at step n = "):
        smc(make(), LinearGaussian(MATRIX, Y + 30, 0.01), key=KEY, num_particles=512, twist=NoTwist())


def test_the_runs_of_a_posterior_count_by_their_evidence():
    """Evidence 1 and 3: a quarter and three quarters of the weight, divided within each run by its own weights, on whatever scale."""
    given = [(1.0, [0.5, 0.5]), (3.0, [20.0, 60.0])]
    runs = [SimpleNamespace(log_evidence=np.log(e), log_weights=np.log(w), samples=np.full((2, 1), float(k)), ess=np.full(3, 2.0)) for k, (e, w) in enumerate(given)]
    found = Posterior.of_runs(runs)
    np.testing.assert_allclose(found.weights, [1 / 8, 1 / 8, 3 / 16, 9 / 16])
    assert found.log_evidence == pytest.approx(np.log(2))


def test_the_path_of_a_simulated_y_is_never_resampled_away():
    log_weights = jnp.log(jnp.array([1e-6, 0.5, 0.5]))
    drawn = np.array([_multinomial(key, log_weights) for key in jax.random.split(KEY, 20)])
    assert np.all(drawn[:, 0] == 0) and set(drawn[:, 1:].ravel().tolist()) == {1, 2}


@pytest.mark.parametrize("name", long_but(["inpainting"], ["linear", "inpainting"]))
def test_the_evidence_of_simulated_observations_is_between_two_bounds(name, float64):
    """The mean of the exact log evidence of the same y is above the one and below the other, and both are near with enough particles."""
    mean, covariance = exact_moments(make())
    found = {k: evidence_bounds(make(), OBSERVATIONS[name](), key=KEY, num_data=40, num_particles=k) for k in (2, 64)}
    if name == "inpainting":
        exact_values = stats.multivariate_normal(mean[MASK], covariance[np.ix_(MASK, MASK)]).logpdf(found[2].x[:, MASK])
        for each in found.values():
            assert_above(exact_values - each.lower)
            assert_above(each.upper - exact_values)
    gaps = {k: (each.upper - each.lower).mean() for k, each in found.items()}
    assert 0 < gaps[64] < 0.1 and gaps[2] > 3 * gaps[64], gaps
    assert "distance" in repr(found[2])


def assert_above(differences):
    """Their mean is not below 0, but for its error."""
    assert differences.mean() > -Z_MAX * differences.std(ddof=1) / np.sqrt(len(differences))
