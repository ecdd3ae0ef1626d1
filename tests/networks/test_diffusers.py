"""A UNet of diffusers with random weights and its DDPMScheduler: step by step the reverse chain of ``presets.from_diffusers``.

Needs torch and diffusers, which the extra ``frameworks`` has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import release_but

import probdiff

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

STEPS, SIZE = 20, 8
SHAPE = (1, SIZE, SIZE)
DIM = SIZE * SIZE


def unet(outputs, dtype):
    """A small UNet; its last layer, which diffusers makes so that outputs are of order 1, is as it is drawn."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"), "block_out_channels": (8, 16)}
    module = diffusers.UNet2DModel(sample_size=SIZE, in_channels=1, out_channels=outputs, layers_per_block=1, norm_num_groups=4, **blocks)
    return module.to(dtype).eval()


def asked(module, z, t):
    """The output for z of shape (batch, dim) as NumPy arrays, flattened with the channel first."""
    with torch.no_grad():
        out = module(torch.as_tensor(z).reshape(-1, *SHAPE), torch.as_tensor(t)).sample
    return out.reshape(len(z), -1).numpy()


def network_of(module):
    """The module as a network told a timestep."""
    return probdiff.networks.from_torch(module, lambda module, z, t: module(z.reshape(-1, *SHAPE), t).sample.flatten(1))


def scheduler(**options):
    return diffusers.DDPMScheduler(num_train_timesteps=STEPS, beta_end=0.3, **options)


CASES = {
    "epsilon": {"clip_sample": False},
    "as it comes": {},  # clipped
    "v, large": {"prediction_type": "v_prediction", "variance_type": "fixed_large", "beta_schedule": "scaled_linear"},
    "sample, cosine": {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 0.4},
    "learned range": {"variance_type": "learned_range", "beta_schedule": "sigmoid"},
    "learned range of v": {"variance_type": "learned_range", "prediction_type": "v_prediction", "clip_sample": False},
}


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_betas(name):
    own = diffusers.DDPMScheduler(beta_schedule=name)
    found = probdiff.chain.diffusers_schedule(own)
    np.testing.assert_allclose(found.beta, own.betas.numpy(), rtol=2e-4, atol=2e-7)
    np.testing.assert_allclose(found.alpha_bar, own.alphas_cumprod.numpy(), rtol=1e-3)


def steps(name, dtype):
    """(ours, theirs) at every step, from common noise; their tables are ours in float64."""
    theirs = scheduler(**CASES[name])
    module = unet(2 if theirs.config.variance_type == "learned_range" else 1, dtype)
    model = probdiff.presets.from_diffusers(network_of(module), theirs, dim=DIM)
    if dtype == torch.float64:
        theirs.alphas_cumprod, theirs.one = torch.as_tensor(model.schedule.alpha_bar.copy()), torch.ones((), dtype=dtype)

    @jax.jit
    def step(z, noise, n):
        kernel = model.reverse_kernel(z, n)
        return kernel.mean + jnp.where(n > 1, jnp.sqrt(kernel.variance), 0) * noise

    for t in range(STEPS):
        z = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(100 + t), dtype=dtype)
        output = torch.as_tensor(asked(module, z.reshape(2, DIM).numpy(), np.full(2, t))).reshape(2, -1, SIZE, SIZE)
        after = theirs.step(output, t, z, generator=torch.Generator().manual_seed(t)).prev_sample.reshape(2, DIM).numpy()
        noise = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(t), dtype=dtype).reshape(2, DIM).numpy()
        yield step(z.reshape(2, DIM).numpy(), noise, t + 1), after


@pytest.mark.parametrize("name", release_but(["as it comes", "learned range"], CASES))
def test_every_step_is_the_schedulers(name, float64):
    for ours, theirs in steps(name, torch.float64):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", release_but(["as it comes"], ["as it comes", "learned range of v"]))
def test_every_step_is_the_schedulers_in_single_precision(name):
    """With its tables in float32 and 1 − ᾱ a difference of them; that every configuration is read right is shown in float64."""
    for ours, theirs in steps(name, torch.float32):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["as it comes", "learned range"])
def test_every_kl_is_that_of_numpy(name, float64):
    """Of the two Gaussians that the scheduler has: the posterior of x_0, and its own step, whose clip is that of its configuration."""
    config = scheduler(**CASES[name]).config
    learned = config.variance_type == "learned_range"
    module = unet(2 if learned else 1, torch.float64)
    model = probdiff.presets.from_diffusers(network_of(module), config, probdiff.DiscretizedNormalLikelihood(256))
    rng = np.random.default_rng(0)
    x, noise = rng.integers(0, 256, (3, DIM)), rng.normal(size=(1, STEPS, 3, DIM))
    terms = probdiff.elbo_terms(model, x, noise=noise)
    betas = np.asarray(config.beta_start + (config.beta_end - config.beta_start) / (1 + np.exp(-np.linspace(-6, 6, STEPS)))) if learned else np.linspace(1e-4, 0.3, STEPS)
    alpha_bar, x0 = np.cumprod(1 - betas), x / 127.5 - 1
    for t in range(1, STEPS):
        z = np.sqrt(alpha_bar[t]) * x0 + np.sqrt(1 - alpha_bar[t]) * noise[0, t]
        output = asked(module, z, np.full(3, t))
        guess = np.clip((z - np.sqrt(1 - alpha_bar[t]) * output[:, :DIM]) / np.sqrt(alpha_bar[t]), -1, 1)
        variance = betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        share = (output[:, DIM:] + 1) / 2 if learned else 0.0
        own = variance ** (1 - share) * betas[t] ** share
        distance = np.sqrt(alpha_bar[t - 1]) * betas[t] / (1 - alpha_bar[t]) * (x0 - guess)
        kl = 0.5 * (np.log(own / variance) + (variance + distance**2) / own - 1).sum(-1)
        np.testing.assert_allclose(terms.step_kl[0, t - 1], kl, rtol=1e-9)
