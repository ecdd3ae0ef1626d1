# %% [markdown]
# # How much does each part of a one-step estimator save?
#
# The cost of an estimator is batch × Var(batch mean) × network evaluations per datum, with a fresh batch of 128 each time. It is
# compared with `kl_uniform`: one step per datum, uniform on 1 … N, where n = 1 is the reconstruction. Values and gradients are
# measured on models of the moons, fitted for 20 000 iterations at N = 1000: log-SNR-linear from 10 to −8, and cosine. Estimators
# with learned parts are adapted to what is measured, and then held fixed.

# %%
import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import probdiff

parser = argparse.ArgumentParser(description="How much does each part of a one-step estimator save?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

N, ITERATIONS, HIDDEN = (20, 100, 16) if quick else (1000, 20_000, 128)
DRAWS = {"value": 200, "gradient": 100} if quick else {"value": 20_000, "gradient": 4_000}
LEARNING = 50 if quick else 2_000
BATCH = 128
NAMES = ["kl_uniform", "kl_stratified", "kl_importance", "kl_antithetic", "kl_controlled", "kl_combined"]
NAMES = NAMES[::9] if quick else NAMES
data = probdiff.datasets.load("moons")


def fit(schedule, train):
    network = probdiff.MLP(2, key=jax.random.key(0), hidden=HIDDEN, num_blocks=3, num_harmonics=3)
    likelihood = probdiff.NormalLikelihood.standardized(data.train)
    diffusion = probdiff.Diffusion(schedule, network, likelihood)
    options = {"iterations": ITERATIONS, "batch_size": BATCH, "learning_rate": 2e-3, "key": jax.random.key(1)}
    return probdiff.fit(diffusion, train, **options).diffusion.unbind()  # gradients are taken with respect to its parameters


# %% [markdown]
# ## Measuring
#
# Each draw takes a fresh batch and fresh noise. The variance of a gradient is the trace of its covariance over all parameters. The
# interval is the 95 % bootstrap interval of the ratio to `kl_uniform`; both costs are resampled.


# %%
def draws(diffusion, train, name, purpose, **options):
    """For each draw, batch × squared deviation from the mean × evaluations, whose mean is the cost; and the seconds per draw."""
    train = jnp.asarray(train)
    guide, elbo = probdiff.ESTIMATORS[name](diffusion, adapt_to=purpose, **options)

    def batch(key):
        return train[jax.random.randint(key, (BATCH,), 0, len(train))]

    def learn(state, key):
        batch_key, key = jax.random.split(key)
        result = elbo.loss_with_mutable_state(key, state, diffusion.model, guide, batch(batch_key))
        return result["mutable_state"], None

    state = elbo.initial_state
    if state:
        state = jax.jit(lambda s, keys: jax.lax.scan(learn, s, keys)[0])(
            state, jax.random.split(jax.random.key(2), LEARNING)
        )

    def bound(params, key):
        batch_key, key = jax.random.split(key)
        given = {"diffusion$params": params, **state}
        return -elbo.loss(key, given, diffusion.model, guide, batch(batch_key)) / BATCH

    own, keys = diffusion.trainable(), jax.random.split(jax.random.key(3), DRAWS[purpose])
    def add(total, key):
        one = bound(own, key) if purpose == "value" else jax.grad(bound)(own, key)
        each = ravel_pytree(one)[0]
        return total + each, jnp.square(each - centre).sum()

    centre = jax.jit(lambda key: bound(own, key))(keys[0]) if purpose == "value" else 0.0  # against rounding only
    zero = jnp.zeros(1 if purpose == "value" else ravel_pytree(own)[0].size)
    compiled = jax.jit(lambda keys: jax.lax.scan(add, zero, keys)).lower(keys).compile()
    start = time.perf_counter()
    total, squares = jax.block_until_ready(compiled(keys))
    seconds = (time.perf_counter() - start) / len(keys)
    squares = np.asarray(squares, np.float64) - float(jnp.square(total / len(keys) - centre).sum())
    return squares * BATCH * elbo.evaluations * len(keys) / (len(keys) - 1), seconds


def interval(reference, costs):
    """The ratio of two mean costs and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = [[rng.choice(c, len(c)).mean() for _ in range(1000)] for c in (reference, costs)]
    low, high = np.quantile(np.divide(*means), [0.025, 0.975])
    return reference.mean() / costs.mean(), low, high


def table(title, diffusion, train, variants):
    columns = f"{'values: cost':>14}{'times better':>24}{'gradients: cost':>18}{'times better':>24}{'ms':>8}"
    print(f"\n{title}\n{'estimator':48}{columns}", flush=True)
    reference = {}
    for label, (name, options) in variants.items():
        line = f"{label:48}"
        for purpose, width in (("value", 14), ("gradient", 18)):
            costs, seconds = draws(diffusion, train, name, purpose, **options)
            reference.setdefault(purpose, costs)
            ratio, low, high = interval(reference[purpose], costs)
            line += f"{costs.mean():{width}.4g}" + f"{ratio:.4g} [{low:.4g}, {high:.4g}]".rjust(24)
        print(f"{line}{seconds * 1e3:8.2f}", flush=True)


# %% [markdown]
# ## The parts, and all of them together
#
# The reconstruction has weight N whenever n = 1 is drawn, and causes most of the variance of `kl_uniform` on the first
# schedule. Under each table is the cost with the reconstruction of every datum and one uniform step of 2 … N, at two
# evaluations. The control variate does not depend on the parameters, so that gradients are unchanged. `kl_posterior_target`, the
# default of `fit`, replaces the noise by its mean and variance given z_n, with x_0 among the 128 data of the batch: the expected
# gradient is the same whatever the data, and no finite set is needed. The last column is the time of a gradient.

# %%
variants = {name: (name, {}) for name in NAMES}
if not quick:
    variants["kl_combined, ε and −ε"] = ("kl_combined", {"noise": "antithetic"})
    variants["kl_posterior_target"] = ("kl_posterior_target", {})
    variants["kl_posterior_target, ε and −ε"] = ("kl_posterior_target", {"noise": "antithetic"})
schedules = {
    "log-SNR-linear, 10 to −8": probdiff.log_snr_schedule(N, 10.0, -8.0),
    "cosine": probdiff.cosine_schedule(N),
}
schedules = dict(list(schedules.items())[: 1 if quick else 2])
for title, schedule in schedules.items():
    fitted = fit(schedule, data.train)
    table(f"moons, {title}, N = {N}", fitted, data.train, variants)
    terms = probdiff.elbo_terms(fitted, data.train[:2000], key=jax.random.key(4))
    step_kl = np.asarray(terms.step_kl[0], np.float64)
    apart = (N - 1) * np.square(step_kl).mean(1).sum() - step_kl.mean(1).sum() ** 2
    print(f"{'uniform on 2 … N, n = 1 always':48}{2 * apart:14.4g}   (2000 data, one draw each)")

# %% [markdown]
# ## A finite training set: the mean and variance over all of it
#
# With a training set of 1000 points, the noise may be replaced by E[ε | z_n] over the *whole set*: the expected gradient is
# the same. This costs a squared distance to each point for every network evaluation.

# %%
few = data.train[: 50 if quick else 1000]
fitted = fitted if quick else fit(probdiff.log_snr_schedule(N, 10.0, -8.0), few)
variants = {"kl_uniform": ("kl_uniform", {}), "kl_posterior_target, all points": ("kl_posterior_target", {"points": few})}
if not quick:
    variants |= {
        "kl_combined": ("kl_combined", {}),
        "kl_posterior_target, all points, uniform steps": ("kl_posterior_target", {"points": few, "steps": "uniform"}),
        "kl_posterior_target, all points, ε and −ε": ("kl_posterior_target", {"points": few, "noise": "antithetic"}),
        "kl_posterior_target": ("kl_posterior_target", {}),
    }
table(f"{len(few)} moons, log-SNR-linear, N = {N}", fitted, few, variants)
