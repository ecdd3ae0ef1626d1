# %% [markdown]
# # Images of 784 pixels and 256 levels: Fashion-MNIST in bits per dimension
#
# A U-Net that predicts a mixture on the levels for each pixel (`LevelMixtureHead`) is fitted for a given time. The results are its code length on the test
# split with errors, beside the code lengths of other models; the bound against the time of the fit; the KL of each step; samples; and the images with the longest codes.
#
# The script reads the run of `probdiff fit --data fashion-mnist --minutes 60 --out runs/images`, or makes it if there is none.
# `probdiff fit --out runs/images --resume --minutes 90` continues it. Figures are saved to the current directory.

# %%
import argparse
import resource
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import probdiff

parser = argparse.ArgumentParser(description="Fashion-MNIST in bits per dimension")
parser.add_argument("--quick", action="store_true", help="digits for a few seconds, to see that it runs")
parser.add_argument("--run", default="runs/images", metavar="DIR", help="run folder (default: runs/images)")
parser.add_argument("--minutes", type=float, default=60, metavar="M", help="time for the fit, if there is no run (default: 60)")
arguments = parser.parse_args()
quick = arguments.quick
NAME, MINUTES, NUM_STEPS, NUM_TEST = ("digits", 0.05, 40, 40) if quick else ("fashion-mnist", arguments.minutes, 1000, None)

# Bits per dimension on the test split of Fashion-MNIST. gzip -9 and xz -9e were run on all its bytes. McBits, BB-ANS, IDF, HCLT and BitSwap: as reported by Liu et al. (2022),
# arXiv:2111.11632; SparsePC: Dang et al. (2022), arXiv:2211.12551; Glow: Nalisnick et al. (2019), arXiv:1810.09136.
OTHERS = {"gzip": 4.47, "xz": 3.86, "McBits": 3.72, "BB-ANS": 3.66, "IDF": 3.47, "HCLT": 3.34, "BitSwap": 3.28, "SparsePC": 3.27, "Glow, about": 2.95}

# %% [markdown]
# ## The fit

# %%
dataset = probdiff.datasets.load(NAME)
if not Path(arguments.run).exists():
    if quick:
        head = probdiff.networks.LevelMixtureHead
        network = probdiff.networks.UNet(dataset.image_shape, key=jax.random.key(0), channels=4, num_blocks=1, outputs=head.outputs(2))
        schedule = probdiff.log_snr_schedule(NUM_STEPS, 8.0, -6.0)
        diffusion = probdiff.Diffusion(schedule, head(network, dataset.levels, 2), dataset.likelihood())
    else:
        diffusion = probdiff.presets.default_diffusion(dataset, NUM_STEPS)
    options = probdiff.presets.default_options(dataset) | {"data": NAME, "num_steps": NUM_STEPS, "minutes": MINUTES}
    del options["iterations"]
    run = probdiff.storage.create_run(arguments.run, diffusion, options)
    limits = {name: options[name] for name in ("minutes", "batch_size", "learning_rate", "validate_every")}
    run.save(fit=probdiff.fit(diffusion, dataset.train, validation=dataset.validation, checkpoint=run.checkpoint, **limits))
run = probdiff.open_run(arguments.run)
diffusion, minutes = run.diffusion, run.config["minutes"]
bits = probdiff.elbo.bits_per_dim

# %% [markdown]
# ## The code length of the test split
#
# All test images at random steps, with the error over the images. The Monte Carlo error, of steps and noise, is at most a fifth of it. For a few images the bound is computed in two ways.

# %%
start = time.monotonic()
test = dataset.test[:NUM_TEST]
bound = probdiff.elbo.data_set_elbo(diffusion, test, key=jax.random.key(1), noise_share=0.18, progress=True)
seconds = time.monotonic() - start
estimate, dim = bound.estimate, dataset.dim
rows = {"probdiff": float(bits(estimate.mean, dim)), **({} if quick else OTHERS)}
print(pd.Series(rows, name="bits/dim").sort_values(ascending=False).round(3).to_string(), flush=True)
print(
    f"\n{NAME}, {minutes:g} minutes, {len(run.losses)} updates: {bits(estimate.mean, dim):.4f} ± {-bits(estimate.error, dim):.4f} bits/dim on {len(test)} test images "
    f"(Monte Carlo error {-bits(estimate.monte_carlo_error, dim):.4f}); {bound.num_evaluations} evaluations in {seconds:.0f} s"
)
for name, part in (("prior KL", bound.prior_kl), ("step KL", bound.step_kl), ("reconstruction", -bound.reconstruction)):
    print(f"{name:>15}: {-bits(np.mean(part), dim):.5f} bits/dim", flush=True)
some = test[: 4 if quick else 16]
both = probdiff.diagnostics.compute_both_ways(diffusion, some, key=jax.random.key(2), num_draws=2, progress=True)
difference, error = both.difference
print(f"the bound in two ways on {len(some)} images: {difference:.2f} ± {error:.2f} nats apart; terms on common paths at most {both.common.largest if both.common else np.nan:.1e} nats")
seen = dataset.train[: len(test) // 5]
known = probdiff.elbo.data_set_elbo(diffusion, seen, key=jax.random.key(3), noise_share=0.18, progress=True).estimate
gap, gap_error = bits(known.mean - estimate.mean, dim), np.hypot(bits(known.error, dim), bits(estimate.error, dim))
print(f"{len(seen)} training images: {bits(known.mean, dim):.4f}, {-gap:.4f} ± {gap_error:.4f} bits/dim less than the test images")
print(f"peak memory so far: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")

# %% [markdown]
# The network is told the log-SNR, not the step, so that the same network has a bound with any number of steps. With 50 of them, all steps of all test images can be evaluated.

# %%
ends = diffusion.schedule.log_snr[0].item(), diffusion.schedule.log_snr[-1].item()
fewer = probdiff.Diffusion(probdiff.log_snr_schedule(NUM_STEPS // 20, *ends), diffusion.network, diffusion.likelihood, "posterior", dim=dim)
start = time.monotonic()
moments = probdiff.elbo_terms(fewer, test, key=jax.random.key(5), reduce=True)
each = bits(np.asarray(moments.elbo.mean), dim)
print(
    f"all {NUM_STEPS // 20} steps of {len(test)} images: {each.mean():.4f} ± {each.std(ddof=1) / np.sqrt(len(each)):.4f} bits/dim in {time.monotonic() - start:.0f} s, "
    f"with {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB",
    flush=True,
)

# %% [markdown]
# ## The bound against the time of the fit, and the KL of each step

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
iteration, validation = np.asarray(run.validation).T
left.plot(iteration / len(run.losses) * minutes, bits(validation, dim), marker=".", label="averaged parameters, validation split")
left.axhline(bits(estimate.mean, dim), color="C1", label="result, test split")
if not quick:
    for name in ("BitSwap", "IDF", "BB-ANS"):
        left.axhline(OTHERS[name], color="grey", linestyle=":", linewidth=1)
        left.annotate(name, (0.99, OTHERS[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="grey")
left.set(xlabel="time of the fit in minutes", ylabel="bits/dim")
left.legend(fontsize=8)
kl = -bits(np.asarray(both.terms.step_kl).mean(0), dim) * diffusion.schedule.num_steps
n = np.arange(2, diffusion.schedule.num_steps + 1)
each, deviation = kl.mean(1), kl.std(1, ddof=1) / np.sqrt(len(some))
right.plot(n, each)
right.fill_between(n, each - deviation, each + deviation, alpha=0.3, label="± standard error over images")
right.set(xlabel="step n", ylabel="N × KL of the step in bits/dim", ylim=(0, None))
right.legend(fontsize=8)
figure.savefig("images.png", dpi=150)

# %% [markdown]
# ## Samples, and the images with the longest and the shortest codes

# %%
count = 2 if quick else 8
samples = np.asarray(probdiff.samplers.ancestral(diffusion, key=jax.random.key(4), num_samples=count * 3))
order = np.argsort(bound.elbo)
panels = {"samples": samples, "longest codes": dataset.test[order[: count * 3]], "shortest codes": dataset.test[order[::-1][: count * 3]]}
figure, axes = plt.subplots(1, 3, figsize=(12, 2.1 if not quick else 3), layout="constrained")
for ax, (title, images) in zip(axes, panels.items()):
    tiles = np.asarray(images).reshape(3, count, *dataset.image_shape).swapaxes(1, 2).reshape(3 * dataset.image_shape[0], -1)
    ax.imshow(tiles, cmap="gray", vmin=0, vmax=dataset.levels - 1)
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()
figure.savefig("images_samples.png", dpi=150)
worst = bits(bound.elbo[order[: count * 3]], dim)
print(f"longest codes: {worst.max():.2f} to {worst.min():.2f} bits/dim; the median is {np.median(bits(bound.elbo, dim)):.2f}")

# %% [markdown]
# ## Digits: the U-Net beside the convolutional network
#
# Two fits of the digits of 8 × 8 pixels and 17 levels by the default options, with the default network, which keeps the resolution, and with a U-Net. The time is that of the whole fit.

# %%
digits = probdiff.datasets.load("digits")
options = probdiff.presets.default_options(digits) | ({"num_steps": 8, "iterations": 2, "batch_size": 4} if quick else {})
size = {"channels": 2 if quick else 32, "num_blocks": 1, "dropout": 0.3, "outputs": digits.levels}
default = probdiff.presets.default_diffusion(digits, options["num_steps"])
unet = probdiff.networks.CategoricalHead(probdiff.networks.UNet(digits.image_shape, key=jax.random.key(0), **size), digits.levels)
bounds = {}
for name, model in {"U-Net": default.with_network(unet), **({} if quick else {"ConvNet": default})}.items():
    start = time.monotonic()
    limits = {each: options[each] for each in ("iterations", "batch_size", "learning_rate", "validate_every")}
    fitted = probdiff.fit(model, digits.train, validation=digits.validation, **limits).diffusion
    seconds = time.monotonic() - start
    bound = probdiff.elbo.data_set_elbo(fitted, digits.test, key=jax.random.key(1))
    bounds[name] = bound.elbo
    count = sum(leaf.size for leaf in jax.tree.leaves(model.trainable()))
    print(
        f"digits, {name}, {count} parameters: {bits(bound.estimate.mean, digits.dim):.4f} ± {-bits(bound.estimate.error, digits.dim):.4f} bits/dim "
        f"(Monte Carlo error {-bits(bound.estimate.monte_carlo_error, digits.dim):.4f}) after a fit of {seconds:.0f} s",
        flush=True,
    )
if not quick:
    difference = bits(bounds["U-Net"] - bounds["ConvNet"], digits.dim)
    print(f"U-Net minus ConvNet, paired by images: {difference.mean():.4f} ± {difference.std(ddof=1) / np.sqrt(len(difference)):.4f} bits/dim")
