# %% [markdown]
# # Digits with the lower half hidden: completions, and the probability of the visible half
#
# A diffusion fitted to whole digits is conditioned on their upper half. Sequential Monte Carlo along the reverse chain
# (`probdiff.inference`) gives completions as weighted samples, and an unbiased estimate of the probability of the visible half, which samplers without weights do not give.
# The figure is saved to the current directory.

# %%
import argparse
import time

import jax
import matplotlib.pyplot as plt
import numpy as np

import probdiff
from probdiff.inference import DiagonalTwist, Inpainting, evidence_bounds, observed_log_prob, smc
from probdiff.networks import CategoricalHead
from probdiff.presets import default_diffusion, default_options

parser = argparse.ArgumentParser(description="Digits with the lower half hidden")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

NUM_STEPS, PARTICLES, RUNS, ITEMS, SIMULATED = (4, 4, 2, 2, 2) if quick else (100, 64, 2, 64, 20)
SHOWN, COMPLETIONS = (2, 2) if quick else (8, 8)
HALF = np.arange(64) < 32  # True is visible: the upper four rows
TWIST = DiagonalTwist()  # what "tweedie" would use, as there are more than 16 observed values

# %% [markdown]
# ## The model
#
# The default model of `probdiff fit` for the digits has 1000 steps. The input of its network is the noise level and not the step, so that it can be used unchanged in a
# chain of 100 steps. What this costs in the bound is printed first.

# %%
data = probdiff.datasets.load("digits")
options = default_options(data) | ({"iterations": 2, "batch_size": 8, "validate_every": 2} if quick else {})
small = CategoricalHead(probdiff.MLP(64, key=jax.random.key(0), hidden=8, num_blocks=1, outputs=17), 17)
untrained = default_diffusion(data, 4 if quick else options["num_steps"])
fit = probdiff.fit(
    untrained.with_network(small) if quick else untrained,
    data.train,
    iterations=options["iterations"],
    batch_size=options["batch_size"],
    learning_rate=options["learning_rate"],
    validation=data.validation[:8] if quick else data.validation,
    validate_every=options["validate_every"],
    key=jax.random.split(jax.random.key(options["seed"]))[0],  # as the command does
    progress=False,
)
long = fit.diffusion
ends = [float(long.schedule.log_snr[n]) for n in (0, -1)]
model = probdiff.Diffusion(probdiff.log_snr_schedule(NUM_STEPS, *ends), long.network, data.likelihood(), "posterior").bind({})
items = data.test[:ITEMS].astype(np.int32)


def shown(name, values, monte_carlo=None):
    """Print a mean over data with its standard error, and with the Monte Carlo error if it is given."""
    noise = "" if monte_carlo is None else f"   (Monte Carlo error {monte_carlo:.3f})"
    print(f"{name:58}{values.mean():10.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}{noise}", flush=True)


def bound_of(diffusion):
    """The bound of each item, nats."""
    return np.asarray(probdiff.elbo_terms(diffusion, items, key=jax.random.key(1), num_draws=2, reduce=True).elbo.mean)


print(f"the bound on the first {ITEMS} test items, bits/dim")
bounds = {diffusion.schedule.num_steps: bound_of(diffusion) for diffusion in ((model,) if quick else (long, model))}
for num_steps, bound in bounds.items():
    shown(f"N = {num_steps}", probdiff.elbo.bits_per_dim(bound, 64))

# %% [markdown]
# ## The probability of the visible half
#
# The estimate for each item is the mean of independent runs. The reference models the pixels as independent, each with its frequencies in the training data. The log of an
# unbiased estimate is too small on average.

# %%
start = time.process_time()
given = {"num_particles": PARTICLES, "twist": TWIST}
visible = observed_log_prob(model, items, mask=np.tile(HALF, (ITEMS, 1)), key=jax.random.key(2), num_runs=RUNS, **given)
counts = 0.5 + (data.train[:, :, None] == np.arange(17)).sum(0)
by_pixel = np.log(counts / counts.sum(1, keepdims=True))[np.arange(64), items]
error = np.sqrt(np.square(visible.error).sum()) / ITEMS
print(f"\n{ITEMS} test items, {RUNS} runs of {PARTICLES} particles each: nats per item, ± over the items")
shown("log p(visible half)", visible.log_prob, error)
shown("the same with independent pixels", by_pixel[:, HALF].sum(1))
shown("the bound of all pixels", bounds[NUM_STEPS])
shown("the same with independent pixels", by_pixel.sum(1))
print(f"effective sample size at the worst step, of {PARTICLES}: {np.median(visible.ess):.1f} (median), {visible.ess.min():.1f} to {visible.ess.max():.1f}")
print(f"{time.process_time() - start:.0f} s of processor time", flush=True)

# %% [markdown]
# ## Are these particles enough?
#
# For visible halves of digits drawn from the model there are bounds on both sides: its mean log p(visible half) is between them.

# %%
print()
print(evidence_bounds(model, Inpainting(HALF, items[0]), key=jax.random.key(5), num_data=SIMULATED, **given), flush=True)

# %% [markdown]
# ## Completions
#
# Completions are drawn by weight from the particles of all runs; their visible half is that of the item. Printed are the errors of the mean of the completions and of the mean of the training data as
# predictions of the hidden pixels, and the spread of the completions. After resampling, the particles of a run descend from a few at high noise and resemble each other. Therefore there are more runs here,
# and the distance of two particles of a run is compared with the distance of two particles of different runs.

# %%
posteriors = [
    smc(model, Inpainting(HALF, x), key=jax.random.key(6 + k), num_runs=2 * RUNS, **given)
    for k, x in enumerate(items[:SHOWN])
]
hidden = np.array([posterior.mean[~HALF] for posterior in posteriors])
spread = np.array([posterior.weights @ np.square(posterior.samples - posterior.mean)[:, ~HALF] for posterior in posteriors])


def distances(posterior):
    """The root mean square distance of two particles' hidden pixels, within runs and between."""
    x = posterior.samples[:, ~HALF].astype(float).reshape(posterior.num_runs, -1, 32)
    within = 2 * x.var(1, ddof=1).mean()
    of_means = x.mean(1).var(0, ddof=1).mean() - within / 2 / x.shape[1]
    return np.sqrt([within, within + 2 * max(of_means, 0)])


rows = {
    "error of the mean of the completions": np.square(hidden - items[:SHOWN, ~HALF]),
    "error of the mean of the training data": np.square(data.train.mean(0)[~HALF] - items[:SHOWN, ~HALF]),
    "spread of the completions": spread,
}
print(f"\nhidden pixels of the {SHOWN} items of the figure, {2 * RUNS} runs of {PARTICLES} particles: root mean squares, levels of 0 … 16")
for name, squares in rows.items():
    print(f"{name:40}{np.sqrt(squares.mean()):6.2f}")
within, between = np.mean([distances(posterior) for posterior in posteriors], 0)
print(f"two particles of a run are {within:.2f} levels apart, two of different runs {between:.2f} (root mean squares)")

figure = plt.figure(figsize=(9.5, 0.7 * SHOWN + 0.6), dpi=110, layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(2.4, 1))
grid = left.subplots(SHOWN, 2 + COMPLETIONS, squeeze=False)
colours = plt.get_cmap("gray_r").with_extremes(bad="#cfe3f3")
for row, x, posterior in zip(grid, items, posteriors):
    images = [x, np.where(HALF, x, np.nan), *posterior.resample(jax.random.key(0), COMPLETIONS)]
    for axes, image in zip(row, images):
        axes.imshow(np.ma.masked_invalid(np.reshape(image, (8, 8)).astype(float)), cmap=colours, vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    for axes in row[2:]:
        axes.axhline(3.5, color="C0", lw=1)
    row[0].set_ylabel(f"{posterior.log_evidence:.1f}", rotation=0, ha="right", va="center", fontsize=8)
for axes, title in zip(grid[0], ("original", "visible", "completions, drawn by their weights")):
    axes.text(0, 1.08, title, fontsize=8, transform=axes.transAxes).set_in_layout(False)
left.supylabel("log p(visible half), nats", fontsize=8)
axes = right.subplots()
for k, posterior in enumerate(posteriors):
    axes.plot(np.arange(1, NUM_STEPS + 1), posterior.ess, lw=0.8, color=plt.get_cmap("viridis")(k / SHOWN))
axes.axhline(PARTICLES / 2, color="k", lw=0.8, ls=":", label="resampled below")
axes.set(xlabel="step n", ylabel=f"effective sample size, of {PARTICLES}", ylim=(0, PARTICLES * 1.05))
axes.set_title("a line for each item, mean of its runs", fontsize=8)
axes.legend(frameon=False, fontsize=8)
figure.savefig("inpainting.png")
print("figure: inpainting.png")
