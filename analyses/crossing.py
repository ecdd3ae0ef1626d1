# %% [markdown]
# # Where do the variances of the estimators of the bound cross?
#
# It is often said that KL terms in closed form always give less variance than log p − log q on sampled paths, NumPyro's
# `Trace_ELBO`. This is true of each term, but not of the sum. Here an ε-network goes from untrained to exact, and the
# variances of every estimator's value and gradient are measured. The data are fixed, so that only the noise varies.
# Variances are multiplied by the network evaluations per draw, and are in nats².

# %%
import argparse
import itertools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from matplotlib.figure import Figure

import probdiff
from probdiff.oracles import GaussianMixture, GaussianOracle

parser = argparse.ArgumentParser(description="Where do the variances of the estimators of the bound cross?")
parser.add_argument("--quick", action="store_true", help="few steps and draws, to see that it runs")
quick = parser.parse_args().quick
numpyro.enable_x64()

N, DRAWS, MORE = (10, 1_000, 8) if quick else (100, 4_000, 16)  # one-step estimators are drawn MORE times as often
DISTANCES = [1, 0] if quick else [1, 0.3, 0.1, 0.05, 0.03, 0.02, 0.01, 0]  # 1 − t
NAMES = ["trace", "kl_marginal", "kl_combined"] + (not quick) * ["kl_path", "kl_uniform", "kl_importance"]
KINDS = ("value", "gradient")
Z_MAX, CLEAR = 4.9, 3  # standard errors: the limit for means that agree, and for variances that differ clearly

# %% [markdown]
# ## From untrained to exact
#
# ε̂ = t · exact + (z, n/N, 1) · weights, with gradients with respect to the weights, at 0. A fresh `probdiff.MLP`
# predicts 0: t = 0 is an untrained network, t = 1 the exact one, and 1 − t the relative error. Estimators with learned
# parts learn first, on the same data, and are adapted to the value or the gradient, whichever is drawn.


# %%
class Mixed(eqx.Module):
    exact: Callable
    t: jax.Array
    weights: jax.Array

    def __call__(self, z, n):
        time = (n / N)[..., None]
        return self.t * self.exact(z, n) + jnp.concatenate([z, time, jnp.ones_like(time)], -1) @ self.weights


def measure(name, oracle, schedule, reverse_variance, distances):
    """Mean and its error, shape (distance, component); variance and its error, shape (distance, kind).

    The components are the bound, averaged over the data, and its partial derivatives, whose variances are added up.
    """
    x = jnp.asarray(oracle.sample(np.random.default_rng(0), 4))
    exact = probdiff.Diffusion(schedule, oracle.network(schedule)).predict_noise  # a function of z and n
    zero = jnp.zeros((oracle.dim + 2, oracle.dim))

    def make(weights, t, **options):
        diffusion = probdiff.Diffusion(schedule, Mixed(exact, t, weights), reverse_variance=reverse_variance)
        return diffusion, *probdiff.ESTIMATORS[name](diffusion, **options)

    def bound(weights, t, learned, key, **options):
        diffusion, guide, elbo = make(weights, t, **options)
        return -elbo.loss(key, learned, diffusion.model, guide, x) / len(x)

    def learn(state, t):
        diffusion, guide, elbo = make(zero, t)
        many = jnp.tile(x, (16, 1))

        def update(state, key):
            return elbo.loss_with_mutable_state(key, state, diffusion.model, guide, many)["mutable_state"], None

        return jax.lax.scan(update, state, jax.random.split(jax.random.key(1), 300))[0]

    elbo = make(zero, 1.0)[2]
    evaluations, initial = getattr(elbo, "evaluations", N), getattr(elbo, "initial_state", {})
    key = jax.random.fold_in(jax.random.key(2), list(probdiff.ESTIMATORS).index(name))
    keys = jax.random.split(key, DRAWS if evaluations == N else MORE * DRAWS)

    @jax.jit
    def at(t):
        arguments = zero, t, learn(initial, t) if initial else {}

        def draw(key):
            value, gradient = jax.value_and_grad(bound)(*arguments, key)
            if initial:
                value = bound(*arguments, key, adapt_to="value")
            return jnp.append(value, gradient)

        draws = jax.lax.map(draw, keys, batch_size=250)
        squares = jnp.square(draws - draws.mean(0))
        squares = len(x) * evaluations * jnp.stack([squares[:, 0], squares[:, 1:].sum(1)], 1)
        root = np.sqrt(len(keys))
        return draws.mean(0), draws.std(0) / root, squares.mean(0), squares.std(0) / root

    return [np.array(each) for each in zip(*(at(1.0 - d) for d in distances))]


def check_agreement(measured):
    """Assert that every two estimators agree on the means of the bound and of its derivatives."""
    worst = 0.0
    for (mean, error, *_), (other, other_error, *_) in itertools.combinations(measured.values(), 2):
        worst = max(worst, np.max(np.abs(mean - other) / (np.hypot(error, other_error) + 1e-9)))
    assert worst <= Z_MAX, f"two means are {worst:.1f} standard errors apart"
    print(f"All estimators agree on the bound and its derivatives: the largest |z| of two is {worst:.1f}", flush=True)


def print_row(name, values, errors, marks=""):
    """Print a line of a table; its last column is the largest relative error in the line."""
    cells = (f"{value:9.3g}{mark:1}" for value, mark in itertools.zip_longest(values, marks, fillvalue=""))
    print(f"{name:20}" + "".join(cells) + f"{np.max(errors / values):9.1%}", flush=True)


def compare(measured, rival, kind):
    """Print the variance of ``trace`` over another estimator's, with marks for clear differences from 1; return the marks."""
    (a, a_error), (b, b_error) = ([each[:, kind] for each in measured[name][2:]] for name in ("trace", rival))
    ratio, error = a / b, a / b * np.hypot(a_error / a, b_error / b)
    marks = [">" if z > CLEAR else "<" if z < -CLEAR else "=" for z in (ratio - 1) / error]
    print_row(f"trace / {rival}", ratio, error, marks)
    return dict(zip(DISTANCES, marks))


# %% [markdown]
# ## The measurements
#
# The data are a mixture of three Gaussians in the plane; the schedules are cosine with both reverse variances, and
# log-SNR with β̃_n.

# %%
mixture = GaussianMixture([0.4, 0.3, 0.3], [[-1.2, 0.5], [1.0, -0.7], [0.3, 1.2]], [[0.15, 0.05], [0.05, 0.1]])
cosine = probdiff.cosine_schedule(N)
COSINE, FORWARD, LOG_SNR = "cosine, v_n = β̃_n", "cosine, v_n = β_n", "log-SNR, v_n = β̃_n"
CASES = {COSINE: (cosine, "posterior")}
if not quick:
    CASES |= {FORWARD: (cosine, "forward"), LOG_SNR: (probdiff.log_snr_schedule(N), "posterior")}
results, marks = {}, {}
print("Ratios are marked > or < where they differ from 1 by more than three standard errors, else =", flush=True)
for case, options in CASES.items():
    results[case] = measured = {}
    for kind, what in enumerate(KINDS):
        print(f"\n{case}, N = {N}: variance of the {what} × evaluations, nats²")
        print(f"{'1 − t':20}" + "".join(f"{d:9g} " for d in DISTANCES) + f"{'error ≤':>9}", flush=True)
        for name in NAMES:
            measured[name] = measured.get(name) or measure(name, mixture, *options, DISTANCES)
            print_row(name, *(each[:, kind] for each in measured[name][2:]))
        for rival in NAMES[1:4]:
            marks[case, what, rival] = compare(measured, rival, kind)
    check_agreement(measured)

# %% [markdown]
# ## What the measurements show
#
# Ratios of variances, ± standard error; which is larger is asserted below.
#
# **Values.** On the cosine schedule the last step has weight w_N = 500 in the bound, and no other step more than 1.5.
# While the network is far from exact, this term dominates every estimator, and all estimators with all steps have the
# same variance. From 1 − t = 0.1 on `kl_marginal` has the smaller one; at 0.05 `trace` has 1.39 ± 0.06 times as much.
# Then they cross: between 0.03 and 0 with v_n = β̃_n, between 0.05 and 0.02 with v_n = β_n. At the exact network `trace`
# has 0.89 ± 0.04 and 0.031 ± 0.002 times the variance of `kl_marginal`. On the log-SNR schedule they do not cross:
# `trace` never has clearly more variance, and 0.62 ± 0.02 times as much at the exact network. There the KLs on one path
# (`kl_path`, NumPyro's `TraceMeanField_ELBO`) have more variance than `trace` in every case, as they are positively
# correlated. `kl_combined`, with importance-sampled steps and a control variate, has far less variance than all these,
# except at the exact network with v_n = β_n, where `trace` has 0.87 ± 0.03 times as much.
#
# **Gradients.** At the exact network `trace` has 265 ± 7, 688 ± 17 and 5.7 ± 0.1 times the variance of `kl_marginal` in
# the three cases; nowhere has it clearly less. In log p_θ(z_{n−1} | z_n) − log q most noise cancels as the network becomes
# exact; in the gradient nothing cancels, as q has no parameters. But the KLs need independent noise: on one path they
# still have less variance on the cosine schedule (`trace` has 54 ± 2 and 113 ± 3 times the variance of `kl_path`), but
# more on the log-SNR schedule at every t (`trace` has 0.44 ± 0.01 times as much at the exact network).

# %%
exact = {key: mark[0] for key, mark in marks.items()}
for case in CASES:
    assert exact[case, "gradient", "kl_marginal"] == ">" and "<" not in marks[case, "gradient", "kl_marginal"].values()
if not quick:
    posterior, forward, log_snr = (marks[case, "value", "kl_marginal"] for case in CASES)
    assert posterior[1] == forward[1] == "=" and posterior[0.03] == forward[0.05] == ">"
    assert posterior[0] == forward[0.02] == forward[0] == log_snr[0] == "<" and ">" not in log_snr.values()
    assert all(exact[case, "value", "kl_path"] == "<" for case in CASES)
    assert [exact[case, "value", "kl_combined"] for case in CASES] == [">", "<", ">"]
    assert [exact[case, "gradient", "kl_path"] for case in CASES] == [">", ">", "<"]
    assert set(marks[LOG_SNR, "gradient", "kl_path"].values()) == {"<"}

# %% [markdown]
# ## The extreme: reverse steps that are exact
#
# With data N(0, I), v_n = β_n and the exact network, the model is the exact reversal of the noising chain. Then
# log p − log q is log p(x) on every path, and `trace` has no variance at all. The KLs do vary, as q(z_{n−1} | z_n, x_0)
# depends on x_0 and the model does not.

# %%
standard = GaussianOracle([0.0, 0.0], np.eye(2))
print(f"\nN(0, I), exact, cosine, v_n = β_n, N = {N}: variance × evaluations ± s.e., nats²")
extreme = {}
for name in NAMES[:2] if quick else [*NAMES, "trace_posterior", "mean_field"]:
    extreme[name] = *_, variance, error = measure(name, standard, cosine, "forward", [0])
    cells = (f"{what:>12}{v:10.3g} ± {e:<8.2g}" for what, v, e in zip(KINDS, variance[0], error[0]))
    print(f"{name:16}" + "".join(cells), flush=True)
check_agreement(extreme)
assert extreme["trace"][2][0, 0] < 1e-12

# %% [markdown]
# ## The figure

# %%
figure = Figure(figsize=(9, 1 + 3 * len(CASES)), dpi=100, layout="constrained")
for (case, measured), axes in zip(results.items(), figure.subplots(len(CASES), 2, squeeze=False)):
    for kind, ax in enumerate(axes):
        for (name, (*_, variance, error)), style in zip(measured.items(), 3 * ["-"] + 3 * ["--"]):
            ax.errorbar(DISTANCES, variance[:, kind], 2 * error[:, kind], label=name, ls=style, marker="o", ms=3)
        ax.set_xscale("symlog", linthresh=0.01, linscale=0.4)
        ax.set_xticks([0, 0.01, 0.1, 1], ["exact", "0.01", "0.1", "1"])
        ax.set(yscale="log", xlabel="1 − t: relative error of the network", ylabel="variance × evaluations, nats²")
        ax.set_title(f"{KINDS[kind]}; {case}", fontsize="medium")
        ax.grid(alpha=0.3)
handles = ax.get_legend_handles_labels()
figure.legend(*handles, loc="outside upper center", ncols=len(NAMES), frameon=False, title="bars: ± 2 standard errors")
figure.savefig("crossing.png")
print("\nfigure: crossing.png")
