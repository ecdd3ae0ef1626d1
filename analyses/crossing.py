# %% [markdown]
# # Where do the estimators of the bound cross?
#
# It is often said that KL terms in closed form always give less variance than log p − log q on sampled paths, NumPyro's
# `Trace_ELBO`. Term by term they do; for the sum it is false. Here an ε-network goes from untrained to exact, and the
# variance of each estimator is measured on the way, of its value and of its gradient. The data are fixed, so that it is
# the variance of the noise alone; it is multiplied by the network evaluations of a draw, and in nats².

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

parser = argparse.ArgumentParser(description="Where do the estimators of the bound cross?")
parser.add_argument("--quick", action="store_true", help="few steps and draws, to see that it runs")
quick = parser.parse_args().quick
numpyro.enable_x64()

N, DRAWS, MORE = (10, 1_000, 8) if quick else (100, 4_000, 16)  # one-step estimators are drawn MORE times as often
DISTANCES = [1, 0] if quick else [1, 0.3, 0.1, 0.05, 0.03, 0.02, 0.01, 0]  # 1 − t
NAMES = ["trace", "kl_marginal", "kl_combined"] + (not quick) * ["kl_path", "kl_uniform", "kl_importance"]
KINDS = ("value", "gradient")
Z_MAX, CLEAR = 4.9, 3  # standard errors: a disagreement of means; a difference between variances

# %% [markdown]
# ## From untrained to exact
#
# ε̂ = t · exact + (z, n/N, 1) · weights, at weights 0, which gradients are taken in. A fresh `probdiff.MLP` predicts 0:
# t = 0 is an untrained network, t = 1 the exact one, and 1 − t the relative error between. Estimators that learn do so
# first, on the same data; their draws of the value are adapted to the value, those of the gradient to the gradient.


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

    The components are the bound, mean over the data, and its slopes, whose variances are added up.
    """
    x = jnp.asarray(oracle.sample(np.random.default_rng(0), 4))
    exact = probdiff.Diffusion(schedule, oracle.network(schedule)).predict_noise  # by the step
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
    """Assert that all means agree: of the bound and of its slopes, between every two estimators."""
    worst = 0.0
    for (mean, error, *_), (other, other_error, *_) in itertools.combinations(measured.values(), 2):
        worst = max(worst, np.max(np.abs(mean - other) / (np.hypot(error, other_error) + 1e-9)))
    assert worst <= Z_MAX, f"two means are {worst:.1f} standard errors apart"
    print(f"All agree on the bound and its slopes: of any two, the largest |z| is {worst:.1f}", flush=True)


def print_row(name, values, errors, marks=""):
    """Print a line of a table; its last column is the largest relative error in the line."""
    cells = (f"{value:9.3g}{mark:1}" for value, mark in itertools.zip_longest(values, marks, fillvalue=""))
    print(f"{name:20}" + "".join(cells) + f"{np.max(errors / values):9.1%}", flush=True)


def compare(measured, rival, kind):
    """Print the variance of ``trace`` over a rival's, with marks that say where it is clearly not 1; return them."""
    (a, a_error), (b, b_error) = ([each[:, kind] for each in measured[name][2:]] for name in ("trace", rival))
    ratio, error = a / b, a / b * np.hypot(a_error / a, b_error / b)
    marks = [">" if z > CLEAR else "<" if z < -CLEAR else "=" for z in (ratio - 1) / error]
    print_row(f"trace / {rival}", ratio, error, marks)
    return dict(zip(DISTANCES, marks))


# %% [markdown]
# ## The measurements
#
# Three Gaussians in the plane; the cosine schedule with both reverse variances, and the log-SNR schedule.

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
# ## What they say
#
# Ratios of variances, ± standard error; which is larger is asserted.
#
# **Values.** On the cosine schedule the last step has weight w_N = 500 in the bound, and no other more than 1.5. While
# the network is far from exact that one term is all there is, in every estimator, and those with all steps coincide.
# From 1 − t = 0.1 on `kl_marginal` is the quieter one; at 0.05 `trace` has 1.39 ± 0.06 times its variance. Then they
# cross: between 0.03 and 0 where v_n = β̃_n, between 0.05 and 0.02 where v_n = β_n. At the exact network `trace` has
# 0.89 ± 0.04 and 0.031 ± 0.002 of that variance. On the log-SNR schedule they do not cross: `trace` never has clearly
# more, and 0.62 ± 0.02 at the exact network. The KLs on one path (`kl_path`, NumPyro's `TraceMeanField_ELBO`) have more
# than `trace` there in every case, as they swing together. `kl_combined`, one step where it matters and a control
# variate, is far below all these, but not below `trace` at an exact network with v_n = β_n: 0.87 ± 0.03.
#
# **Gradients.** Near the optimum the KLs win: at the exact network `trace` has 265 ± 7, 688 ± 17 and 5.7 ± 0.1 times
# the variance of `kl_marginal` in the three cases; it is nowhere clearly below. In log p_θ(z_{n−1} | z_n) − log q most
# noise cancels as the network becomes exact; in the gradient nothing does, as q has no parameters. But the KLs need
# noise of their own to win: on one path they do so on the cosine schedule (`trace` has 54 ± 2 and 113 ± 3 times the
# variance of `kl_path`), and on the log-SNR schedule they lose at every t (0.44 ± 0.01 at the exact network).

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
# Data N(0, I), v_n = β_n, exact network: the model is the noising chain reversed, log p − log q is log p(x) on every
# path, and the path has no variance at all. The KLs have, as q(z_{n−1} | z_n, x_0) knows x_0 and the model does not.

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
