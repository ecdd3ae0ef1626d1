"""The bound of a data set from random steps."""

import jax
import numpy as np
import pytest

import probdiff
from probdiff.elbo import data_set_elbo, random_steps
from probdiff.oracles.closed_form import exact_terms
from probdiff.oracles.distributions import GaussianOracle

ORACLE = GaussianOracle(np.zeros(3), np.diag([1.0, 0.5, 2.0]))
SIZE = 50
X = ORACLE.sample(np.random.default_rng(0), SIZE).astype(np.float32)
SCHEDULE = probdiff.log_snr_schedule(256, 6.0, -3.0)
MODEL = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.7), dim=3, reverse_variance="forward")
EXACT = exact_terms(MODEL, X)


@pytest.fixture(scope="module")
def found():
    return [data_set_elbo(MODEL, X, key=jax.random.key(seed), noise_share=0.05) for seed in range(40)]


def test_the_bound_of_every_datum_is_unbiased(found):
    """Datum by datum, so that a bound that went to another datum is seen; and each part of it."""
    for name in ("elbo", "reconstruction", "step_kl"):
        expected = EXACT[name].sum(0) if name == "step_kl" else EXACT[name]
        runs = np.array([getattr(each, name) for each in found])
        z = (runs.mean(0) - expected) / (runs.std(0, ddof=1) / np.sqrt(len(runs)))
        assert np.abs(z).max() < 4.9 and abs(z.mean()) < 4.9 / np.sqrt(SIZE), name
    np.testing.assert_allclose(found[0].prior_kl, EXACT["prior_kl"], rtol=1e-4)


def test_the_monte_carlo_error_is_that_of_the_mean_of_all_draws(found):
    means = np.array([each.estimate.mean for each in found])
    errors = np.array([each.estimate.monte_carlo_error for each in found])
    z = (means - EXACT["elbo"].mean()) / errors
    # (A little too large an error is what is said of it.)
    assert 0.3 < np.square(z).mean() < 1.5 and abs(z.mean()) < 4.9 / np.sqrt(40)
    noise = np.array([each.elbo for each in found]).var(0, ddof=1).mean()
    error = np.sqrt((EXACT["elbo"].var(ddof=1) + noise) / SIZE)
    assert np.mean([each.estimate.error for each in found]) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_the_noise_is_the_share_that_was_asked_for_and_no_finer_than_it_must_be(share):
    found = data_set_elbo(MODEL, X, key=jax.random.key(99), noise_share=share)
    draws, size = found.draws.shape
    assert size == SIZE and found.num_evaluations == draws * (random_steps.STEPS + random_steps.RECONSTRUCTIONS) <= 9 * 32
    assert share / 3 < found.estimate.monte_carlo_error / found.estimate.error < 1.2 * share


def test_many_data_have_a_few_evaluations_each():
    """A round of the largest draws would be finer than it must be: the draws are smaller, and still two, so that there is an error."""
    x = ORACLE.sample(np.random.default_rng(1), 3000).astype(np.float32)
    exact = exact_terms(MODEL, x)["elbo"].mean()
    found = [data_set_elbo(MODEL, x, key=jax.random.key(seed), noise_share=3.0) for seed in range(10)]
    draws, _ = found[0].draws.shape
    most = draws * (random_steps.STEPS + random_steps.RECONSTRUCTIONS)
    assert draws == random_steps.DRAWS and all(each.num_evaluations <= most / 4 for each in found)
    z = np.array([(each.estimate.mean - exact) / each.estimate.monte_carlo_error for each in found])
    assert abs(z.mean()) < 4.9 / np.sqrt(10) and 0.2 < np.square(z).mean() < 2.5, z
    squares = np.array([(each.estimate.monte_carlo_error**2, each.estimate.error**2) for each in found]).mean(0)
    assert 0.7 < np.sqrt(squares[0] / (squares[1] - squares[0])) < 1.2 * 3  # 0.4 with the most evaluations: it makes the few that it reports
    few = data_set_elbo(MODEL, x[:100], key=jax.random.key(0), noise_share=3.0)
    assert few.num_evaluations >= most


@pytest.mark.parametrize("rounds, expected", [(0.26, (32, 4)), (0.25, (16, 2)), (0.07, (16, 2)), (1 / 16, (8, 1)), (0.0, (1, 1)), (3.0, (32, 4))])
def test_a_draw_is_halved_while_four_times_the_variance_is_little_enough(rounds, expected):
    """Where the terms of a datum change slowly with the step, half as many steps, spread evenly, have four times the variance."""
    assert random_steps._smaller((32, 4), rounds, 10**6) == expected


@pytest.mark.long
def test_data_in_blocks_of_which_the_last_is_filled(constant):
    constant("DATA_AT_ONCE", 17)
    found = [data_set_elbo(MODEL, X, key=jax.random.key(seed), noise_share=0.05) for seed in range(8)]
    runs = np.array([each.elbo for each in found])
    z = (runs.mean(0) - EXACT["elbo"]) / (runs.std(0, ddof=1) / np.sqrt(len(runs)))
    assert runs.shape == (8, SIZE) and np.abs(z).max() < 12  # of Student's t with 7 degrees of freedom
    np.testing.assert_allclose(found[0].prior_kl, EXACT["prior_kl"], rtol=1e-4)


@pytest.mark.parametrize("weight, drawn", [((0.0, 2.0, 1.0), (1, 2)), ((3.0, 0.0, 0.0), (0,)), ((0.0, 0.0, 0.0), (0, 1, 2))])
def test_a_step_without_a_term_is_not_drawn_and_has_no_control_variate(weight, drawn):
    learner = probdiff.elbo.steps.Learner(probdiff.log_snr_schedule(3, 3.0, -3.0), weight, True)
    seen = np.array([1, 2, 3]), np.full(3, 3.0), np.array([0.5, 1.0, 2.0]), np.array([0.4, 1.5, 1.0]), np.ones(3)
    for state in (learner.initial(), learner.updated(learner.initial(), *map(jax.numpy.asarray, seen))):
        probability = np.asarray(learner.probability(state, "value", learner.coefficient(state)))
        np.testing.assert_array_equal(np.flatnonzero(probability), drawn)
        assert probability.sum() == pytest.approx(1, abs=1e-6)
        np.testing.assert_array_equal(np.asarray(learner.coefficient(state)) != 0, np.asarray(weight) > 0)
