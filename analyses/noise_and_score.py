# %% [markdown]
# # Is predicting the noise the same as predicting the score, and how accurate is the score of a fitted network?
#
# In variance-exploding coordinates, x_n = x_0 + σ_n ε, the score of the noisy data is ∇ log p(x_n) = −E[ε | x_n]/σ_n:
# a network that predicts the noise predicts the score. The data are eight Gaussians, whose score is known at every
# noise level. Models of them are fitted by the bound, and by denoising score matching with other weights; the error of
# each model's score is measured.
#
# Errors (±) are one standard error over data and noise. Figures are saved to the current directory.

# %%
import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpyro import distributions as dist

import probdiff
from probdiff.presets import default_diffusion, default_options

parser = argparse.ArgumentParser(description="Is predicting the noise the same as predicting the score?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

data = probdiff.datasets.load("8gaussians")
options = default_options(data) | ({"num_steps": 20, "iterations": 20, "batch_size": 64} if quick else {})
N = options["num_steps"]
POINTS, FEWER, PRIOR = (200, 50, 2_000) if quick else (20_000, 1_000, 100_000)
SHOWN = (0.4,) if quick else (0.1, 0.4, 1.2)  # σ_n of the score fields
Z_MAX = 4.9  # standard errors

untrained = default_diffusion(data, N)
if quick:
    small = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1)
    untrained = probdiff.Diffusion(untrained.schedule, small, untrained.likelihood)
schedule, likelihood = untrained.schedule, untrained.likelihood
exact = probdiff.Diffusion(schedule, data.exact_network(schedule, likelihood), likelihood)
steps = np.array([1, N // 2]) if quick else np.linspace(1, N, 9).astype(int)
print(f"8gaussians, N = {N}, σ_n from {schedule.sigma[0]:.4f} to {schedule.sigma[-1]:.1f}; the data have unit variance")

# %% [markdown]
# ## The fits
#
# Score matching minimises Σ_n λ_n E‖s_θ + ε/σ_n‖². With λ_n = σ_n² all noise levels count alike; λ_n = σ_n gives more
# weight to low noise. The bound is fitted twice: with one step per datum, spread evenly, as in the other two fits, and
# with steps drawn from learned probabilities, for less variance of the gradient. All fits have the same keys and are in
# float32; all that follows is in float64.

# %%
OBJECTIVES = {
    "bound": probdiff.AnalyticELBO(untrained, "stratified"),
    "λ_n = σ_n²": probdiff.elbo.ScoreMatching(untrained),
    "λ_n = σ_n": probdiff.elbo.ScoreMatching(untrained, schedule.sigma),
    "bound, learned steps": probdiff.AnalyticELBO(untrained, "stratified_importance"),
}
models = {}
for name in list(OBJECTIVES)[: 1 if quick else None]:
    start = time.perf_counter()
    rest = {option: options[option] for option in ("iterations", "batch_size", "learning_rate")}
    fit = probdiff.fit(untrained, data.train, elbo=OBJECTIVES[name], key=jax.random.key(0), progress=False, **rest)
    models[name] = fit.diffusion
    print(f"fitted by {name} in {time.perf_counter() - start:.0f} s", flush=True)
fitted = models["bound"]
numpyro.enable_x64()
test = likelihood.encode(data.test)

# %% [markdown]
# ## Two checks of the score
#
# The score of the exact ε-network is compared with automatic differentiation of the density of the noisy data, a NumPyro
# mixture. It is also the mean of the conditional scores −(x_n − x_0)/σ_n² over x_0 given x_n, here an average over
# training data with weights p(x_n | x_0).

# %%
oracle = data.oracle.standardized(likelihood.loc, likelihood.scale)


def noisy(n):
    """The distribution of x_n."""
    covariances = oracle.covariances + schedule.sigma[n - 1] ** 2 * np.eye(data.dim)
    return dist.MixtureSameFamily(dist.Categorical(oracle.weights), dist.MultivariateNormal(oracle.means, covariances))


def average(x_n, x0, n):
    """Mean of the conditional scores over ``x0`` given one ``x_n``, and its error."""
    weight = jax.nn.softmax(probdiff.chain.score.noising(schedule, x0, n).log_prob(x_n))[:, None]
    scores = probdiff.chain.score.conditional_score(schedule, x_n, x0, n)
    mean = jnp.sum(weight * scores, 0)
    return mean, jnp.sqrt(jnp.sum(jnp.square(weight * (scores - mean)), 0))


prior = likelihood.encode(data.train[:PRIOR])
print("\nThe score of the exact ε-network: against the gradient of the density, and against the average over x_0")
print("    n     σ_n   largest relative difference   difference from the average, in standard errors: rms, largest")
for n in steps:
    x_n = probdiff.chain.score.noising(schedule, test[:FEWER], n).sample(jax.random.key(n))
    score = probdiff.chain.score.score(exact, x_n, n)
    gradient = jax.vmap(jax.grad(noisy(n).log_prob))(x_n)
    difference = float(jnp.max(jnp.linalg.norm(score - gradient, axis=-1) / jnp.linalg.norm(gradient, axis=-1)))
    assert difference <= 1e-8, f"the scores differ at n = {n}: {difference}"
    text = "(too few x_0 near x_n)"
    if schedule.sigma[n - 1] > 0.04:
        mean, error = jax.lax.map(lambda x_n, n=n: average(x_n, prior, n), x_n[:50])
        z = np.asarray((mean - score[:50]) / error)
        assert np.abs(z).max() <= Z_MAX, f"the average is not the score at n = {n}"
        text = f"{np.sqrt(np.mean(z**2)):.2f}, {np.abs(z).max():.2f}"
    print(f"{n:5d} {schedule.sigma[n - 1]:7.4g} {difference:29.1e}   {text}")

# %% [markdown]
# ## The bound is score matching
#
# Each step KL of the bound is λ_n ‖s_θ + ε/σ_n‖² plus a constant, where λ_n are the `likelihood_weights`. With equal
# steps of log-SNR and v_n near β_n, they are nearly a multiple of σ_n²; only the first step has more weight.

# %%
likelihood_weights = probdiff.elbo.likelihood_weights(fitted)
weights = likelihood_weights / schedule.sigma**2
n, x0 = np.arange(1, N + 1)[:, None], test[: FEWER // 10]
eps = jax.random.normal(jax.random.key(1), (N, *x0.shape))
x_n = x0 + schedule.sigma[:, None, None] * eps
apart = probdiff.chain.score.score(fitted, x_n, n) - probdiff.chain.score.conditional_score(schedule, x_n, x0, n)
constant = data.dim * fitted.kernel.constant(schedule)[:, None]
matching = likelihood_weights[:, None] * jnp.square(apart).sum(-1) + constant
step_kl = probdiff.elbo_terms(fitted, data.test[: len(x0)], noise=eps[None]).step_kl[0]
difference = float(jnp.max(jnp.abs(step_kl / matching[1:] - 1)))
assert difference <= 1e-6, f"a step KL is not its score matching: {difference}"
print(f"\nStep KLs against score matching with the likelihood weights: largest relative difference {difference:.0e}")
print(f"λ_n/σ_n² in the bound: {weights[0]:.4f} at n = 1, {weights[1:].min():.4f} to {weights[1:].max():.4f} after")

# %% [markdown]
# ## How accurate is the score?
#
# Three mean squared distances, times σ_n² so that the noise is 1: between the model's score and the exact one, which is
# E‖ε_θ − E[ε | x_n]‖²; between the model's and the conditional score, which score matching minimises; and between the
# exact and the conditional score. The second is the sum of the others (Vincent's identity), which is checked at every
# level. A model whose score is 0 has relative error 1. The network costs the bound Σ_n w_n E‖ε_θ − E[ε | x_n]‖² nats,
# with w_n = λ_n/σ_n².


# %%
def distances(model, steps, x0):
    """Squared error of the score, squared exact score, and residual of Vincent's identity; shape ``(step, datum)`` each."""

    def one(n):
        x_n = probdiff.chain.score.noising(schedule, x0, n).sample(jax.random.fold_in(jax.random.key(2), n))
        conditional = probdiff.chain.score.conditional_score(schedule, x_n, x0, n)
        own, true = (probdiff.chain.score.score(each, x_n, n) for each in (model, exact))
        pairs = (own, true), (true, 0 * true), (own, conditional), (true, conditional)
        error, size, matched, least = (jnp.square(a - b).sum(-1) for a, b in pairs)
        return jnp.stack([error, size, matched - error - least]) * jnp.asarray(schedule.sigma)[n - 1] ** 2

    return np.moveaxis(np.asarray(jax.jit(lambda steps: jax.lax.map(one, steps))(jnp.asarray(steps))), 1, 0)


def estimate(values):
    """Means over the data, the last axis, and their standard errors."""
    return values.mean(-1), values.std(-1, ddof=1) / np.sqrt(values.shape[-1])


def shown(mean, error):
    return f"{mean:.1e} ± {error:.0e}".rjust(17)


at_levels = {name: distances(model, steps, test[:POINTS]) for name, model in models.items()}
everywhere = {name: distances(model, np.arange(1, N + 1), test[:FEWER]) for name, model in models.items()}
nats = {name: weights[:, None] * error for name, (error, *_) in everywhere.items()}
size = at_levels["bound"][1].mean(-1)
print(f"\nFitted by the bound: error of its score; {POINTS} data at each level, {FEWER} at each step for nats")
print("    n  log-SNR     σ_n   σ_n² E‖s‖²   in units of noise   relative to E‖s‖²   identity, z   nats, steps to n")
for i, n in enumerate(steps):
    (error, left), total = (estimate(at_levels["bound"][j, i]) for j in (0, 2)), estimate(nats["bound"][:n].sum(0))
    row = f"{n:5d} {schedule.log_snr[n - 1]:8.2f} {schedule.sigma[n - 1]:7.4g} {size[i]:12.2g}   {shown(*error)}   "
    print(row + f"{shown(*(error / size[i]))} {left[0] / left[1]:13.2f}   {total[0]:.4f} ± {total[1]:.4f}")

print("\nRelative error of the score, by what the model was fitted by")
print("    n     σ_n" + "".join(f"{name:>23}" for name in models))
for i, n in enumerate(steps):
    cells = (shown(*(np.array(estimate(at_levels[name][0, i])) / size[i])) for name in models)
    print(f"{n:5d} {schedule.sigma[n - 1]:7.4g}" + "".join(f"{cell:>23}" for cell in cells))
for name in models:
    mean, error = estimate(at_levels[name][2])
    worst = np.abs(mean / error).max()
    assert worst <= Z_MAX, f"Vincent's identity, {name}: {mean / error}"
    total, more = estimate(nats[name].sum(0)), estimate((nats[name] - nats["bound"]).sum(0))
    text = "" if name == "bound" else ", {:.4f} ± {:.4f} more than the bound's fit".format(*more)
    print(f"{name}: identity |z| ≤ {worst:.1f}; {total[0]:.4f} ± {total[1]:.4f} nats lost in all" + text)

# %% [markdown]
# ## What the measurements show
#
# (Findings of a run with N = 2000.) In nats, the worst levels are those at which the Gaussians merge: almost three quarters of the
# loss of the fit by the bound are between σ_n = 0.08 and 1, although the squared error there is at most a fiftieth of
# the squared score. Relative to the score, the worst levels have the least noise. There x_n says almost nothing about its
# noise, and below the printed σ_n a score of 0 is closer to the exact one than the fitted score; but all levels
# σ_n < 0.006 together are a fiftieth of the loss.
#
# The weights σ_n² and those of the bound differ in little but the first step, which has 95 times the weight in the bound: a
# large term that is rarely drawn. The fits with weights σ_n² and by the bound with learned steps have slightly better
# *bounds*: both reduce the variance of the gradient. The fit with weights σ_n loses a hundred times as much, as its gradient
# of one step per datum comes from the few levels of least noise. (One fit each: the errors are those of the
# measurement; another seed gives another fit.)

# %%
if not quick:
    everything = nats["bound"].mean(-1)
    merging = everything[(schedule.sigma > 0.08) & (schedule.sigma < 1)].sum() / everything.sum()
    little = everything[schedule.sigma < 0.006].sum() / everything.sum()
    print(f"\nOf the nats that the bound's fit loses: {merging:.0%} at 0.08 < σ_n < 1, {little:.0%} at σ_n < 0.006")
    worse = schedule.sigma[everywhere["bound"][0].mean(-1) > everywhere["bound"][1].mean(-1)].max()
    print(f"A score of 0 is closer to the exact one than that fit up to σ_n = {worse:.4f}")
    lost = {name: each.sum(0).mean() for name, each in nats.items()}
    assert all(50 * each < lost["λ_n = σ_n"] for name, each in lost.items() if name != "λ_n = σ_n")

# %% [markdown]
# ## The score fields
#
# Arrows are σ_n s, that is −E[ε | x_n], in the same units for both models. The fitted score is inaccurate where there are
# hardly any data: between the Gaussians and outside.

# %%
figure = Figure(figsize=(0.8 + 3 * len(SHOWN), 10.4), dpi=100, layout="constrained")
panels = figure.subplots(3, len(SHOWN), squeeze=False)
for column, sigma in zip(panels.T, SHOWN):
    n = int(np.argmin(np.abs(np.log(schedule.sigma / sigma)))) + 1
    sigma, reach = schedule.sigma[n - 1], 1.7 + 1.6 * sigma
    x_n = np.stack(np.meshgrid(*2 * [np.linspace(-reach, reach, 101)]), -1)
    horizontal, vertical = np.moveaxis(x_n, -1, 0)
    log_p = np.asarray(noisy(n).log_prob(x_n))
    levels = log_p.max() - np.array([16, 8, 4, 2, 1, 0.5, 0])
    fields = [np.asarray(sigma * eqx.filter_jit(probdiff.chain.score.score)(model, x_n, n)) for model in (exact, fitted)]
    shades = colormaps["Blues"](np.linspace(0.05, 0.55, len(levels) - 1))
    longest = np.linalg.norm(fields[0], axis=-1).max()
    for ax, name, field in zip(column, ("exact", "fitted"), fields):
        ax.contourf(horizontal, vertical, log_p, levels, colors=shades)
        style = {"angles": "xy", "scale_units": "xy", "scale": longest / (0.22 * reach), "width": 0.006}
        ax.quiver(*(each[1::7, 1::7] for each in (horizontal, vertical, *np.moveaxis(field, -1, 0))), **style)
        ax.set_title(f"{name}, σ_n = {sigma:.2g} (n = {n})", fontsize="medium")
    off = np.linalg.norm(fields[1] - fields[0], axis=-1)
    image = column[2].pcolormesh(horizontal, vertical, off, norm=LogNorm(1e-3, 1), cmap="magma", rasterized=True)
    column[2].contour(horizontal, vertical, log_p, levels[1:4], colors="w", linewidths=0.7, linestyles="-")
    column[2].set_title("distance between the two", fontsize="medium")
    column[2].set_xlabel("first coordinate of x_n")
    for ax in column:
        ax.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
for ax in panels[:, 0]:
    ax.set_ylabel("second coordinate of x_n")
label = "bottom row: σ_n ‖s_θ − s‖, units of noise"
figure.colorbar(image, ax=panels, label=label, extend="both", location="bottom", shrink=0.6, aspect=40, pad=0.02)
note = "Arrows: σ_n × score. Shading: density, to 0.5, 1, 2, 4, 8 and 16 nats below its peak; white lines: 2, 4 and 8."
figure.suptitle(note, fontsize="medium")
figure.savefig("noise_and_score_fields.png")

# %% [markdown]
# ## The error at each level

# %%
figure = Figure(figsize=(12, 4.4), dpi=110, layout="constrained")
left, middle, right = figure.subplots(1, 3)
size = np.mean([each.mean(-1) for _, each, _ in everywhere.values()], 0)
left.plot(schedule.sigma, size, "k--", lw=1, label="a score of 0")
middle.axhline(1, color="k", ls="--", lw=1)
for name, (error, *_) in everywhere.items():
    mean, spread = estimate(error)
    curves = (mean, spread), (mean / size, spread / size), estimate(np.cumsum(nats[name], 0))
    for ax, (height, band) in zip((left, middle, right), curves):
        (line,) = ax.plot(schedule.sigma, height, lw=1, label=name)
        ax.fill_between(schedule.sigma, height - 2 * band, height + 2 * band, color=line.get_color(), alpha=0.25, lw=0)
left.set_ylabel("σ_n² E‖s_θ − s‖², units of noise")
middle.set_ylabel("E‖s_θ − s‖² / E‖s‖²")
right.set_ylabel("cost of the network in steps 1 … n, nats")
for ax in (left, middle, right):
    ax.set(xscale="log", yscale="log", xlabel="noise σ_n (data of unit variance)")
    ax.grid(alpha=0.3)
    top = ax.secondary_xaxis("top")
    top.set_xticks(np.exp(-np.arange(-8, 13, 4) / 2), [f"{log_snr}" for log_snr in range(-8, 13, 4)])
    top.minorticks_off()
    top.set_xlabel("log-SNR")
handles = left.get_legend_handles_labels()
title = f"fitted by (bands: ± 2 standard errors over {FEWER} data)"
figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False, title=title)
figure.savefig("noise_and_score_errors.png")
print("\nfigures: noise_and_score_fields.png, noise_and_score_errors.png")
