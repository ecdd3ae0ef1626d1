# %% [markdown]
# # What likelihood does the probability flow have, and is its difference from the ELBO an error?
#
# The probability flow is an ordinary differential equation defined by the ε-network. It gives a density, not a bound. But
# this is a density of z_1, it replaces q(z_N) by N(0, I), and a network that is a function of the step must be interpolated
# between steps. The likelihood of test data is compared with the bounds of the reverse chain and with the true density.
# Then, with the exact network, each of these three errors is compared with the value that `flow_likelihood` reports.
#
# The data are the moons. Errors (±) are one standard error over data and noise; differences are paired datum by datum.
# The figure is saved to the current directory.

# %%
import argparse
import time

import jax
import numpy as np
import numpyro
from matplotlib.figure import Figure

import probdiff
from probdiff.oracles import GaussianMixture
from probdiff.presets import default_diffusion, default_options

parser = argparse.ArgumentParser(description="What likelihood does the probability flow have?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

data = probdiff.datasets.load("moons")
options = default_options(data) | ({"num_steps": 8, "iterations": 20, "batch_size": 64} if quick else {})
N = options["num_steps"]
DATA, FEWER, DRAWS, PATHS = (8, 4, 1, 3) if quick else (2_000, 500, 2, 10)
SIZES, KNOWN, TOLERANCE = ((8,), 4, 1e-5) if quick else ((10, 30, 100, 300), 50, 1e-6)
ENDS = ((13.0, -8.0),) if quick else ((4.0, -2.0), (6.0, -4.0), (8.0, -6.0), (10.0, -8.0))  # of log-SNR
MANY, SHORT, LOOSE = (4, 8, 1e-5) if quick else (20_000, 2, 0.1)  # data, steps and tolerance for the errors at the ends
SAME = 1e-3  # nats

start = time.perf_counter()
rest = {name: options[name] for name in ("iterations", "batch_size", "learning_rate")}
model = default_diffusion(data, N)
if quick:
    model = probdiff.Diffusion(model.schedule, probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1), model.likelihood)
fit = probdiff.fit(model, data.train, key=jax.random.key(0), progress=False, **rest)
fitted, schedule, likelihood = fit.diffusion, fit.diffusion.schedule, fit.diffusion.likelihood
print(f"moons, N = {N}: fitted in {time.perf_counter() - start:.0f} s", flush=True)
numpyro.enable_x64()  # The fit was in float32; what follows is in float64.

# %% [markdown]
# ## Four likelihoods of the same data


# %%
def estimate(values):
    """Mean over data, and its standard error."""
    return values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def shown(values, digits=4):
    """A mean and its error as text."""
    return "{:.{d}f} ± {:.{d}f}".format(*estimate(np.asarray(values)), d=digits).rjust(20)


def bound(diffusion, x):
    """The bound of each datum, from all steps with a control variate."""
    per_datum = probdiff.AnalyticELBO(diffusion, "all", control="linear").per_datum
    evaluate = jax.jit(lambda keys, x: jax.lax.map(lambda key: per_datum(key, x), keys).mean(0))
    keys = jax.random.split(jax.random.key(1), DRAWS)
    return np.concatenate([evaluate(keys, part) for part in np.array_split(x, -(-len(x) // 100))])


def print_likelihoods(name, x, values):
    """Print a row for each likelihood: its mean, and its differences from the true log density and from the ELBO."""
    print(f"\n{name}, {len(x)} data{'nats':>25}{'minus log p':>20}{'minus the ELBO':>20}")
    for label, value in {"log p": data.log_prob(x), **values}.items():
        print(f"{label:36}{shown(value)}{shown(value - data.log_prob(x))}{shown(value - values['ELBO'])}", flush=True)


x, few = data.test[:DATA], data.test[:FEWER]
exact = probdiff.Diffusion(schedule, data.exact_network(schedule, likelihood), likelihood, "forward")
other = probdiff.Diffusion(schedule, fitted.network, likelihood, "posterior")
start = time.perf_counter()
flow = probdiff.flow_likelihood(fitted, x, key=jax.random.key(2))
print(f"\nThe fitted network ({time.perf_counter() - start:.0f} s)\n{flow}", flush=True)
elbo, flow = bound(fitted, x), flow.log_prob.mean(0)
print_likelihoods("Fitted network", x, {"ELBO": elbo, "ELBO, v_n = β̃_n": bound(other, x), "flow": flow})
iwae = probdiff.iwae(fitted, few, key=jax.random.key(3), num_particles=PATHS)[0]
print_likelihoods("Fitted network", few, {"ELBO": elbo[:FEWER], f"IWAE-{PATHS}": iwae, "flow": flow[:FEWER]})
print_likelihoods("Exact network", x, {"ELBO": bound(exact, x)})
exact_flow = probdiff.flow_likelihood(exact, few, key=jax.random.key(2)).log_prob.mean(0) - data.log_prob(few)
print(f"{'flow minus log p':36}{shown(exact_flow, 5)}, on {FEWER} data", flush=True)

# %% [markdown]
# (Findings of a run with N = 2000.) On average over the data, the ELBO of the fitted network is 0.006 nats below log p, and
# the flow 0.004, each with an error of 0.002. But the values of single data differ: the flow's distance from log p is tens of times its errors
# from interpolation, base and solver, as it is the density of another model. The ELBO is a bound on the density of the chain; with
# the exact network it still has most of its distance from log p (the cost of N Gaussian steps). The flow does not
# depend on v_n. With the exact network the flow is log p, and the difference is the gap of the ELBO. The difference is
# therefore no error: it compares two models, and a density with a bound.

# %%
apart = np.sqrt(np.mean(np.square(flow - data.log_prob(x))))
print(f"\nFitted network, flow minus log p of one datum: root mean square {apart:.3f} nats")
print(f"Flow minus IWAE-{PATHS}: {shown(flow[:FEWER] - iwae).strip()}, on {FEWER} data")

# %% [markdown]
# ## The error from interpolation
#
# With the exact network as a function of the noise level, and the true density of z_N for `base`, the flow's log density
# of z_1 is exact up to the solver's error. With the network as a function of the step, interpolated between steps, there
# is an error, which falls as 1/N². It is reported accurately where every second step would suffice; at N = 10 the report
# is three times too large.


# %%
oracle = data.oracle.standardized(likelihood.loc, likelihood.scale)


def marginal(schedule, n):
    """The distribution of z_n, a mixture."""
    alpha_bar, noise = schedule.alpha_bar[n - 1], schedule.one_minus_alpha_bar[n - 1]
    covariances = alpha_bar * oracle.covariances + noise * np.eye(data.dim)
    return GaussianMixture(oracle.weights, np.sqrt(alpha_bar) * oracle.means, covariances)


def setting(num_steps, first=13.0, last=-8.0):
    """A model with the exact network, its schedule, and a function that draws z_n given data."""
    schedule = probdiff.log_snr_schedule(num_steps, first, last)
    diffusion = probdiff.Diffusion(schedule, data.exact_network(schedule, likelihood), likelihood, "forward")

    def noised(x, n):
        return probdiff.forward_marginal(schedule, likelihood.encode(x), n).sample(jax.random.key(4))

    return diffusion, schedule, noised


def root_mean_square(values):
    """The root of the mean square over data, and its standard error."""
    mean, error = estimate(np.square(values))
    return np.sqrt(mean), error / (2 * np.sqrt(mean))


def print_row(name, *estimates):
    print(f"{name:24}" + "".join(f"{mean:.1e} ± {error:.0e}".rjust(20) for mean, error in estimates), flush=True)


x, interpolation = data.test[:KNOWN], {}
tolerances = {"rtol": TOLERANCE, "atol": TOLERANCE}
print(f"\nExact network, {KNOWN} data: error of log q(z_1) from interpolation, nats")
print(f"{'N; error of the solver':24}{'r.m.s., true':>20}{'r.m.s., reported':>20}{'mean, true':>20}{'mean, reported':>20}")
for size in SIZES:
    diffusion, schedule, noised = setting(size)
    z, base = noised(x, 1), marginal(schedule, size).log_prob
    log_q = marginal(schedule, 1).log_prob(z)
    solver = probdiff.flow.flow_log_prob(diffusion, z, base=base, **tolerances) - log_q
    solver = np.abs(solver).max()
    assert solver < SAME, f"the flow of the exact network is {solver} off"
    by_step = probdiff.Diffusion(schedule, diffusion.predict_noise, likelihood, "forward", dim=data.dim)
    true = probdiff.flow.flow_log_prob(by_step, z, base=base, **tolerances) - log_q
    reported = probdiff.flow_likelihood(by_step, x, key=jax.random.key(5), **tolerances).interpolation[0]
    interpolation[size] = [root_mean_square(true), root_mean_square(reported)]
    print_row(f"{size:3d}; up to {solver:.0e}", *interpolation[size], estimate(true), estimate(reported))

# %% [markdown]
# ## The errors at the two ends
#
# Neither error depends on N. The error of N(0, I) instead of q(z_N) depends on the last log-SNR; its mean is
# KL[q(z_N) ‖ N(0, I)]. The reported value, the prior KL, is an upper bound: nearly all of it is the information of z_N
# about x_0, which is no error of the flow. The error of reading log q(z_1) as log p(x) depends on the first log-SNR; its
# mean is the entropy of z_1 minus that of x, in the same units. The reported value is too small unless σ_1 is small
# compared with the spread of the moons, as the flow's `log_prob` is then itself a bound with a gap. The true errors are
# computed by quadrature. (No reported error uses the flow's solution, so that its tolerance may be loose.)


# %%
def base_error(schedule):
    """KL[q(z_N) ‖ N(0, I)], and its numerical error."""
    last = marginal(schedule, schedule.num_steps)
    square = last.weights @ np.square(last.means).sum(1) + np.trace(last.covariances[0])
    entropy, error = last.entropy()
    return (square + data.dim * np.log(2 * np.pi)) / 2 - entropy, error


def smoothing_error(schedule):
    """Entropy of z_1 minus the entropy of the data, in the units of the data, and the numerical error."""
    to_data = likelihood.log_jacobian(data.dim) + data.dim / 2 * np.log(schedule.alpha_bar[0])
    (smooth, smooth_error), (entropy, error) = marginal(schedule, 1).entropy(), data.entropy()
    return smooth - to_data - entropy, smooth_error + error


x, bases, smoothings = data.test[:MANY], {}, {}
print(f"\nExact network, {MANY} data: mean errors from the two ends, nats")
print(f"{'':24}{'true, by quadrature':>20}{'reported':>20}")
for first, last in ENDS:
    diffusion, schedule, _ = setting(SHORT, first, last)
    found = probdiff.flow_likelihood(diffusion, x, key=jax.random.key(6), rtol=LOOSE, atol=LOOSE)
    bases[last] = [base_error(schedule), estimate(found.base)]
    smoothings[first] = [smoothing_error(schedule), estimate(found.smoothing[0])]
    print_row(f"base, λ_N = {last:.0f}", *bases[last])
    print_row(f"σ_1 = {schedule.sigma[0]:.4f}, λ_1 = {first:.0f}", *smoothings[first])

# %% [markdown]
# ## The figure

# %%
figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
panels = (
    (interpolation, "interpolation: r.m.s. of log q(z_1)", "number of steps N"),
    (bases, "base: mean of log q(z_1)", "last log-SNR, λ_N"),
    (smoothings, "σ_1: mean, log q(z_1) read as log p(x)", "first log-SNR, λ_1"),
)
for ax, (values, title, label) in zip(figure.subplots(1, 3), panels):
    for k, (name, marker) in enumerate((("true", "o-"), ("reported", "s--"))):
        mean, error = np.transpose([each[k] for each in values.values()])
        ax.errorbar(list(values), mean, 2 * error, fmt=marker, ms=4, lw=1, capsize=2, label=name)
    ax.set(yscale="log", xlabel=label)
    ax.set_title(title, fontsize="medium")
    ax.grid(alpha=0.3)
    if values is interpolation:
        sizes = np.array(list(values))
        ax.plot(sizes, values[sizes[-1]][0][0] * (sizes[-1] / sizes) ** 2, "k:", lw=1, label="1/N²")
        ax.set(xscale="log", ylabel="error, nats")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        handles = ax.get_legend_handles_labels()
title = "exact network (bars: ± 2 standard errors)"
figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, title=title)
figure.savefig("flow_likelihood.png")
print("\nfigure: flow_likelihood.png")
