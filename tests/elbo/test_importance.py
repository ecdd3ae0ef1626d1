"""Tighter bounds: against the exact log-likelihood, NumPyro's own, and from both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Z_MAX, assert_mean, long_but
from numpyro.infer import RenyiELBO

import probdiff
from probdiff.elbo import importance
from probdiff.elbo.importance import Sandwich
from probdiff.oracles import GaussianOracle, exact_log_prob, exact_terms

ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
SCHEDULE = probdiff.log_snr_schedule(8, 4.0, -1.0)
X = np.array([[0.1, -0.2], [1.5, 0.4], [-0.7, -1.0]])


def make(scale=0.9, **kwargs):
    return probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, scale), **kwargs)


@pytest.mark.release
@pytest.mark.parametrize("scale", [0.9])
def test_the_sandwich(scale, float64):
    """ELBO <= IWAE-10 <= IWAE-100 <= exact log p <= upper bounds, each step paired on the same x and beyond its error."""
    diffusion = make(scale)
    bounds = probdiff.sandwich(diffusion, key=jax.random.key(0), num_data=20_000)
    exact = exact_log_prob(diffusion, bounds.x)
    upper = [bounds.upper[k] for k in (100, 10, 1)]
    rows = [bounds.lower[1], bounds.lower[10], bounds.lower[100], exact, *upper]
    for lower, higher in zip(rows, rows[1:]):
        step = higher - lower
        assert step.mean() > Z_MAX * step.std() / np.sqrt(len(step))
    # The lowest of all is the closed form's.
    assert_mean(bounds.lower[1] - exact_terms(diffusion, bounds.x)["elbo"], 0.0, power=0.2)
    text = str(bounds)
    assert text.index("lower, K = 1 ") < text.index("lower, K = 100") < text.index("upper, K = 100") < text.index("upper, K = 1 ")


@pytest.mark.long
def test_the_upper_bound_is_exact_where_the_guide_is(float64):
    """N(0, I) data and v_n = beta_n: the reverse chain is the posterior, every weight is p(x), on both sides."""
    schedule = probdiff.log_snr_schedule(5, 3.0, -2.0)
    oracle = GaussianOracle([0.0], [[1.0]])
    diffusion = probdiff.Diffusion(schedule, oracle.network(schedule), reverse_variance="forward")
    bounds = probdiff.sandwich(diffusion, key=jax.random.key(0), num_data=50, num_particles=(1, 3))
    for values in (*bounds.lower.values(), *bounds.upper.values()):
        np.testing.assert_allclose(values, exact_log_prob(diffusion, bounds.x), rtol=1e-9)
    assert np.all(probdiff.pareto_khat(probdiff.elbo.path_elbo(diffusion, bounds.x, key=jax.random.key(1), num_draws=50)) == -np.inf)


@pytest.mark.long
def test_data_on_a_grid(float64):
    """Both bounds close in on minus the entropy of what was drawn."""
    schedule = probdiff.log_snr_schedule(4, 3.0, -2.0)
    diffusion = probdiff.Diffusion(schedule, lambda z, n: 0.7 * z, probdiff.DiscretizedNormalLikelihood(3), dim=1)
    bounds = probdiff.sandwich(diffusion, key=jax.random.key(0), num_data=2_000, num_particles=(1, 400))
    x = np.asarray(bounds.x)[:, 0]
    assert set(np.unique(x)) == {0, 1, 2}
    frequency = np.bincount(x) / len(x)
    entropy = -(frequency * np.log(frequency)).sum()
    error = np.array([values.std() for values in (bounds.lower[400], bounds.upper[400])]).max() / np.sqrt(len(x))
    assert bounds.lower[400].mean() - 3 * error < -entropy < bounds.upper[400].mean() + 3 * error
    assert bounds.upper[400].mean() - bounds.lower[400].mean() < 0.3


@pytest.mark.long
@pytest.mark.parametrize("num_particles", long_but([7], [1, 7]))
def test_iwae_agrees_with_renyi_elbo(num_particles, float64):
    diffusion = make()
    ours = probdiff.iwae(diffusion, X, key=jax.random.key(0), num_particles=num_particles, num_draws=4000)
    assert ours.shape == (4000, 3)

    def renyi(key, x):
        elbo = RenyiELBO(alpha=0.0, num_particles=num_particles)
        return -elbo.loss(key, {}, diffusion.model, diffusion.guide, x[None])

    keys = jax.random.split(jax.random.key(1), (4000, 3))
    theirs = np.asarray(jax.jit(jax.vmap(jax.vmap(renyi), (0, None)))(keys, jnp.asarray(X)))
    assert_mean(ours - theirs, 0.0, power=0.6)
    if num_particles > 1:
        assert np.all(ours.mean(0) > exact_terms(diffusion, X)["elbo"] + 0.2)


@pytest.mark.long
def test_iwae_groups_its_paths(float64):
    """Draw s is the log mean of the weights of its own paths, not of anybody else's."""
    diffusion = make()
    weights = probdiff.elbo.path_elbo(diffusion, X, key=jax.random.key(0), num_draws=6)
    values = probdiff.iwae(diffusion, X, key=jax.random.key(0), num_particles=3, num_draws=2)
    np.testing.assert_allclose(values[1], np.log(np.exp(weights[3:]).mean(0)), rtol=1e-12)


def test_the_upper_bound_of_k_paths_has_one_from_the_model_and_k_minus_one_of_the_lower_bound(float64):
    """Weights add up: K exp(upper K) = exp(upper 1) + (K − 1) exp(lower K − 1), and the lower bounds share theirs."""
    bounds = probdiff.sandwich(make(), key=jax.random.key(2), num_data=6, num_particles=(1, 2, 3, 7, 8))
    lower, upper = ({k: np.exp(values) for k, values in each.items()} for each in (bounds.lower, bounds.upper))
    for k in (2, 3, 8):
        np.testing.assert_allclose(k * upper[k], upper[1] + (k - 1) * lower[k - 1], rtol=1e-9)
        assert np.all(k * lower[k] > (k - 1) * lower[k - 1])
    assert len(np.unique(np.concatenate([lower[1], upper[1]]))) == 12


def test_the_sandwich_prints_errors_and_paired_distances():
    """Of bounds that move together, their distance is known better than either."""
    rng = np.random.default_rng(0)
    levels = 5 * rng.standard_normal(40)
    rows = [levels + shift + 0.3 * rng.standard_normal(40) for shift in (0.0, 1.0, 2.5, 4.5)]
    lines = str(Sandwich(levels[:, None], {10: rows[1], 1: rows[0]}, {1: rows[3], 10: rows[2]})).splitlines()
    assert lines[0].startswith("40 data")
    names = ["lower, K = 1 ", "lower, K = 10 ", "upper, K = 10 ", "upper, K = 1 "]
    for i, (name, line) in enumerate(zip(names, lines[1:], strict=True)):
        numbers = [float(word) for word in line[len(name) :].split() if word not in "±+"]
        shown = [rows[i]] if i == 0 else [rows[i], rows[i] - rows[i - 1]]
        expected = [part for each in shown for part in (each.mean(), each.std(ddof=1) / np.sqrt(40))]
        assert line.startswith(name) and numbers == pytest.approx(expected, abs=1e-4)


def test_what_is_not_usable_is_refused():
    diffusion = make()
    for options, message in [
        ({"num_particles": 0}, "num_particles: Expected a positive integer; got 0"),
        ({"num_particles": 2, "num_draws": 1.5}, "num_draws: Expected a positive integer; got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            probdiff.iwae(diffusion, X.astype(np.float32), key=jax.random.key(0), **options)
    with pytest.raises(ValueError, match="num_data: Expected a positive integer; got 0"):
        probdiff.sandwich(diffusion, key=jax.random.key(0), num_data=0)
    with pytest.raises(ValueError, match="num_particles: Expected at least one number; got none"):
        probdiff.sandwich(diffusion, key=jax.random.key(0), num_data=3, num_particles=())
    with pytest.raises(ValueError, match="num_data: Expected at least 2"):
        probdiff.sandwich(diffusion, key=jax.random.key(0), num_data=1, num_particles=5)
    with pytest.raises(ValueError, match=r"log_weights: Expected shape \(draw, datum\)"):
        probdiff.pareto_khat(np.zeros(50))
    with pytest.raises(ValueError, match="num_particles: Expected a positive integer; got 0"):
        probdiff.sandwich(diffusion, key=jax.random.key(0), num_data=3, num_particles=(0,))
    with pytest.raises(TypeError, match="diffusion: Expected a Diffusion; got int"):
        probdiff.iwae(3, X, key=jax.random.key(0), num_particles=2)


def test_khat_recovers_a_pareto_tail():
    """Weights u^(-k) have a Pareto tail of shape k; PSIS takes the negated log weights, which is easily got wrong."""
    uniform = np.random.default_rng(0).random((20_000, 20))
    for k in (0.3, 0.7):
        # 424 weights make up the tail: the standard error of each estimate is (1 + k) / sqrt(424).
        assert probdiff.pareto_khat(-k * np.log(uniform)).mean() == pytest.approx(k, abs=4.9 * (1 + k) / np.sqrt(20 * 424))


def test_the_limit_of_khat_and_its_own_error():
    """0.7 from 2155 draws on, less before; the error is the spread of a fit's k̂ over repetitions."""
    assert [round(importance.khat_limit(count), 4) for count in (48, 2154, 2155, 10**6)] == [0.4052, 0.7, 0.7, 0.7]
    assert importance.khat_limit(2154) < 0.7
    log_weights = 0.5 * np.random.default_rng(0).standard_exponential((2000, 400))  # of Pareto weights, k = ½
    found = probdiff.pareto_khat(log_weights)
    assert found.std() == pytest.approx(importance.khat_error(0.5, 2000), rel=0.15)
