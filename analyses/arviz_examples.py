# %% [markdown]
# # The terms of a bound in ArviZ's own functions
#
# A small diffusion is fitted to the two moons, and the terms of its bound are given to [ArviZ](https://www.arviz.org).
# It shows which steps cost most and for which data, the Monte Carlo errors, and whether the guide can serve as the
# proposal of importance sampling. Everything is in nats. Figures are saved to the current directory.

# %%
import argparse

import jax
import numpy as np
import xarray as xr

import probdiff

parser = argparse.ArgumentParser(description="The terms of a bound in ArviZ's own functions")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

NUM_STEPS, ITERATIONS, NUM_DATA, NUM_DRAWS = (12, 50, 8, 100) if quick else (100, 3_000, 48, 400)
SIZE = {"hidden": 16, "num_blocks": 1} if quick else {"hidden": 64, "num_blocks": 2}
FIGURE = {"layout": "constrained", "dpi": 130}

data = probdiff.datasets.load("moons")
network = probdiff.MLP(data.dim, key=jax.random.key(0), num_harmonics=3, **SIZE)
schedule = probdiff.log_snr_schedule(NUM_STEPS, 13.0, -8.0)
diffusion = probdiff.Diffusion(schedule, network, data.likelihood(), reverse_variance="forward")
fit = probdiff.fit(diffusion, data.train, iterations=ITERATIONS, batch_size=512, learning_rate=2e-3, progress=False)

# %% [markdown]
# ## From the bound to a DataTree
#
# `az.summary(tree)` reads the group `posterior`. There each draw is a datum, with its prior KL, its KL for ten ranges of steps, its
# reconstruction and its bound, averaged over the draws of noise. `per_datum` holds each draw of noise, and `per_step` the KL of
# every step, `step_kl` with dimensions (chain, draw, step, datum). All draws of noise are independent, within a step and between
# steps, so that they can be cut into chains.

# %%
import arviz as az  # after NumPyro: ArviZ 1.3 imported first leaves numpyro.distributions incomplete

x = data.test[:NUM_DATA]
terms = probdiff.elbo_terms(fit.diffusion, x, key=jax.random.key(1), num_draws=NUM_DRAWS)
tree = probdiff.to_datatree(terms)
step_kl = tree["per_step"]["step_kl"]
chosen = np.linspace(2, NUM_STEPS, 8).round().astype(int)

print(f"{NUM_DATA} data, {NUM_DRAWS} draws each, N = {NUM_STEPS} steps; nats per datum")
print(f"ELBO {tree['posterior']['elbo'].mean():.3f}, true log-density of these data {data.log_prob(x).mean():.3f}")
print("\naz.summary: the terms, a sample of the data")
print(az.summary(tree).to_string())

# %% [markdown]
# ## What is the Monte Carlo error of the KL of a step?
#
# The bound is a mean over data, so the mean over data is taken first; only the noise is left to vary. The draws are cut
# into chains, so that `r_hat` is defined; it is 1 up to chance. In `az.summary` read `mean`, and `mcse_mean` as its
# standard error; `sd` and the interval describe a single draw. The draws are independent, so the effective sample size
# is about their number, sometimes above and sometimes below; if it were far lower, successive draws would share noise.
# As the noise of different steps is independent, the squared errors of the steps add up to the squared error of
# Σ step KL.

# %%
over_data = step_kl.mean("datum")
chains = over_data.to_dataset()
ess, mcse = az.ess(chains)["step_kl"], az.mcse(chains)["step_kl"]

print("\naz.summary: KL of eight steps, mean over the data, draws in four chains")
print(az.summary(chains, coords={"step": chosen}).to_string())
print(
    f"\naz.ess of all {NUM_STEPS - 1} steps: mean {ess.mean():.0f}, from {ess.min():.0f} to {ess.max():.0f}; "
    f"about {NUM_DRAWS}, the number of draws, as they are independent"
)
print(f"Σ step KL: {over_data.sum('step').mean():.4f} ± {np.sqrt((mcse**2).sum()):.4f}, by az.mcse step by step")

# %% [markdown]
# Quantiles have an error, too. In `az.plot_mcse` each dot is the standard error of one quantile of the draws, and the
# lines are the standard errors of their mean and standard deviation. The dots rise towards the ends, where draws are few.

# %%
plot = az.plot_mcse(
    chains,
    coords={"step": chosen[[0, 4, 6]]},
    extra_methods=True,
    labeller=az.labels.DimCoordLabeller(),
    visuals={"xlabel": {"text": "quantile"}, "ylabel": {"text": "standard error, nats"}},
    figure_kwargs=FIGURE | {"figsize": (10, 3)},
)
plot.savefig("arviz_mcse.png")

# %% [markdown]
# ## Which steps cost most, and for which data?
#
# Now the draws are averaged, and the data are the sample: `sample_dims=["datum"]`. A long bar is a step that is easy
# for some data and hard for others. But the mean of each datum has a Monte Carlo error, printed below, which alone
# makes a 90% bar 3.3 errors long; a bar of that length says nothing about the data. A forest plot of all N steps would
# be unreadable: choose a few.

# %%
per_datum = step_kl.mean(["chain", "draw"])
error = az.mcse(step_kl.sel(step=chosen).to_dataset())["step_kl"].mean("datum")
plot = az.plot_forest(
    per_datum.to_dataset(),
    coords={"step": chosen},
    sample_dims=["datum"],
    ci_probs=(0.5, 0.9),
    labels=["step"],
    figure_kwargs=FIGURE | {"figsize": (8, 4), "width_ratios": [1, 9]},
)
plot.get_target("step_kl", {"column": "forest"}).set_xlabel("KL of the step, nats: mean, 50% and 90% of the data")
plot.savefig("arviz_forest.png")

print("\nThe same steps: spread over the data, nats")
for n in chosen:
    low, high = per_datum.sel(step=n).quantile([0.05, 0.95]).values
    print(f"step {n:3}: 90% of the data in {low:.3g} … {high:.3g}, each ± {error.sel(step=n):.2g} (Monte Carlo error)")

# %% [markdown]
# ## How much does one evaluation of the network say about the mean?
#
# An update of the fit evaluates each datum with one draw, at one step. `az.plot_lm` plots a value against a covariate,
# here the step, with bands over draws and data. It takes the value from `posterior_predictive` and the covariate from
# `constant_data`, and requires `observed_data`, which is not shown; the variables' names become the labels. Smoothing,
# which is the default, is off. The wider the band, the less one draw says about the mean.

# %%
value = step_kl.to_dataset(name="KL of step n, nats")
groups = {
    "posterior_predictive": value,
    "constant_data": xr.Dataset({"step n": step_kl["step"]}),
    "observed_data": value.mean(["chain", "draw", "datum"]),
}
plot = az.plot_lm(
    xr.DataTree.from_dict(groups),
    plot_dim="step",
    sample_dims=["chain", "draw", "datum"],
    ci_prob=(0.5, 0.9),
    smooth=False,
    visuals={"observed_scatter": False},
    figure_kwargs=FIGURE | {"figsize": (8, 4)},
)
plot.add_legend("prob", title="line: mean; bands: 50% and\n90% of draws and data")
plot.savefig("arviz_lm.png")

# %% [markdown]
# ## Can the guide serve as the proposal of importance sampling?
#
# `Trace_ELBO` on one path is its log weight, log p(x, z) − log q(z | x). The bound is the mean of the log weights; the
# log of the mean weight estimates log p(x). Trust this estimate for a datum if the right tail of its weights is light:
# Pareto k-hat below 1 − 1/log10(draws), and at most 0.7. k-hat is itself an estimate, ± (1 + k)/√(draws in the tail),
# about 0.15 here. Three pitfalls: `psislw` takes *negated* log weights; `pareto_khat(log_weights=True)` does not
# exponentiate, and fits the tail of the log weights; equal weights, the ideal case, raise
# `ValueError: All tail values are the same`.
#
# k-hat does not measure the gap of the bound. It depends on the right tail alone. The gap, log of the mean weight minus
# mean log weight, depends on the whole spread: broad weights with a light tail have a small k-hat and a large gap.
# Report both.

# %%
both = probdiff.diagnostics.compute_both_ways(fit.diffusion, x, key=jax.random.key(2), num_draws=NUM_DRAWS)
log_weights = xr.DataArray(both.path.astype(np.float64), dims=["draw", "datum"])
_, k_hat = (-log_weights).azstats.psislw(dim="draw")
gap = np.logaddexp.reduce(log_weights.values) - np.log(NUM_DRAWS) - log_weights.values.mean(0)
good_k = min(1 - 1 / np.log10(NUM_DRAWS), 0.7)
label = f"Pareto k-hat (good below {good_k:.2f})"

plot = az.plot_khat(
    k_hat.to_dataset(name="pareto_k"),
    hline_values=[good_k],
    visuals={"hlines": {"linestyle": "--"}, "xlabel": {"text": "datum"}, "ylabel": {"text": label}},
    figure_kwargs=FIGURE | {"figsize": (8, 3.5)},
)
plot.savefig("arviz_khat.png")

print(f"\nBound of the terms minus bound of the paths: {both.difference[0]:.3f} ± {both.difference[1]:.3f} nats")
print(f"k-hat of {NUM_DATA} data: median {k_hat.median():.2f}, largest {k_hat.max():.2f}; good below {good_k:.2f}")
print(f"gap of the bound from the weights: mean {gap.mean():.3f}, from {gap.min():.3f} to {gap.max():.3f} nats")
print(f"correlation of k-hat and gap over the data: {np.corrcoef(k_hat, gap)[0, 1]:.2f}")
