# %% [markdown]
# # Digits with the lower half hidden: what could be there, and how probable is what is seen?
#
# A diffusion fitted to whole digits knows what may be below a given upper half. Sequential Monte Carlo along the reverse chain
# (`probdiff.inference`) gives completions as weighted samples, and an unbiased estimate of the probability of the visible half, which no sampler without weights has.
#
# With it log p(x) − log p(visible) is log p(hidden | visible): how much the model knows of the lower half from the upper one.
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

NUM_STEPS, PARTICLES, RUNS, ITEMS, SIMULATED = (4, 4, 2, 2, 2) if quick else (100, 64, 4, 64, 24)
SHOWN, COMPLETIONS = (2, 2) if quick else (8, 8)
SIZES = (4,) if quick else (16, 64, 256)  # numbers of particles, for how far the estimate has come
HALF = np.arange(64) < 32  # True is visible: the upper four rows
TWIST = DiagonalTwist()  # 32 observed values: what "tweedie" is for more than 16

# %% [markdown]
# ## The model
#
# That of `probdiff fit` for the digits: 1000 steps. Its network is asked for a noise level and not for a step, so that it serves a chain of 100 steps as it is.
# What that costs the bound is the first thing to see.

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
    key=jax.random.key(options["seed"]),
    progress=False,
)
long = fit.diffusion
ends = [float(long.schedule.log_snr[n]) for n in (0, -1)]
model = probdiff.Diffusion(probdiff.log_snr_schedule(NUM_STEPS, *ends), long.network, data.likelihood(), "posterior").bind({})
items = data.test[:ITEMS].astype(np.int32)


def shown(name, values, monte_carlo=None):
    """A mean over data with its error, and that of the particles or the noise."""
    noise = "" if monte_carlo is None else f"   (± {monte_carlo:.3f} of the random numbers)"
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
# Of each item in independent runs, whose mean is the estimate. Beside it the halves by independent pixels, each by its frequencies in the training data;
# and the whole item by the same particles with nothing hidden. The log of an unbiased estimate is too small on average, by about half of its variance. The difference of two of them is neither
# a bound from below nor one from above; it is as good as the particles, of which the next section is.

# %%
start = time.process_time()
given = {"num_particles": PARTICLES, "num_runs": RUNS, "twist": TWIST}
visible = observed_log_prob(model, items, mask=np.tile(HALF, (ITEMS, 1)), key=jax.random.key(2), **given)
whole = observed_log_prob(model, items, mask=np.full((ITEMS, 64), True), key=jax.random.key(3), **given)
counts = 0.5 + (data.train[:, :, None] == np.arange(17)).sum(0)
by_pixel = np.log(counts / counts.sum(1, keepdims=True))[np.arange(64), items]


def over_runs(*found):
    """The error of a mean over the items from that of the particles."""
    return np.sqrt(sum(np.square(each.error).sum() for each in found)) / ITEMS


print(f"\n{ITEMS} test items, {RUNS} runs of {PARTICLES} particles each: nats per item, ± over the items")
shown("log p(visible half)", visible.log_prob, over_runs(visible))
shown("the same by independent pixels", by_pixel[:, HALF].sum(1))
shown("log p(x), of all pixels", whole.log_prob, over_runs(whole))
shown("the bound of it", bounds[NUM_STEPS])
shown("log p(hidden half | visible half)", whole.log_prob - visible.log_prob, over_runs(whole, visible))
shown("the same by independent pixels", by_pixel[:, ~HALF].sum(1))
print(f"effective sample size at the worst step, of {PARTICLES}: {np.median(visible.ess):.1f} (median), {visible.ess.min():.1f} to {visible.ess.max():.1f}")
print(f"{time.process_time() - start:.0f} s of processor time")

# %% [markdown]
# ## Are these particles enough?
#
# The estimate on the same items with fewer and more of them; and bounds on both sides, on visible halves of digits that were drawn from the model: between the two is
# its log p(visible half).

# %%
print("\nlog p(visible half) of the first items by number of particles, nats per item")
for size in SIZES:
    found = observed_log_prob(
        model, items[:8], mask=np.tile(HALF, (len(items[:8]), 1)), key=jax.random.key(4), **(given | {"num_particles": size})
    )
    error = np.sqrt(np.square(found.error).sum()) / len(items[:8])
    print(f"{size:5} particles: {found.log_prob.mean():8.3f} ± {error:.3f} of the particles; error of an item {np.median(found.error):.2f} (median)", flush=True)
print()
print(evidence_bounds(model, Inpainting(HALF, items[0]), key=jax.random.key(5), num_data=SIMULATED, num_particles=PARTICLES, twist=TWIST), flush=True)

# %% [markdown]
# ## Completions
#
# Drawn by their weights, those of all runs together. Their visible half is that of the item. The mean of the completions against the mean of the training data, as a guess of the hidden pixels,
# and how much they vary.

# %%
posteriors = [
    smc(model, Inpainting(HALF, x), key=jax.random.key(6 + k), num_particles=PARTICLES, num_runs=RUNS, twist=TWIST) for k, x in enumerate(items[:SHOWN])
]
hidden = np.array([posterior.mean[~HALF] for posterior in posteriors])
spread = [np.sqrt(p.weights @ np.square(p.samples - p.mean)[:, ~HALF]) for p in posteriors]
errors = {"the mean of the completions": hidden, "the mean of the training data": data.train.mean(0)[~HALF]}
print(f"\nroot mean square error of the hidden pixels of the {SHOWN} items of the figure, levels of 0 … 16")
for name, guess in errors.items():
    print(f"{name:32}{np.sqrt(np.square(guess - items[:SHOWN, ~HALF]).mean()):6.2f}")
print(f"{'spread of the completions':32}{np.sqrt(np.square(spread).mean()):6.2f}")

figure = plt.figure(figsize=(9.5, 1.0 * SHOWN + 0.4), dpi=100, layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(2.4, 1))
grid = left.subplots(SHOWN, 2 + COMPLETIONS, squeeze=False)
for row, x, posterior in zip(grid, items, posteriors):
    drawn = posterior.resample(jax.random.key(0), COMPLETIONS)
    seen = np.where(HALF, x, np.nan)
    for axes, image in zip(row, [x, seen, *drawn]):
        axes.imshow(np.ma.masked_invalid(np.reshape(image, (8, 8)).astype(float)), cmap=plt.get_cmap("gray_r").with_extremes(bad="#cfe3f3"), vmin=0, vmax=16)
        axes.set(xticks=[], yticks=[])
    for axes in row[2:]:
        axes.axhline(3.5, color="C0", lw=1)
    row[0].set_ylabel(f"{posterior.log_evidence:.1f}", rotation=0, ha="right", va="center", fontsize=8)
grid[0, 0].set_title("original", fontsize=8)
grid[0, 1].set_title("visible", fontsize=8)
grid[0, 2].set_title("completions, drawn by their weights", fontsize=8, loc="left")
left.supylabel("log p(visible half), nats", fontsize=8)
axes = right.subplots()
for k, posterior in enumerate(posteriors):
    axes.plot(np.arange(1, NUM_STEPS + 1), posterior.ess, lw=1, color=plt.get_cmap("viridis")(k / SHOWN))
axes.axhline(PARTICLES / 2, color="k", lw=0.8, ls=":", label="resampled below")
axes.set(xlabel="step n", ylabel=f"effective sample size, of {PARTICLES}", ylim=(0, PARTICLES * 1.05), title="of each row, mean of the runs")
axes.title.set_fontsize(8)
axes.legend(frameon=False, fontsize=8)
figure.savefig("inpainting.png")
print("figure: inpainting.png")
