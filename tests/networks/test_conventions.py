"""Networks of other conventions: exact ones of a known distribution, written as each would have it; and whole models against NumPy."""


import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_ndtr, ndtr

import probdiff

S2 = 0.3**2  # the variance of the data, which are N(0, S2)
SCHEDULE = probdiff.chain.edm_schedule(8, 0.02, 10.0)
Z = np.random.default_rng(0).normal(size=(8, 2))
N = np.arange(1, 9)


def exact(schedule):
    """The noise in z_n = √ᾱ_n x_0 + √(1−ᾱ_n) ε, by regression."""
    variance = schedule.alpha_bar * S2 + schedule.one_minus_alpha_bar
    return Z * (schedule.noise_scale / variance)[:, None]


def denoiser(x, sigma):
    """D(x; σ) of x = x_0 + σ ε."""
    return x * (S2 / (S2 + sigma**2))[..., None]


def inside_of_edm(scaled, c_noise, sigma_data=0.5):
    """F = (D(x; σ) − c_skip x)/c_out of table 1, with x = scaled/c_in."""
    sigma = jnp.exp(4 * c_noise)
    total = sigma**2 + sigma_data**2
    x = scaled * jnp.sqrt(total)[..., None]
    c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / jnp.sqrt(total)
    return (denoiser(x, sigma) - c_skip[..., None] * x) / c_out[..., None]


def of_vdm(z, gamma):
    """The noise in z = α x_0 + σ ε with σ² = sigmoid(γ) and α² = sigmoid(−γ)."""
    sigma2 = 1 / (1 + jnp.exp(-gamma))
    return z * (jnp.sqrt(sigma2) / ((1 - sigma2) * S2 + sigma2))[..., None]


ADAPTED = {
    "denoiser": lambda: probdiff.networks.from_denoiser(denoiser),
    "edm": lambda: probdiff.networks.from_edm(inside_of_edm),
    "edm, another sigma_data": lambda: probdiff.networks.from_edm(lambda x, c: inside_of_edm(x, c, 0.2), 0.2),
    "vdm": lambda: probdiff.networks.from_vdm(of_vdm),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_the_noise_that_the_exact_network_predicts(name, float64):
    model = probdiff.Diffusion(SCHEDULE, ADAPTED[name](), dim=2)
    np.testing.assert_allclose(model.predict_noise(Z, N), exact(SCHEDULE), rtol=1e-9)
    assert not model.is_told_step
    np.testing.assert_allclose(model.predict_noise_at(Z, SCHEDULE.log_snr), exact(SCHEDULE), rtol=1e-9)


def test_edm_loses_no_digits_where_there_is_little_noise():
    """In float32, relative to the noise: a denoiser does."""
    model = probdiff.Diffusion(SCHEDULE, ADAPTED["edm, another sigma_data"](), dim=2)
    z = Z.astype(np.float32)
    scaled = probdiff.networks.from_edm(lambda x, c_noise: 0 * x, 0.3)  # the exact one for this sigma_data
    found = probdiff.Diffusion(SCHEDULE, scaled, dim=2).predict_noise(z, N)
    np.testing.assert_allclose(found, exact(SCHEDULE), rtol=1e-5)
    np.testing.assert_allclose(model.predict_noise(z, N), exact(SCHEDULE), rtol=1e-3)


def test_timesteps():
    """0 … N − 1, or as given; a step beyond them is NaN; others are passed on by name."""
    told = lambda z, t, *, context: t[..., None] * z + context  # noqa: E731
    z, context = jnp.ones((3, 1)), jnp.array([[10.0], [20.0], [30.0]])
    schedule = probdiff.cosine_schedule(4)
    for timesteps, expected in ((None, [0, 1, 3]), ([0, 250, 500, 750], [0, 250, 750]), ([0.5, 1.5, 2.5, 3.5], [0.5, 1.5, 3.5]), ([7, 8], [7, 8, np.nan])):
        model = probdiff.Diffusion(schedule, probdiff.networks.from_timesteps(told, timesteps), dim=1)
        assert model.is_told_step and model.is_conditional
        found = model.given(context).predict_noise(z, jnp.array([1, 2, 4]))[:, 0] - context[:, 0]
        np.testing.assert_allclose(found, expected)
    with pytest.raises(ValueError, match="network: Expected an AbstractNetwork, to be asked between steps"):
        probdiff.networks.from_timesteps(lambda z, t: z)(z, jnp.zeros(3))
    layer = eqx.nn.Linear(1, 1, key=jax.random.key(0))
    trained = probdiff.Diffusion(schedule, probdiff.networks.from_timesteps(jax.tree_util.Partial(lambda layer, z, t: z * layer.weight[0], layer), range(4)))
    assert [leaf.shape for leaf in jax.tree.leaves(trained.trainable())] == [(1, 1), (1,)]


def test_clipping(float64):
    """The mean of the reverse step has the clipped x̂_0 in it; inside of the range the prediction is untouched, bit by bit."""
    eps_hat = np.random.default_rng(1).normal(size=Z.shape)
    plain = lambda z, n: jnp.asarray(eps_hat)[n - 1]  # noqa: E731
    free, model = (probdiff.Diffusion(SCHEDULE, network, dim=2) for network in (plain, probdiff.networks.ClipHead(plain, 0.7)))
    x0 = (Z - SCHEDULE.noise_scale[:, None] * eps_hat) / SCHEDULE.signal_scale[:, None]
    outside = np.abs(x0) > 0.7
    assert outside.any() and not outside.all()
    found = np.asarray(model.predict_noise(Z, N))
    np.testing.assert_array_equal(found[~outside], eps_hat[~outside])
    later = N[1:]
    expected = probdiff.forward_posterior(SCHEDULE, Z[1:], np.clip(x0, -0.7, 0.7)[1:], later)
    np.testing.assert_allclose(model.reverse_kernel(Z[1:], later).mean, expected.mean, rtol=1e-9)
    assert np.abs(free.reverse_kernel(Z[1:], later).mean - expected.mean).max() > 0.1


# What diffusers' DDPMScheduler does in a step, by prediction type: the data that are predicted.
PREDICTED = {
    "epsilon": lambda z, output, a: (z - np.sqrt(1 - a) * output) / np.sqrt(a),
    "sample": lambda z, output, a: output,
    "v_prediction": lambda z, output, a: np.sqrt(a) * z - np.sqrt(1 - a) * output,
}
CONFIG = {"num_train_timesteps": 8, "beta_schedule": "linear", "beta_start": 0.02, "beta_end": 0.3, "thresholding": False}


@pytest.mark.parametrize("prediction, clip, variance", [
    ("epsilon", False, "fixed_small"), ("sample", True, "fixed_large"), ("v_prediction", True, "learned_range"), ("v_prediction", False, "fixed_small_log"),
])  # fmt: skip
def test_a_step_is_that_of_diffusers(prediction, clip, variance, float64):
    """Mean and variance at every step, from x̂_0 and its coefficients, written with their t."""
    config = CONFIG | {"prediction_type": prediction, "clip_sample": clip, "clip_sample_range": 0.5, "variance_type": variance}

    def network(z, t):
        output = jnp.sin(3 * z + t[..., None])
        return jnp.concatenate([output, jnp.cos(z)], -1) if variance == "learned_range" else output

    model = probdiff.presets.from_diffusers(network, config, dim=2)
    alphas_cumprod = np.cumprod(1 - np.linspace(0.02, 0.3, 8))
    for t in range(8):
        a, before = alphas_cumprod[t], alphas_cumprod[t - 1] if t else 1.0
        beta = 1 - a / before
        x0 = PREDICTED[prediction](Z, np.sin(3 * Z + t), a)
        x0 = np.clip(x0, -0.5, 0.5) if clip else x0
        mean = np.sqrt(before) * beta / (1 - a) * x0 + np.sqrt(1 - beta) * (1 - before) / (1 - a) * Z
        step = model.reverse_kernel(Z, t + 1)
        np.testing.assert_allclose(step.mean, mean, rtol=1e-9, atol=1e-12)
        if t:
            small, share = (1 - before) / (1 - a) * beta, (np.cos(Z) + 1) / 2
            expected = {"fixed_small": small, "fixed_small_log": small, "fixed_large": beta, "learned_range": np.exp(share * np.log(beta) + (1 - share) * np.log(small))}
            np.testing.assert_allclose(step.variance, np.broadcast_to(expected[variance], Z.shape), rtol=1e-9)


def bits_per_dim_of_improved_diffusion(network, betas, x, noise):
    """calc_bpd_loop of a network of ``learn_sigma``, written anew: bits per dimension of the prior, of t = N − 1 … 1 and of the decoder.

    x_0 is x in [−1, 1]; t = 0 … N − 1; the network gives ε̂ and v at (x_t, t); x̂_0 is clipped to [−1, 1]; at t = 0 the log-variance is between that of t = 1 and
    log β, as the posterior's is clipped. Sources: Nichol and Dhariwal (2021), arXiv:2102.09672, eqs. 4 to 8, 10, 11 and 15; the decoder, Ho et al.
    (2020), arXiv:2006.11239, eq. 13. (Their code has an approximation of the normal distribution function, here it is exact.)
    """
    alpha_bar = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    posterior = betas * (1 - before) / (1 - alpha_bar)
    least = np.log(np.append(posterior[1], posterior[1:]))
    x_start, width = x / 127.5 - 1, 1 / 255
    terms = []
    for t in range(len(betas)):
        x_t = np.sqrt(alpha_bar[t]) * x_start + np.sqrt(1 - alpha_bar[t]) * noise[t]
        eps, v = network(x_t, t)
        fraction = (v + 1) / 2
        log_variance = fraction * np.log(betas[t]) + (1 - fraction) * least[t]
        x_hat = np.clip(x_t / np.sqrt(alpha_bar[t]) - np.sqrt(1 / alpha_bar[t] - 1) * eps, -1, 1)
        from_start, from_t = betas[t] * np.sqrt(before[t]) / (1 - alpha_bar[t]), (1 - before[t]) * np.sqrt(1 - betas[t]) / (1 - alpha_bar[t])
        mean, true_mean = from_start * x_hat + from_t * x_t, from_start * x_start + from_t * x_t
        if t:
            kl = 0.5 * (log_variance - least[t] - 1 + np.exp(least[t] - log_variance) + (true_mean - mean) ** 2 * np.exp(-log_variance))
        else:
            upper, lower = ((x_start + sign * width - mean) / np.exp(log_variance / 2) for sign in (1, -1))
            inside = np.log(ndtr(upper) - ndtr(lower))
            kl = -np.where(x == 0, log_ndtr(upper), np.where(x == 255, log_ndtr(-lower), inside))
        terms.append(kl.mean(-1) / np.log(2))
    last_mean, last_variance = np.sqrt(alpha_bar[-1]) * x_start, 1 - alpha_bar[-1]
    prior = 0.5 * (last_mean**2 + last_variance - 1 - np.log(last_variance)).mean(-1) / np.log(2)
    return prior, np.array(terms)


@pytest.mark.long
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_bits_per_dim_are_those_of_improved_diffusion(name, float64):
    schedule = probdiff.chain.improved_diffusion_schedule(name, 30)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (4, 3))
    x[0] = [0, 255, 128]
    noise = rng.normal(size=(2, 30, 4, 3))

    def second(z, t, xp):
        return 1.3 * xp.sin(z[..., ::-1] + t)

    def network(z, t):
        t = t[..., None]
        # (Near enough to the noise for the decoder to be far from the limits of float64.)
        return jnp.concatenate([0.9 * z - 0.1 * jnp.cos(z + t), second(z, t, jnp)], -1)

    model = probdiff.Diffusion(
        schedule,
        probdiff.networks.VarianceHead(probdiff.networks.ClipHead(probdiff.networks.from_timesteps(network))),
        probdiff.DiscretizedNormalLikelihood(256),
        reverse_variance="predicted",
    )
    terms = probdiff.elbo_terms(model, x, noise=noise)
    bits = probdiff.elbo.bits_per_dim
    for draw in range(2):
        prior, each = bits_per_dim_of_improved_diffusion(lambda z, t: (0.9 * z - 0.1 * np.cos(z + t), second(z, t, np)), schedule.beta, x, noise[draw])
        assert np.isfinite(each).all()
        np.testing.assert_allclose(-bits(terms.prior_kl, 3), prior, rtol=1e-9)
        np.testing.assert_allclose(-bits(terms.step_kl[draw], 3), each[1:], rtol=1e-9)
        np.testing.assert_allclose(bits(terms.reconstruction[draw], 3), each[0], rtol=1e-9)
        np.testing.assert_allclose(bits(terms.elbo[draw], 3), prior + each.sum(0), rtol=1e-9)
