# %% [markdown]
# # How good is a posterior that a conditional diffusion learns from simulations?
#
# Simulation-based inference: parameters θ are drawn from a prior, data x are simulated given them, and p(θ | x) is fitted to the pairs; θ is the
# datum and x its context. The two tasks are from the benchmark of Lueckmann et al. (2021, arXiv:2101.04653), with its simulators, observations
# and reference posteriors from `sbibm-jax`: `two_moons` (two crescents, a hundredth of the prior's width thick) and `gaussian_linear` (ten
# dimensions). The density of both posteriors is known; the bound and the flow's density are compared with it, in nats.
#
# Errors (±) are one standard error, over observations or test pairs. The figures are saved to the current directory.

# %%
import argparse
import time
import warnings

import jax
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sbibm_jax import get_task
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

import probdiff

parser = argparse.ArgumentParser(description="How good is a posterior that a conditional diffusion learns from simulations?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
parser.add_argument("--task", choices=["two_moons", "gaussian_linear"], action="append", help="only this task")
arguments = parser.parse_args()
quick = arguments.quick
TASKS = arguments.task or ["two_moons", "gaussian_linear"]
SIZES = (200,) if quick else (1_000, 10_000, 30_000)
OBSERVATIONS = range(1, 3 if quick else 11)
TEST, FLOWS = (20, 4) if quick else (2_000, 300)  # pairs for the bound, and for the flow
SAMPLES = {"two_moons": 10_000, "gaussian_linear": 1_000}  # in each of the two sets that the classifier separates
MORE = (50, 100) if quick else (1_000, 10_000)  # the same, for the effect of the number of samples
KNOWN = 4 if quick else 100  # reference samples for the optimal classifier
NOISE = 0.5 if quick else 0.05  # Monte Carlo error of the bound, in units of the error over the pairs
PAIRS, RANKS = (20, 19) if quick else (400, 99)  # for calibration
if quick:
    SAMPLES = {name: 100 for name in SAMPLES}

# %% [markdown]
# ## Simulations, and the exact posterior
#
# Two moons: x = p + m(θ) with m(θ) = (−|θ₁ + θ₂|, θ₂ − θ₁) / √2 and p on a half-circle of radius about 0.1. For each θ a second θ has the same m.
# p(θ | x) is the density of p at x − m(θ), divided by Z(x): the probability that a random p leads to a θ inside the prior's square, counted
# for each of the two θ. Z is a mean over draws of p. The reference posteriors are made in the same way.
#
# Gaussian linear: θ ~ N(0, 0.1 I) and x ~ N(θ, 0.1 I), so that θ | x ~ N(x/2, 0.05 I).


# %%
def simulate(name, size, seed):
    """Pairs of θ and x."""
    prior, start, noise = jax.random.split(jax.random.key(seed), 3)
    theta = get_task(name).get_prior(prior, size)
    return np.asarray(theta), np.asarray(get_task(name).get_simulator(start)(noise, theta))


def two_moons_log_prob(theta, x, draws=4_000):
    """log p(θ | x), nats, of a θ that x can come from."""
    params = get_task("two_moons").simulator_params
    loc, scale, offset = params["r_loc"], params["r_scale"], params["base_offset"]
    rng = np.random.default_rng(0)
    angle, radius = rng.uniform(-np.pi / 2, np.pi / 2, draws), rng.normal(loc, scale, draws)
    p = np.stack([np.cos(angle) * radius + offset, np.sin(angle) * radius], -1)
    away, along = np.moveaxis(p - x[:, None], -1, 0)  # |θ₁ + θ₂| / √2 and (θ₁ − θ₂) / √2
    reach = ((away >= 0) & (np.abs(away) + np.abs(along) <= np.sqrt(2))).mean(1)
    here = x - np.stack([-np.abs(theta.sum(1)), theta[:, 1] - theta[:, 0]], -1) / np.sqrt(2) - [offset, 0]
    found = np.hypot(*here.T)
    log_density = -np.square((found - loc) / scale) / 2 - np.log(scale * np.sqrt(2 * np.pi)) - np.log(np.pi * found)
    return log_density - np.log(2 * reach)


def gaussian_linear_log_prob(theta, x):
    """log p(θ | x), nats."""
    return -(np.square(theta - x / 2) / 0.05 + np.log(2 * np.pi * 0.05)).sum(1) / 2


LOG_PROB = {"two_moons": two_moons_log_prob, "gaussian_linear": gaussian_linear_log_prob}

# %% [markdown]
# ## The fit
#
# Nine tenths of the simulations are for training; one tenth decides which of the averaged parameters are kept. Both θ and x are standardised. The
# networks were chosen by the bound on held-out simulations of each size, and by the C2ST (see below) of one observation.


# %%
def model(name, size, likelihood):
    """The untrained model of a task."""
    if name == "two_moons":
        steps, top = 200, 12.0
        network = {"num_harmonics": 3} | ({"hidden": 64, "num_blocks": 2} if size <= 1_000 else {"hidden": 128, "num_blocks": 3})
    else:
        steps, top, network = 100, 8.0, {"hidden": 16, "num_blocks": 1, "dropout": 0.5 if size <= 1_000 else 0.1}
    if quick:
        steps, network = 8, {"hidden": 8, "num_blocks": 1}
    dim = get_task(name).dim_theta
    mlp = probdiff.MLP(dim, key=jax.random.key(0), context_dim=get_task(name).dim_x, **network)
    return probdiff.Diffusion(probdiff.log_snr_schedule(steps, top, -6.0), probdiff.networks.DensityHead(mlp), likelihood, "optimal")


# Iterations and the peak of the learning rate, by the number of simulations.
UPDATES = {
    "two_moons": {1_000: (2_000, 2e-3), 10_000: (6_000, 2e-3), 30_000: (10_000, 2e-3)},
    "gaussian_linear": {1_000: (600, 5e-3), 10_000: (4_000, 5e-3), 30_000: (6_000, 5e-3)},
}


class Posterior:
    """A model fitted to simulations, and how it standardises x.

    Attributes:
        diffusion: The fitted model.
        seconds: CPU time of the fit, with compilation and validation.
    """

    def __init__(self, name, size):
        theta, x = simulate(name, size, seed=0)
        train, held_out = np.split(np.arange(size), [size - size // 10])
        self.mean, self.spread = x[train].mean(0), x[train].std(0)
        iterations, rate = (20, 1e-3) if quick else UPDATES[name][size]
        start = time.process_time()
        self.diffusion = probdiff.fit(
            model(name, size, probdiff.NormalLikelihood.standardized(theta[train])),
            theta[train],
            context=self.context(x[train]),
            validation=theta[held_out],
            validation_context=self.context(x[held_out]),
            validate_every=iterations // 20,
            iterations=iterations,
            batch_size=256,
            learning_rate=rate,
            elbo="kl_combined",
            progress=False,
        ).diffusion
        self.seconds = time.process_time() - start

    def context(self, x):
        """x, standardised."""
        return (np.asarray(x) - self.mean) / self.spread

    def sample(self, x, size, seed):
        """Samples of θ for one x, shape ``(size, dim)``."""
        rows = np.repeat(self.context(x), size, 0)
        return probdiff.samplers.probability_flow(self.diffusion, context=rows, key=jax.random.key(seed), steps=8 if quick else 30)


# %% [markdown]
# ## C2ST
#
# The classifier two-sample test (C2ST) is the accuracy of a classifier that separates samples from reference samples; 0.5 is chance. The definition is the benchmark's: a multilayer
# perceptron of scikit-learn with two hidden layers of ten units per dimension, accuracy over five folds, all standardised by the reference samples. It stops after 1000 passes at
# most, and after 10 000 in the benchmark; it converged before either. Samples outside the prior's support cannot come from the posterior. The C2ST is given for the samples as they
# are, and with those samples drawn again, which is the "leakage correction" of neural posterior estimation (NPE).


# %%
def c2st(samples, reference):
    """Accuracy of the benchmark's classifier, for equally many samples and reference samples."""
    scaled = (np.concatenate([reference, samples]) - reference.mean(0)) / reference.std(0)
    labels = np.repeat([0, 1], len(reference))
    units = 10 * samples.shape[1]
    classifier = MLPClassifier((units, units), activation="relu", solver="adam", max_iter=1000, random_state=1)
    with warnings.catch_warnings(action="ignore" if quick else "default"):
        return cross_val_score(classifier, scaled, labels, cv=KFold(5, shuffle=True, random_state=1)).mean()


def inside(name, theta):
    """Whether θ is in the prior's support."""
    return np.all(np.abs(theta) <= 1, 1) if name == "two_moons" else np.full(len(theta), True)


def compare_with_reference(name, posterior, number, size):
    """Samples in the support; and the C2ST of the samples as they are, the C2ST of those in the support, and the share outside."""
    task = get_task(name)
    x, reference = task.get_observation(number), np.asarray(task.get_reference_posterior_samples(number))[:size]
    samples = posterior.sample(x, size, seed=number)
    kept = samples[inside(name, samples)]
    outside, score = 1 - len(kept) / size, c2st(samples, reference)
    if outside == 0:
        return samples, {"C2ST": score, "in the support": score, "outside": 0.0}
    for seed in range(100, 200):
        if len(kept) >= size:
            break
        more = posterior.sample(x, size, seed)
        kept = np.concatenate([kept, more[inside(name, more)]])[:size]
    return kept, {"C2ST": score, "in the support": c2st(kept, reference), "outside": outside}


def shown(values, digits=3):
    """Mean and standard error of the mean, as text."""
    values = np.asarray(values)
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / np.sqrt(len(values)):.{digits}f}"


fitted, drawn, rows = {}, {}, []
for name in TASKS:
    for size in SIZES:
        posterior = fitted[name, size] = Posterior(name, size)
        found = []
        for number in OBSERVATIONS:
            drawn[name, size, number], scores = compare_with_reference(name, posterior, number, SAMPLES[name])
            found.append(scores)
        found = pd.DataFrame(found)
        rows.append({"task": name, "simulations": size, **{column: shown(found[column]) for column in found}, "s of fitting": round(posterior.seconds)})
        print(*(f"{key}: {value}" for key, value in rows[-1].items()), sep="  ", flush=True)
        print("  each observation:", *found["C2ST"].round(3), flush=True)
print(f"\nC2ST of {SAMPLES} samples against as many")
print(pd.DataFrame(rows).to_string(index=False), flush=True)

# %% [markdown]
# With few samples a classifier is less accurate. For the largest number of simulations, the C2ST of observation 1 is printed for two numbers of samples. For all sizes, the accuracy of
# the optimal classifier is printed, which knows both densities, p of the posterior and q of the flow: ½ + ½ E_p[max(0, 1 − q/p)] (errors of q count against the model).
# A C2ST exceeds it only by chance, whatever the number of samples.


# %%
def best_accuracy(name, posterior, number):
    """Accuracy of the classifier that knows both densities."""
    task = get_task(name)
    theta = np.asarray(task.get_reference_posterior_samples(number))[-KNOWN:]
    x = np.repeat(np.asarray(task.get_observation(number)), KNOWN, 0)
    flow = probdiff.flow_likelihood(posterior.diffusion, theta, context=posterior.context(x), key=jax.random.key(number))
    ratio = np.exp(flow.log_prob[0] - LOG_PROB[name](theta, x))
    return 0.5 + np.maximum(0, 1 - ratio).mean() / 2


for name in TASKS[:1] if quick else TASKS:
    scores = {size: compare_with_reference(name, fitted[name, SIZES[-1]], 1, size)[1]["C2ST"] for size in MORE}
    print(f"\n{name}, {SIZES[-1]} simulations: C2ST of observation 1", *(f"{score:.3f} ({size} samples)" for size, score in scores.items()), flush=True)
    for size in SIZES:
        print(f"  {size}: optimal classifier", shown([best_accuracy(name, fitted[name, size], number) for number in OBSERVATIONS]), flush=True)

# %% [markdown]
# ## Bound and flow, in nats
#
# The test pairs were used in no fit. The bound is of the reverse chain; the flow's density is of another model, a differential equation with the same network. On average over x,
# log p(θ | x) minus the flow's log density is the KL divergence of the fitted posterior from the exact one; minus the bound, it is that KL divergence for the chain plus the gap of the bound.

# %%
for name in TASKS[:1] if quick else TASKS:
    theta, x = simulate(name, TEST, seed=1)
    exact = LOG_PROB[name](theta, x)
    print(f"\n{name}: log p(θ | x) {shown(exact)} nats, {TEST} test pairs; {FLOWS} for the flow")
    table = {}
    for size in SIZES:
        posterior = fitted[name, size]
        context = posterior.context(x)
        elbo = probdiff.elbo.data_set_elbo(posterior.diffusion, theta, context=context, key=jax.random.key(2), noise_share=NOISE).elbo
        flow = probdiff.flow_likelihood(posterior.diffusion, theta[:FLOWS], context=context[:FLOWS], key=jax.random.key(3)).log_prob[0]
        table[size] = {
            "bound": shown(elbo),
            "log p − bound": shown(exact - elbo),
            "log p − flow": shown(exact[:FLOWS] - flow),
            "flow − bound, the same pairs": shown(flow - elbo[:FLOWS]),
        }
    print(pd.DataFrame.from_dict(table, orient="index").to_string(), flush=True)

# %% [markdown]
# ## Calibration
#
# Simulation-based calibration (Talts et al. 2018, arXiv:1804.06788): if the posterior is right, the rank of θ among samples given its own x is uniform, in
# each coordinate. ArviZ plots the empirical distribution function (ECDF) of the ranks minus that of the uniform distribution, and tests it. Its simultaneous
# band (Säilynoja et al. 2022) is of 99.5 %, so that all ten coordinates are inside with a probability of at least 95 %. As a negative control, each θ is also
# ranked among the samples for the x of another pair.

# %%
import arviz as az  # (After sbibm_jax: imported before it, ArviZ leaves NumPyro imported incompletely.)
from arviz_stats.ecdf_utils import compute_ecdf, ecdf_pit

BAND = 0.995
if "gaussian_linear" in TASKS:
    posterior = fitted["gaussian_linear", SIZES[-1]]
    theta, x = simulate("gaussian_linear", PAIRS, seed=2)
    samples = np.reshape([posterior.sample(x[i : i + 1], RANKS, seed=i) for i in range(PAIRS)], (PAIRS, RANKS, -1))
    uniform = np.random.default_rng(0).uniform(size=theta.shape)
    pit = {}
    for label, of in (("own x", samples), ("x of another", np.roll(samples, 1, 0))):
        pit[label] = ((of < theta[:, None]).sum(1) + uniform) / (RANKS + 1)
    coordinates = [f"θ{k + 1}" for k in range(theta.shape[1])]
    dims = {label: ["coordinate"] for label in pit}
    tree = az.from_dict({"prior_sbc": {label: each[None] for label, each in pit.items()}}, dims=dims, coords={"coordinate": coordinates})
    p_values = tree["prior_sbc"].dataset.azstats.uniformity_test(dim=["chain", "draw"], method="pot_c")[0]
    layout = {"col_wrap": 5, "figure_kwargs": {"figsize": (12, 9.5), "layout": "constrained"}}
    plots = az.plot_ecdf_pit(tree, group="prior_sbc", envelope_prob=BAND, backend="matplotlib", visuals={"p_value_text": False}, **layout)
    print(f"\nranks of {PAIRS} θ among {RANKS} samples, gaussian_linear, {SIZES[-1]} simulations")
    points, _, lower, upper = ecdf_pit(uniform[:, 0], BAND, n_simulations=200 if quick else 10_000)
    for label, each in pit.items():
        curves = np.stack([compute_ecdf(values, points) for values in each.T])
        out = np.maximum(curves - upper, lower - curves).max(1)
        print(f"{label}: {(out <= 0).sum()} of {len(out)} coordinates inside the band; furthest out by {out.max():.3f}; ", end="")
        print(f"p-values of uniformity {float(p_values[label].min()):.2g} to {float(p_values[label].max()):.2g}")
        for axes, coordinate in zip(plots.viz["plot"][label].values, coordinates):
            axes.fill_between(points, lower - points, upper - points, step="mid", color="C2", alpha=0.2, lw=0)
            axes.set(title=f"{coordinate}, {label}", ylim=(-0.2, 0.2), ylabel="Δ ECDF" if axes.get_subplotspec().is_first_col() else "")
    plots.savefig("posterior_estimation_calibration.png")
    print("figure: posterior_estimation_calibration.png")

# %% [markdown]
# ## The figure of the moons

# %%
if "two_moons" in TASKS:
    shown_observations = tuple(OBSERVATIONS)[:2]
    figure = Figure(figsize=(3.2 * len(SIZES) + 3.2, 6.4), dpi=110, layout="constrained")
    axes = figure.subplots(len(shown_observations), len(SIZES) + 1, sharex="row", sharey="row", squeeze=False)
    for row, number in zip(axes, shown_observations):
        reference = np.asarray(get_task("two_moons").get_reference_posterior_samples(number))[: SAMPLES["two_moons"]]
        columns = {"reference": reference, **{f"{size} simulations": drawn["two_moons", size, number] for size in SIZES}}
        for ax, (label, theta) in zip(row, columns.items()):
            ax.plot(*reference[:3_000].T, ".", ms=1, color="0.75", rasterized=True)
            if label != "reference":
                ax.plot(*theta[:3_000].T, ".", ms=1, color="C0", alpha=0.5, rasterized=True)
            ax.set(title=f"observation {number}: {label}", xlabel="θ₁", aspect="equal")
            ax.title.set_fontsize("medium")
        row[0].set_ylabel("θ₂")
    figure.savefig("posterior_estimation_two_moons.png")
    print("figure: posterior_estimation_two_moons.png")
