# %% [markdown]
# # Images of 16 × 16 pixels: what are Fourier features, a learned schedule and reflected images worth?
#
# The default model of `--data fashion-mnist-16`, with one thing changed at a time: the pixels are also read with their Fourier features, as in Variational Diffusion Models (Kingma et al., 2021, arXiv:2107.00630);
# the noise schedule, both its ends and its shape, is learned along with the network; or the images and their reflections are fitted by one conditional model whose context tells
# which of the two an image is. The bound of the last model is that of the images given "not reflected", which bounds their log-probability as the others do. All have the same
# number of updates and the same seed.

# %%
import argparse
import time

import jax
import numpy as np

import probdiff

parser = argparse.ArgumentParser(description="Options of a model of images, compared")
parser.add_argument("--quick", action="store_true", help="digits for two updates, to see that it runs")
parser.add_argument("--updates", type=int, default=2000, metavar="N", help="updates of each fit (default: 2000)")
arguments = parser.parse_args()
quick = arguments.quick
NAME, NUM_STEPS, UPDATES = ("digits", 8, 2) if quick else ("fashion-mnist-16", 1000, arguments.updates)

dataset = probdiff.datasets.load(NAME)
ends = 2 * float(np.log(3.4 * (dataset.levels - 1))), -6.0
size = {"channels": 2, "num_blocks": 1} if quick else {"products": "bfloat16" if probdiff.networks.has_fast_bfloat16() else None}
OPTIONS = {"iterations": UPDATES, "batch_size": 64, "learning_rate": 3e-3, "validate_every": max(1, UPDATES // 4)}


# %%
def model(schedule=None, **changed):
    """The default model, but for a schedule and arguments of its U-Net."""
    head = probdiff.networks.LevelMixtureHead
    unet = probdiff.networks.UNet(dataset.image_shape, key=jax.random.key(0), outputs=head.outputs(3), **size, **changed)
    schedule = schedule or probdiff.log_snr_schedule(NUM_STEPS, *ends)
    return probdiff.Diffusion(schedule, head(unet, dataset.levels, 3), dataset.likelihood(), "posterior", dim=dataset.dim)


def fit_and_bound(diffusion, train=dataset.train, context=None):
    """The bound of each test image, and the seconds of the fit. With a context, validation and test images are not reflected."""
    validation, test = (None if context is None else np.full((len(x), 1), -1.0) for x in (dataset.validation, dataset.test))
    start = time.monotonic()
    fit = probdiff.fit(diffusion, train, context=context, validation=dataset.validation, validation_context=validation, **OPTIONS)
    seconds = time.monotonic() - start
    return probdiff.elbo.data_set_elbo(fit.diffusion, dataset.test, context=test, key=jax.random.key(1)), seconds


reflected = dataset.train.reshape(-1, *dataset.image_shape)[:, :, ::-1].reshape(dataset.train.shape)
found = {
    "default": fit_and_bound(model()),
    "Fourier features": fit_and_bound(model(fourier=(7, 8))),
    "learned schedule": fit_and_bound(model(probdiff.LearnedSchedule(NUM_STEPS, *ends))),
    "reflected images": fit_and_bound(
        model(context_dim=1), np.concatenate([dataset.train, reflected]), np.repeat([[-1.0], [1.0]], len(dataset.train), 0)
    ),
}

# %% [markdown]
# ## The bounds
#
# The errors are over the test images; the last column but one is paired by them, and does not contain what another seed would change.


# %%
def in_bits(nats):
    """Mean and standard error in bits/dim, of nats for each image."""
    each = -probdiff.elbo.bits_per_dim(nats, dataset.dim)
    return f"{-each.mean():8.4f} ± {each.std(ddof=1) / np.sqrt(len(each)):.4f}"


print(f"\n{NAME}, {UPDATES} updates, bits/dim\n{'':18}{'bound':>17}{'of it steps':>14}{'reconstruction':>16}{'prior KL':>10}{'above the default':>20}{'fit':>8}")
for name, (bound, seconds) in found.items():
    steps, last, prior = (probdiff.elbo.bits_per_dim(part.mean(), dataset.dim) for part in (-bound.step_kl, bound.reconstruction, -bound.prior_kl))
    print(f"{name:18}{in_bits(bound.elbo):>17}{steps:14.4f}{last:16.4f}{prior:10.4f}{in_bits(bound.elbo - found['default'][0].elbo):>20}{seconds:6.0f} s", flush=True)
