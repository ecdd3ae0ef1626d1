"""Mixture oracles: the exact ε-network against autodiff of the density; density, entropy and draws against others."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
from conftest import Z_MAX, assert_mean, long_but, release_but
from jax.scipy.special import logsumexp, ndtr

import probdiff
from probdiff import datasets
from probdiff.oracles import GaussianMixture, GaussianOracle, UniformBoxes

SCHEDULE = probdiff.log_snr_schedule(6, 4.0, -3.0)
WEIGHTS = np.array([0.5, 0.2, 0.3])
MEANS = np.array([[1.0, 0.5], [-1.2, 0.3], [0.2, -1.5]])
COVARIANCES = np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.05, -0.02], [-0.02, 0.4]], [[0.5, 0.45], [0.45, 0.6]]])
MIXTURE = GaussianMixture(WEIGHTS, MEANS, COVARIANCES)
GAUSSIAN = GaussianOracle(MEANS[0], COVARIANCES[0])
BOXES = UniformBoxes([[-2.0, -1.0], [0.5, -0.3], [0.5, 1.0]], [[-0.5, 0.2], [1.0, 1.0], [2.0, 2.0]])
ORACLES = {"mixture": MIXTURE, "gaussian": GAUSSIAN, "boxes": BOXES}
STEPS = range(1, 7)
load = functools.cache(datasets.load)
Z = np.array([[0.3, 0.9], [-1.1, 0.2], [2.0, -2.5], [0.0, 0.0], [-3.0, 1.0]])


def signal_and_noise(n, schedule=SCHEDULE):
    """Square roots of alpha_bar_n and of 1 − alpha_bar_n, by the product over the steps."""
    alpha_bar = np.prod(1 - schedule.beta[:n])
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def mixture_log_q(z, n, weights=WEIGHTS, means=MEANS, covariances=COVARIANCES):
    signal, noise = signal_and_noise(n)
    parts = dist.MultivariateNormal(signal * means, signal**2 * covariances + noise**2 * np.eye(means.shape[1]))
    return dist.MixtureSameFamily(dist.CategoricalProbs(jnp.asarray(weights)), parts).log_prob(z)


def boxes_log_q(z, n, lower=BOXES.lower, upper=BOXES.upper):
    signal, noise = signal_and_noise(n)
    ends = (z - signal * np.stack([lower, upper])) / noise
    ends = jnp.where(ends.sum(0) > 0, -ends[::-1], ends)  # the tail in which Φ is small, and its differences accurate
    mass = ndtr(ends[0]) - ndtr(ends[1])
    return logsumexp(jnp.log(mass).sum(-1)) - np.log(np.prod(upper - lower, -1).sum())


def by_step(network, schedule=SCHEDULE):
    """A network of either kind as a function of z and n."""
    return probdiff.Diffusion(schedule, network).predict_noise


def exact_eps(log_q, z, n, **kwargs):
    noise = signal_and_noise(n)[1]
    return -noise * jax.vmap(jax.grad(lambda one: log_q(one, n, **kwargs)))(jnp.asarray(z))


@pytest.mark.long
@pytest.mark.parametrize("n", release_but([1, 4], STEPS))
@pytest.mark.parametrize("name, log_q", [("mixture", mixture_log_q), ("boxes", boxes_log_q)])
def test_network_is_the_scaled_score(name, log_q, n, float64):
    expected = exact_eps(log_q, Z, n)
    eps_hat = by_step(ORACLES[name].network(SCHEDULE))(jnp.asarray(Z), jnp.full(5, n))
    np.testing.assert_allclose(eps_hat, expected, rtol=1e-8, atol=1e-12)
    half = by_step(ORACLES[name].network(SCHEDULE, scale=0.5))
    np.testing.assert_allclose(half(jnp.asarray(Z), jnp.array(n)), expected / 2, rtol=1e-8, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("name", ORACLES)
def test_network_takes_any_batch_and_a_step_for_each_datum(name, float64):
    network = ORACLES[name].network(SCHEDULE)
    assert network.dim == ORACLES[name].dim == 2
    network = by_step(network)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 2)))
    n = jnp.tile(jnp.arange(1, 7, dtype=jnp.int32), (4, 1))
    together = jax.jit(lambda z, n: network(z, n))(z, n)
    for k in STEPS:
        np.testing.assert_allclose(together[:, k - 1], network(z[:, k - 1], jnp.array(k)), rtol=1e-12)


def test_shared_covariance_is_that_of_every_component(float64):
    shared = GaussianMixture(WEIGHTS, MEANS, COVARIANCES[0])
    copies = GaussianMixture(WEIGHTS, MEANS, np.stack(3 * [COVARIANCES[0]]))
    n = jnp.full(5, 3)
    z = jnp.asarray(Z)
    np.testing.assert_allclose(*(by_step(oracle.network(SCHEDULE))(z, n) for oracle in (shared, copies)), rtol=1e-12)
    np.testing.assert_allclose(shared.log_prob(Z), copies.log_prob(Z), rtol=1e-12)
    assert shared.entropy() == pytest.approx(copies.entropy(), rel=1e-12, abs=1e-12)
    draws, same = (oracle.sample(np.random.default_rng(0), 5) for oracle in (shared, copies))
    np.testing.assert_array_equal(draws, same)


@pytest.mark.long
def test_one_component_is_the_gaussian_oracle(float64):
    covariance = np.cov(np.random.default_rng(1).normal(size=(5, 9)))
    mean = np.arange(5.0) - 2
    one, gaussian = GaussianMixture([1.0], mean[None], covariance), GaussianOracle(mean, covariance)
    z, n = jnp.asarray(np.random.default_rng(2).normal(size=(6, 5))), jnp.arange(1, 7)
    np.testing.assert_allclose(*(by_step(oracle.network(SCHEDULE, 0.9))(z, n) for oracle in (one, gaussian)), rtol=1e-10)
    np.testing.assert_allclose(one.log_prob(z), gaussian.log_prob(z), rtol=1e-12)


@pytest.mark.release
@pytest.mark.parametrize("n", STEPS)
def test_checkerboard_network_is_the_scaled_score(n, float64):
    """Squares by where the points are, density by differences of Φ, the encoding by hand."""
    likelihood = probdiff.NormalLikelihood(loc=(0.3, -0.1), scale=(2.0, 2.5))
    black = 2 * np.unique(np.floor(load("checkerboard").train / 2), axis=0)
    assert len(black) == 8
    lower, upper = ((black + side - likelihood.loc) / likelihood.scale for side in (0, 2))
    network = by_step(load("checkerboard").exact_network(SCHEDULE, likelihood))
    expected = exact_eps(boxes_log_q, Z, n, lower=lower, upper=upper)
    np.testing.assert_allclose(network(jnp.asarray(Z), jnp.full(5, n)), expected, rtol=1e-8, atol=1e-12)


def known_networks(schedule):
    sets = [load(name) for name in datasets.PLANAR]
    known = {data.name: data.exact_network(schedule, data.likelihood()) for data in sets}
    known |= {name: oracle.network(schedule) for name, oracle in ORACLES.items()}
    return {name: eqx.filter_jit(by_step(network, schedule)) for name, network in known.items()}


@pytest.mark.release
@pytest.mark.parametrize("make", [probdiff.linear_schedule, probdiff.log_snr_schedule])
def test_float32_is_close_to_float64(make):
    """Where z may be, and far outside it for the first steps, at steps from the first to the last."""
    schedule = make(10_000)
    n = jnp.repeat(jnp.array([1, 2, 10, 100, 1000, 5000, 9000, 10_000]), 100)
    z = jax.random.uniform(jax.random.key(0), (len(n), 2), minval=-3, maxval=3)
    for name, network in known_networks(schedule).items():
        with jax.enable_x64(True):
            exact = np.asarray(network(z.astype(jnp.float64), n))
        # One rounding of z is 1e-7 / sqrt(1 - alpha_bar) of noise, up to 2e-5 at the first step.
        np.testing.assert_allclose(network(z, n), exact, rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.release
@pytest.mark.parametrize("schedule", [probdiff.cosine_schedule(10_000), SCHEDULE])
def test_float32_is_finite_and_right_far_outside(schedule):
    """At distances of 1e2 … 1e30, ε points away from the data; for boxes noise · ε is z, give or take a datum."""
    directions = np.array([[1, 0], [0, -1], [1, 1], [-1, 0.3]])
    z = jnp.asarray((np.geomspace(1e2, 1e30, 8)[:, None, None] * directions).reshape(-1, 1, 2), jnp.float32)
    n = jnp.array([1, 2, 3, schedule.num_steps])
    z = jnp.broadcast_to(z, (len(z), 4, 2))
    noise = np.array([signal_and_noise(k, schedule)[1] for k in n])[:, None]
    for name, network in known_networks(schedule).items():
        eps = network(z, n)
        assert np.all(np.isfinite(eps)), name
        assert np.all(jnp.sum(eps * jnp.sign(z), -1) > 0), name
        if name in ("boxes", "checkerboard"):
            np.testing.assert_allclose(noise * eps, z, rtol=1e-3, atol=2.1, err_msg=name)


@pytest.mark.long
def test_boxes_far_outside_against_the_nearest_edge(float64):
    """At 300 standard deviations of the noise from the edge, ε − edge has the mean of an exponential, 1/300."""
    schedule = probdiff.NoiseSchedule.from_betas([1e-4])
    network = by_step(UniformBoxes([[-1.0]], [[1.0]]).network(schedule), schedule)
    edge = np.array([300.0, -300.0])
    z = np.sign(edge)[:, None] * np.sqrt(1 - 1e-4) + 1e-2 * edge[:, None]
    expected = edge + np.sign(edge) * (1 / 300 - 2 / 300**3)
    np.testing.assert_allclose(network(jnp.asarray(z), jnp.array(1))[:, 0], expected, rtol=1e-10)


@pytest.mark.release
@pytest.mark.parametrize("name", long_but([*ORACLES, "moons"], [*ORACLES, *datasets.PLANAR]))
def test_prediction_is_the_conditional_mean_of_drawn_noise(name, float64):
    """The error is uncorrelated with any function of z; for a prediction 5 % too small it is correlated."""
    rng = np.random.default_rng(5)
    if name in ORACLES:
        x0, network = ORACLES[name].sample(rng, 100_000), ORACLES[name].network(SCHEDULE)
    else:
        likelihood = load(name).likelihood()
        x0, network = likelihood.encode(load(name).train), load(name).exact_network(SCHEDULE, likelihood)
    eps = rng.normal(size=x0.shape)
    signal, noise = signal_and_noise(3)
    z = signal * np.asarray(x0) + noise * eps
    eps_hat = jax.lax.map(lambda one: by_step(network)(one, 3), jnp.asarray(z), batch_size=1000)
    functions = np.concatenate([z, np.sin(2 * z), np.cos(2 * z), np.ones((len(z), 1))], -1)

    def moments(prediction):
        return np.asarray((eps - prediction)[:, :, None] * functions[:, None, :]).reshape(len(z), -1)

    assert_mean(moments(eps_hat), 0, power=0.05)
    wrong = moments(0.95 * eps_hat)
    assert np.max(np.abs(wrong.mean(0)) / wrong.std(0)) * np.sqrt(len(z)) > 2 * Z_MAX


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2,), (1, 2), (7, 2), (3, 4, 2)])
def test_log_prob(shape, float64):
    x = np.random.default_rng(0).normal(size=shape)
    components = dist.MultivariateNormal(MEANS, COVARIANCES)
    mixture = dist.MixtureSameFamily(dist.CategoricalProbs(jnp.asarray(WEIGHTS)), components)
    np.testing.assert_allclose(MIXTURE.log_prob(x), mixture.log_prob(x), rtol=1e-10)
    gaussian = dist.MultivariateNormal(MEANS[0], COVARIANCES[0])
    np.testing.assert_allclose(GAUSSIAN.log_prob(x), gaussian.log_prob(x), rtol=1e-10)
    inside = np.zeros(shape[:-1], bool)
    for low, high in zip(BOXES.lower, BOXES.upper):
        inside |= scipy.stats.uniform(low, high - low).pdf(x).prod(-1) > 0
    assert BOXES.log_prob(x).shape == shape[:-1]
    np.testing.assert_allclose(np.exp(BOXES.log_prob(x)), np.where(inside, 1 / (1.8 + 0.65 + 1.5), 0), rtol=1e-12)


def test_log_prob_of_edges_is_that_of_inside():
    np.testing.assert_allclose(BOXES.log_prob([[-2.0, -1.0], [1.0, 1.0], [2.0, 2.0]]), -np.log(3.95), rtol=1e-12)


LINE = GaussianMixture([0.3, 0.7], [[-1.0], [2.0]], [[[0.25]], [[1.5]]])


def test_entropy_on_a_line_by_adaptive_quadrature():
    def integrand(x):
        log_p = scipy.special.logsumexp(scipy.stats.norm.logpdf(x, [-1, 2], np.sqrt([0.25, 1.5])), b=[0.3, 0.7])
        return -np.exp(log_p) * log_p

    value, error = LINE.entropy()
    assert value == pytest.approx(scipy.integrate.quad(integrand, -12, 15, points=[-1, 2], epsabs=1e-11)[0], abs=1e-9)
    assert error < 1e-9


def product(first, second):
    """The mixture of independent coordinates: its entropy is the sum of the two."""
    pairs = [(i, j) for i in range(len(first.weights)) for j in range(len(second.weights))]
    weights = [first.weights[i] * second.weights[j] for i, j in pairs]
    means = [np.concatenate([first.means[i], second.means[j]]) for i, j in pairs]
    covariances = [scipy.linalg.block_diag(first.covariances[i], second.covariances[j]) for i, j in pairs]
    return GaussianMixture(weights, means, covariances)


def test_entropy_of_independent_coordinates_in_the_plane():
    other = GaussianMixture([0.6, 0.4], [[0.0], [1.0]], [[[0.3]], [[0.1]]])
    value, error = product(LINE, other).entropy()
    assert value == pytest.approx(LINE.entropy()[0] + other.entropy()[0], abs=1e-9)
    assert error < 1e-9


@pytest.mark.parametrize("oracle", [
    product(product(LINE, LINE), product(LINE, LINE)), product(LINE, GaussianMixture([1], [[0.0]], [[1e-10]]))
], ids=["four dimensions", "too narrow for the grid"])  # fmt: skip
def test_entropy_by_draws_where_no_grid_serves(oracle):
    exact = LINE.entropy()[0] * 4 if oracle.dim == 4 else LINE.entropy()[0] + np.log(2 * np.pi * np.e * 1e-10) / 2
    value, error = oracle.entropy(np.random.default_rng(0), num_samples=40_000)
    assert abs(value - exact) <= Z_MAX * error and 9.7 * error < 0.1
    with pytest.raises(ValueError, match="rng: Expected a NumPy generator, .*; got None"):
        oracle.entropy()


def test_entropy_in_closed_form():
    value, error = GAUSSIAN.entropy()
    assert value == pytest.approx(scipy.stats.multivariate_normal(MEANS[0], COVARIANCES[0]).entropy(), rel=1e-12)
    assert value == pytest.approx(GaussianMixture([1], MEANS[:1], COVARIANCES[0]).entropy()[0], abs=1e-9)
    assert error == 0 and BOXES.entropy() == pytest.approx((np.log(3.95), 0))


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("loc, scale", [(0.3, 2.0), ((0.3, -1.0), (2.0, 0.1)), ((5.0, 0.0), 0.5)])
def test_standardized_is_the_change_of_variables(name, loc, scale):
    oracle = ORACLES[name]
    moved = oracle.standardized(loc, scale)
    log_volume = np.sum(np.log(np.broadcast_to(scale, 2)))
    x = oracle.sample(np.random.default_rng(0), 50)
    expected = oracle.log_prob(x) + log_volume
    np.testing.assert_allclose(moved.log_prob((x - np.array(loc)) / scale), expected, rtol=1e-10)
    assert moved.entropy()[0] == pytest.approx(oracle.entropy()[0] - log_volume, abs=1e-8)


@pytest.mark.release
@pytest.mark.parametrize("name", ORACLES)
def test_draws_have_the_density(name):
    """Their surprise is the entropy, and their moments are the integrals over a grid."""
    oracle = ORACLES[name]
    x = oracle.sample(np.random.default_rng(1), 100_000)
    assert x.shape == (100_000, 2)
    if name != "boxes":  # where every draw has the same
        assert_mean(-oracle.log_prob(x), oracle.entropy()[0], power=0.05)
    centre = (np.arange(600) + 0.5) / 50 - 6
    grid = np.stack(np.meshgrid(centre, centre), -1).reshape(-1, 2)
    p = np.exp(oracle.log_prob(grid)) / 50**2
    assert p.sum() == pytest.approx(1, abs=1e-6)
    for power in (1, 2, 3):
        assert_mean(x**power, p @ grid**power, power=0.2 * power**2)
    assert_mean(x.prod(-1), p @ grid.prod(-1), power=0.05)
    # Draws of neighbouring rows are independent: components do not come in blocks.
    assert_mean((x[:-1, 0] - x[:, 0].mean()) * (x[1:, 0] - x[:, 0].mean()), 0, power=0.05)


@pytest.mark.long
@pytest.mark.parametrize("name", release_but(["moons"], ["moons", "checkerboard"]))
def test_bound_of_the_exact_network_is_just_below_the_log_density(name):
    data = load(name)
    schedule = probdiff.log_snr_schedule(60, 8.0, -6.0)
    x, gaps = data.test[:1000], []
    for scale in (1.0, 0.9):
        likelihood = data.likelihood()
        network = data.oracle.standardized(likelihood.loc, likelihood.scale).network(schedule, scale)
        terms = probdiff.elbo_terms(
            probdiff.Diffusion(schedule, network, likelihood, "forward"), x, key=jax.random.key(0), num_draws=2
        )
        gaps.append(data.log_prob(x) - np.asarray(terms.elbo).mean(0))
    error = gaps[0].std() / np.sqrt(len(x))
    assert -Z_MAX * error < gaps[0].mean() < 0.5
    lost = gaps[1] - gaps[0]
    assert lost.mean() > Z_MAX * lost.std() / np.sqrt(len(x))


def test_exact_network_of_what_is_not_known():
    with pytest.raises(ValueError, match="dataset: Expected a data set with a known density; got digits"):
        load("digits").exact_network(SCHEDULE, probdiff.NormalLikelihood())
    with pytest.raises(TypeError, match="likelihood: Expected a NormalLikelihood; got DiscretizedNormalLikelihood"):
        load("moons").exact_network(SCHEDULE, probdiff.DiscretizedNormalLikelihood(17))
    assert load("digits").log_prob is None


EYE, ZERO = np.eye(2), np.zeros((2, 2))
INDEFINITE, SKEW, UNKNOWN = (
    np.array([[1, 2], [2, 1]]),
    np.array([[1, 0.5], [0, 1]]),
    np.array([[1, np.nan], [np.nan, 1]]),
)
INFINITE = np.full((2, 2), np.inf)
BAD_INPUT = {
    "weights not 1-D": (GaussianMixture, ([[1.0]], ZERO, EYE), r"weights: Expected shape \(K,\); got shape \(1, 1\)"),
    "weights NaN": (GaussianMixture, ([np.nan, 1], ZERO, EYE), r"weights: .* got nan at index \[0\]"),
    "weights zero": (GaussianMixture, ([0, 1], ZERO, EYE), "weights: Expected positive numbers that sum to 1; got"),
    "weights negative": (GaussianMixture, ([-0.5, 1.5], ZERO, EYE), "weights: Expected positive numbers"),
    "weights sum": (GaussianMixture, ([0.5, 0.6], ZERO, EYE), "weights: .* whose sum is 1.1"),
    "no components": (GaussianMixture, ([], ZERO[:0], EYE), "weights: Expected positive numbers that sum to 1"),
    "means too few": (GaussianMixture, ([0.5, 0.5], ZERO[:1], EYE), r"means: Expected shape \(K, dim\), K = 2; got"),
    "means not 2-D": (GaussianMixture, ([0.5, 0.5], ZERO[0], EYE), r"means: .*got shape \(2,\)"),
    "means without dimension": (GaussianMixture, ([1], [[]], EYE), r"means: .*got shape \(1, 0\)"),
    "means infinite": (GaussianMixture, ([1], [[0, np.inf]], EYE), r"means: .*inf at index \[0, 1\]"),
    "covariances of another dim": (GaussianMixture, ([1], [[0, 0, 0]], EYE), r"covariances: .*\(1, 3, 3\) or"),
    "covariances too few": (GaussianMixture, (WEIGHTS, MEANS, COVARIANCES[:2]), r"covariances: .*shape \(2, 2, 2\)"),
    "covariances a diagonal": (GaussianMixture, (WEIGHTS, MEANS, [1, 1]), r"covariances: .*got shape \(2,\)"),
    "covariances not definite": (GaussianMixture, ([0.5, 0.5], ZERO, [EYE, INDEFINITE]), r"covariances\[1\]: .*def"),
    "covariances not symmetric": (GaussianMixture, ([0.5, 0.5], ZERO, SKEW), r"covariances\[0\]: .*positive definite"),
    "covariances NaN": (GaussianMixture, ([0.5, 0.5], ZERO, UNKNOWN), r"covariances\[0\]: .*nan at index \[0, 1\]"),
    "covariance not definite": (GaussianOracle, ([0, 0], -EYE), "covariance: Expected a positive definite matrix"),
    "covariance infinite": (GaussianOracle, ([0, 0], INFINITE), "covariance: Expected finite values"),
    "boxes not 2-D": (UniformBoxes, ([0, 0], [1, 1]), r"lower: Expected shape \(K, dim\); got shape \(2,\)"),
    "no boxes": (UniformBoxes, (ZERO[:0], ZERO[:0]), r"lower: .*got shape \(0, 2\)"),
    "boxes of two shapes": (UniformBoxes, ([[0, 0]], [[1]]), r"upper: Expected shape \(1, 2\); got shape \(1, 1\)"),
    "boxes NaN": (UniformBoxes, ([[0, 0]], [[1, np.nan]]), r"upper: .*nan at index \[0, 1\]"),
    "boxes empty": (UniformBoxes, ([[0, 1]], [[1, 1]]), "upper: Expected numbers above lower"),
    "boxes overlap": (UniformBoxes, (ZERO + [[0], [0.5]], ZERO + [[1], [2]]), r"an overlap of boxes \[\[0 1\]\]"),
    "scale zero": (MIXTURE.standardized, (0.0, 0.0), "scale: Expected positive numbers"),
    "loc NaN": (GAUSSIAN.standardized, (np.nan, 1.0), "loc: Expected finite values"),
    "loc of another dim": (BOXES.standardized, ((0.0, 0.0, 0.0), 1.0), "3 dimensions, as the likelihood's loc has"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    make, arguments, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        make(*arguments)
