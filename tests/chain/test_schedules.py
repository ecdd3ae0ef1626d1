"""Tables against the definition, at every N; a bug in one table is a wrong likelihood everywhere."""

import jax.numpy as jnp
import numpy as np
import pytest

import probdiff
from probdiff.chain.schedules import at_step

CONSTRUCTORS = [probdiff.linear_schedule, probdiff.cosine_schedule, probdiff.log_snr_schedule]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 100, 1000, 10_000])
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_tables_follow_from_beta(constructor, num_steps):
    schedule = constructor(num_steps)
    beta = schedule.beta
    assert beta.shape == (num_steps,) and np.all((beta > 0) & (beta < 1))
    alpha_bar = np.array([np.exp(np.sum(np.log1p(-beta[:n]))) for n in range(1, num_steps + 1)])
    np.testing.assert_allclose(schedule.alpha, 1 - beta, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha_bar, alpha_bar, rtol=1e-10)
    np.testing.assert_allclose(schedule.one_minus_alpha_bar, 1 - alpha_bar, rtol=1e-10)
    np.testing.assert_allclose(schedule.log_snr, np.log(alpha_bar / (1 - alpha_bar)), rtol=1e-9, atol=1e-11)
    # Bayes' rule on precisions, a route of its own: 1/variance = alpha/beta + 1/(1 - alpha_bar_{n-1}).
    precision = schedule.alpha[1:] / beta[1:] + 1 / (1 - alpha_bar[:-1])
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision, rtol=1e-10)
    assert schedule.posterior_variance[0] == 0


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_float32_copies(constructor):
    schedule = constructor(10_000)
    for name in ("beta", "alpha", "alpha_bar", "one_minus_alpha_bar", "posterior_variance"):
        table = getattr(schedule, name)
        copy = at_step(table, jnp.arange(1, 10_001), jnp.float32)
        np.testing.assert_allclose(copy, table, rtol=1e-6)


def test_published_values():
    linear, cosine = probdiff.linear_schedule(1000), probdiff.cosine_schedule(1000)
    np.testing.assert_allclose(linear.beta, np.linspace(1e-4, 0.02, 1000), rtol=1e-12)
    assert np.sqrt(linear.alpha_bar[-1]) == pytest.approx(0.0063, abs=1e-4)
    assert np.sqrt(cosine.alpha_bar[-1]) == pytest.approx(4.9e-5, abs=1e-6)
    log_snr = probdiff.log_snr_schedule(50, log_snr_max=9.0, log_snr_min=-7.0).log_snr
    np.testing.assert_allclose(log_snr, np.linspace(9, -7, 50), atol=1e-10)


def test_linear_ends_equally_noisy_at_any_length():
    final = [probdiff.linear_schedule(n).log_snr[-1] for n in (10, 100, 1000, 10_000)]
    np.testing.assert_allclose(final, final[2], atol=0.02)


def test_schedule_is_an_immutable_value():
    a, b = probdiff.cosine_schedule(10), probdiff.cosine_schedule(10)
    assert a == b and hash(a) == hash(b) and a != probdiff.cosine_schedule(11)
    with pytest.raises(ValueError, match="read-only"):
        a.beta[0] = 0.5
    given = np.full(3, 0.1)
    schedule = probdiff.NoiseSchedule.from_betas(given)
    given[0] = 0.9
    assert schedule.beta[0] == 0.1


def test_a_step_outside_the_chain_is_nan_when_it_shows_only_at_run_time():
    table = at_step(probdiff.cosine_schedule(3).beta, jnp.array([0, 1, 3, 4]), jnp.float32)
    assert np.isnan(table).tolist() == [True, False, False, True]
