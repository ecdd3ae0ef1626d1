# %% [markdown]
# # Which noise schedule?
#
# In continuous time the bound depends on a schedule only through the log-SNR at its two ends: Kingma et al. (2021),
# arXiv:2107.00630 [K], section 5.1. With N steps three more things depend on it, one section each: how the KL is
# distributed over the steps, how much a one-step estimate varies, and how large the gap of the bound is.
#
# The data are eight Gaussians, whose density and exact ε-network are known: nothing is trained, so that all differences
# are due to the schedule. Errors (±) are one standard error over data and noise, unless said otherwise. Figures are saved
# to the current directory.

# %%
import argparse

import jax
import numpy as np
from matplotlib.figure import Figure

import probdiff

parser = argparse.ArgumentParser(description="Which noise schedule?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

NUM_STEPS, NUM_DATA, PROFILE_DATA, DRAWS = (30, 32, 16, 4) if quick else (1000, 500, 128, 48)
ESTIMATES, UPDATES = (50, 20) if quick else (4000, 300)
SIZES, EVALUATIONS = ((20,), 2_000) if quick else ((10, 30, 100, 300, 1000, 3000), 4_000_000)
Z_MAX = 4.9  # standard errors
SCHEDULES = {
    "log-SNR-linear": probdiff.log_snr_schedule,
    "linear": probdiff.linear_schedule,
    "cosine": probdiff.cosine_schedule,
}
ESTIMATORS = ("kl_uniform", "kl_stratified", "kl_importance", "kl_combined")
if quick:  # at this size most of the time goes into compiling
    jax.config.update("jax_disable_most_optimizations", True)
    del SCHEDULES["cosine"]
    ESTIMATORS = ESTIMATORS[::3]
FIGURE = {"figsize": (9, 4), "dpi": 130, "layout": "constrained"}

data = probdiff.datasets.load("8gaussians")
likelihood = data.likelihood()
x = data.test[:NUM_DATA]


def exact(schedule, reverse_variance="forward"):
    """The diffusion with the exact network for the data."""
    network = data.exact_network(schedule, likelihood)
    return probdiff.Diffusion(schedule, network, likelihood, reverse_variance=reverse_variance)


def estimate(values):
    """Mean of independent values, and its standard error."""
    values = np.asarray(values, np.float64)
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def shown(value, digits):
    """A mean and its error as text."""
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def row(name, *cells):
    """Print a row of a table."""
    print(f"{name:15}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


def entropy_gap(x, elbo):
    """log p − ELBO, paired datum by datum: its mean and error. It is not negative, except by its error."""
    gap, error = estimate(data.log_prob(x) - np.asarray(elbo, np.float64))
    assert gap >= -Z_MAX * error, f"a bound above log p: gap {gap} ± {error}"
    return gap, error


mean_log_p = shown(estimate(data.log_prob(x)), 4)
print(f"{NUM_DATA} data, mean log p {mean_log_p} nats; entropy {data.entropy()[0]:.4f} nats", flush=True)

# %% [markdown]
# ## 1. How does each schedule distribute the KL over the steps?
#
# Left: the KL of each step against n/N. Linear and cosine have a third of their KL in the first hundredth of the steps.
# Log-SNR-linear spreads it evenly at first, and over more than half of the steps.
#
# Right: the same KLs per unit of log-SNR. The three curves coincide: ½ E‖ε − ε̂‖² at that log-SNR, a property of the data
# alone. It is d/2 = 1 while z_n has so little noise that the network cannot separate it from the spread of a Gaussian,
# about 0.6 while the noise hides that spread but not which Gaussian the datum is from, and falls to 0 as the eight
# merge. A schedule determines only how many steps fall on each part of that curve.

# %%
SHARES = (0.01, 0.1, 0.5)
few = x[:PROFILE_DATA]
print(f"\n1. KL of the steps, nats, N = {NUM_STEPS}: {len(few)} data, {DRAWS} draws each; share up to n/N, %")
row("schedule", "all steps", *(f"n/N ≤ {share}" for share in SHARES), "n = 2")
figure = Figure(**FIGURE)
left, right = figure.subplots(1, 2)
progress = np.arange(2, NUM_STEPS + 1) / NUM_STEPS
for name, make in SCHEDULES.items():
    diffusion = exact(make(NUM_STEPS))
    terms = probdiff.elbo_terms(diffusion, few, key=jax.random.key(1), num_draws=DRAWS)
    entropy_gap(few, terms.elbo.mean(0))
    kl = np.asarray(terms.step_kl.mean(0), np.float64)  # (step, datum)
    total = kl.sum(0)
    shares = (100 * kl[progress <= share].sum(0) / total for share in SHARES)
    row(name, shown(estimate(total), 3), *(shown(estimate(each), 1) for each in shares), shown(estimate(kl[0]), 4))

    log_snr = diffusion.schedule.log_snr
    middle, length = (log_snr[1:] + log_snr[:-1]) / 2, -np.diff(log_snr)[:, None]
    for axes, place, height in ((left, progress, kl * NUM_STEPS), (right, middle, kl / length)):
        (line,) = axes.plot(place, height.mean(1), label=name, lw=1.2)
        axes.fill_between(place, *np.quantile(height, (0.05, 0.95), axis=1), color=line.get_color(), alpha=0.2, lw=0)
left.set(xlabel="share of the steps, n / N", ylabel="KL of step n times N, nats", yscale="log")
right.set(xlabel="log-SNR (noisier to the left)", ylabel="KL of step n per unit of log-SNR, nats", xlim=(-12, 10))
left.legend(title=f"mean; band: 90% of the data,\nthe noise of {DRAWS} draws included", frameon=False)
figure.savefig("schedules_profile.png")

# %% [markdown]
# ## 2. How much does a one-step estimate vary?
#
# The three schedules have their log-SNR stretched to the same two ends. The bound is then nearly the same, but the
# variance from one step is not: a step that is long in log-SNR has a large term, and is drawn no more often.
#
# [K, fig. 4b] has the variance of bits/dim for images in continuous time, where no reconstruction is among the steps.
# Its counterpart here has n uniform on 2 … N. `kl_uniform` draws n = 1, too: that term, ½‖ε − ε̂‖², is about 1 nat however
# small the steps are, so that with weight N it adds some N E(½‖ε‖²)² = 2N nats², at N = 1000 some 1041 (bits/dim)², to
# every schedule.
#
# The order is that of [K]; the ratios are not. They depend on the data, and for linear and cosine on N: the length of
# their first steps in log-SNR does not depend on N, about log(n/(n − 1)) for step n, so that their terms do not shrink
# while the weight N grows. (A path of finite slope in continuous time has a limit.) `kl_stratified` spreads n evenly
# over the data, so that its variance is that of the mean over the data, times their number. `kl_importance` learns how
# often to draw each n, `kl_combined` does both and subtracts a control variate: with these two the schedule makes hardly
# any difference. The last column is the bound by `kl_combined`, with its Monte Carlo error.

# %%
PUBLISHED = {"log-SNR-linear": "1", "linear": "31.6/6.35 = 5.0", "cosine": "31.1/6.35 = 4.9"}
BITS = -probdiff.elbo.bits_per_dim(1.0, data.dim)  # of one nat


def stretched(make, num_steps, first=10.0, last=-8.0):
    """A schedule of the shape that ``make`` gives, with its log-SNR stretched to given ends."""
    path = make(num_steps + 1).log_snr[:-1]  # without the step at which cosine is cut off at β = 0.999
    log_snr = np.interp(path, (path[-1], path[0]), (last, first))
    return probdiff.NoiseSchedule.from_betas(-np.expm1(np.diff(-np.logaddexp(0, -log_snr), prepend=0.0)))


def variance_of_steps(diffusion, draws):
    """Variance of (N − 1) times term n, n uniform on 2 … N: its mean over the data and error, (bits/dim)².

    A term is the KL minus its value for a network that knows the noise, which is constant.
    """
    terms = probdiff.elbo_terms(diffusion, x, key=jax.random.key(2), num_draws=draws)
    entropy_gap(x, terms.elbo.mean(0))
    constant = data.dim * diffusion.kernel.constant(diffusion.schedule)[1:, None]
    term = BITS * (np.asarray(terms.step_kl, np.float64) - constant)
    return estimate(term.shape[1] * np.square(term).sum(1).mean(0) - np.square(term.sum(1).mean(0)))


def ratio(variance, reference):
    """The ratio of two estimates, with its error if they are independent."""
    value = variance[0] / reference[0]
    return value, value * np.hypot(variance[1] / variance[0], reference[1] / reference[0])


def means_over_data(diffusion, name):
    """Many estimates of the mean bound, bits/dim, from one step per datum; learned parts of the estimator are learned first."""
    guide, objective = probdiff.ESTIMATORS[name](diffusion, adapt_to="value")

    def update(state, key):
        return objective.loss_with_mutable_state(key, state, diffusion.model, guide, x)["mutable_state"] or {}, None

    @jax.jit
    def draw(learning, keys):
        learned, _ = jax.lax.scan(update, objective.initial_state, learning)
        return jax.lax.map(lambda key: objective.per_datum(key, x, learned).mean(), keys)

    keys = jax.random.split(jax.random.key(3), UPDATES + ESTIMATES)
    return -BITS * np.asarray(draw(keys[:UPDATES], keys[UPDATES:]), np.float64)


print(f"\n2. Equal ends of log-SNR, N = {NUM_STEPS}: {NUM_DATA} data. Variance of one estimate of a datum, (bits/dim)²")
row("schedule", "n = 2 … N", "ratio", "at 4N", "published", *ESTIMATORS, "bound, bits/dim")
figure = Figure(**FIGURE)
left, right = figure.subplots(1, 2, width_ratios=(2, 3))
reference = None
for k, (name, make) in enumerate(SCHEDULES.items()):
    diffusion, finer = (exact(stretched(make, steps)) for steps in (NUM_STEPS, 4 * NUM_STEPS))
    steps = [variance_of_steps(diffusion, 8), variance_of_steps(finer, 2)]
    reference = reference or steps
    ratios = [shown(ratio(*pair), 2) if k else "1" for pair in zip(steps, reference)]
    means = [means_over_data(diffusion, estimator) for estimator in ESTIMATORS]
    bounds = [estimate(each) for each in means]
    for bound, error in bounds:
        z = (bound - bounds[-1][0]) / np.hypot(error, bounds[-1][1])
        assert abs(z) <= Z_MAX, f"the estimators disagree: {bounds}"
    variances = [steps[0], *(estimate(NUM_DATA * np.square(each - each.mean())) for each in means)]
    texts = [shown(each, 1) for each in variances]
    row(name, texts[0], *ratios, PUBLISHED[name], *texts[1:], shown(bounds[-1], 4))

    left.plot(np.arange(1, NUM_STEPS + 1) / NUM_STEPS, diffusion.schedule.log_snr, label=name)
    height, error = np.transpose(variances)
    right.bar(np.arange(len(height)) + 0.27 * (k - 1), height, 0.25, yerr=2 * error, capsize=2)
left.set(xlabel="share of the steps, n / N", ylabel="log-SNR")
left.legend(frameon=False)
right.set(ylabel="variance of one estimate, (bits/dim)², ± 2 s.e.", yscale="log")
right.set_xticks(range(1 + len(ESTIMATORS)), ("uniform on\nn = 2 … N", *ESTIMATORS), fontsize="small")
figure.savefig("schedules_variance.png")

# %% [markdown]
# ## 3. How large is the gap at N steps?
#
# The gap is E log p − ELBO, paired datum by datum, from all steps with a control variate, on the same data at every N.
# With the reverse variance β_n ("forward") it is smaller than with β̃_n ("posterior") at every N. Where c/N fits the gap
# at the four largest N within errors, the last column is the N of a gap of 0.01 nats: about a thousand steps with β_n.
#
# The reason is the plateau of section 1. While the network cannot predict the noise, β_n is the optimal variance: a step
# costs d/2 times its length in log-SNR however long it is, and adds no gap. With β̃_n it costs more. In the first steps of
# linear and cosine, whose lengths are about log(n/(n − 1)) at any N, the excess is d/2 Σ [1/(n − 1) − log(n/(n − 1))].
# That is d/2 times Euler's constant, 0.577 nats, which no number of steps removes.

# %%
print(f"\n3. log p − ELBO, nats: {NUM_DATA} data, {EVALUATIONS:.0e} network evaluations for each number")
row("schedule", "variance", *(f"N = {size}" for size in SIZES), "0.01 at N")
figure = Figure(**FIGURE)
axes = figure.subplots()
axes.axhline(data.dim / 2 * np.euler_gamma, color="k", lw=0.8, ls="--", label="d/2 × Euler's constant")
axes.axhline(0.01, color="k", lw=0.8, ls=":")
large = np.array(SIZES[-4:])
for k, (name, make) in enumerate(SCHEDULES.items()):
    gap = {}
    for variance, marker in (("posterior", "o"), ("forward", "s")):
        gaps = []
        for size in SIZES:
            bound = probdiff.AnalyticELBO(exact(make(size), variance), "all", control="linear").per_datum
            keys = jax.random.split(jax.random.key(4), max(2, EVALUATIONS // (NUM_DATA * size)))
            elbo = jax.jit(lambda keys, bound=bound: jax.lax.map(lambda key: bound(key, x), keys))(keys)
            gaps.append(entropy_gap(x, elbo.mean(0)))
        gap[variance], error = np.transpose(gaps)
        scaled, weight = gap[variance][-4:] * large, (error[-4:] * large) ** -2.0
        c, c_error = np.average(scaled, weights=weight), weight.sum() ** -0.5
        fits = np.all(np.abs(scaled - c) * np.sqrt(weight) <= Z_MAX)
        reached = shown((100 * c, 100 * c_error), 0) if fits else "not c/N"
        row(name, variance, *(shown(each, 4) for each in gaps), reached)
        style = {"color": f"C{k}", "mfc": "w" if variance == "posterior" else None, "ms": 4, "capsize": 2}
        place = np.array(SIZES) * 1.04 ** (k - 1)
        axes.errorbar(place, gap[variance], 2 * error, fmt=marker, label=f"{name}, {variance}", **style)
        axes.plot(large, c / large if fits else gap[variance][-4:], color=f"C{k}", lw=1, ls="-" if fits else ":")
    assert np.all(gap["forward"] < gap["posterior"]), f"{name}: {gap}"
axes.set(xlabel="number of steps, N", ylabel="mean of log p − ELBO, nats, ± 2 s.e.", ylim=(1e-3, 30))
axes.set(xscale="log", yscale="log")
title = "schedule, reverse variance\n(solid line: c/N, fitted)"
axes.legend(title=title, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
figure.savefig("schedules_gap.png")
print("\nfigures: schedules_profile.png, schedules_variance.png, schedules_gap.png")
