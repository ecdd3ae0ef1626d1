# %% [markdown]
# # How good is the model?
#
# The bound on test data, beside what is known about the data: their entropy, or other models. For each: what `probdiff fit` fits by default,
# and what the parts of it are worth. Errors are standard errors over the test data. No model was chosen by its test data.

# %%
import argparse
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from numpyro.infer import SVI

import probdiff
from probdiff.presets import default_diffusion, default_fit, default_options

parser = argparse.ArgumentParser(description="How good is the model?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
parser.add_argument("--only", metavar="SECTION", help="digits, few, planar or variance")
arguments = parser.parse_args()
quick = arguments.quick

SEEDS = 1 if quick else 3
ITERATIONS = {"iterations": 2, "batch_size": 8} if quick else {}
ITEMS = 4 if quick else None
FEW = 5 if quick else 20
PLANAR = ("moons",) if quick else ("moons", "circles", "8gaussians", "swissroll", "checkerboard")


def wanted(section):
    return arguments.only in (None, section)


def fit(data, diffusion, seed, **changes):
    """The default fit of a data set, of any model; the trained Diffusion and the seconds."""
    start = time.perf_counter()
    options = default_options(data) | changes | ITERATIONS
    found = default_fit(diffusion, data, options, key=jax.random.key(seed), progress=False)
    return found.diffusion, time.perf_counter() - start


def bits(diffusion, x, num_draws=1):
    """Bits/dim on test data: mean and standard error."""
    terms = probdiff.elbo_terms(diffusion, {}, x, key=jax.random.key(9), num_draws=num_draws, reduce=True)
    each = probdiff.bits_per_dim(np.asarray(terms.elbo.mean, np.float64), x.shape[1])
    return each.mean(), each.std(ddof=1) / np.sqrt(len(each))


# %% [markdown]
# ## Digits
#
# Bits per dimension of the test split. For comparison: independent pixels 2.397, an autoregressive network 1.947.

# %%
digits = probdiff.datasets.load("digits")
x = digits.test[:ITEMS]
N = 10 if quick else default_options(digits)["num_steps"]
if wanted("digits"):
    values = []
    for seed in range(SEEDS):
        fitted, seconds = fit(digits, default_diffusion(digits, N, seed), seed)
        mean, error = bits(fitted, x)
        values.append(mean)
        print(f"digits, N = {N}, seed {seed}: {mean:.4f} ± {error:.4f} bits/dim, fitted in {seconds:.0f} s", flush=True)
    spread = f" ± {np.std(values, ddof=1) / np.sqrt(SEEDS):.4f} between seeds" if SEEDS > 1 else ""
    print(f"digits, N = {N}, mean of {SEEDS}: {np.mean(values):.4f}{spread}", flush=True)

# %% [markdown]
# ## Few steps
#
# The same network with a Gaussian kernel and with the mixture kernel.

# %%
if wanted("few"):
    model = default_diffusion(digits, FEW, 0)
    kernels = {"Gaussian, β̃": None, "mixture": probdiff.MixtureKernel(digits.levels)}
    for name, kernel in kernels.items():
        own = probdiff.Diffusion(model.schedule, model.network, model.likelihood, kernel=kernel)
        fitted, seconds = fit(digits, own, 0)
        mean, error = bits(fitted, x, num_draws=2 if quick else 20)
        print(f"digits, N = {FEW}, {name} kernel: {mean:.4f} ± {error:.4f} bits/dim, fitted in {seconds:.0f} s", flush=True)

# %% [markdown]
# ## Planar data: the gap of the bound to the entropy
#
# Paired per datum with the true log-density, and with a control variate of known mean, so that the error is small.

# %%
if wanted("planar"):
    for name in PLANAR:
        data = probdiff.datasets.load(name)
        steps = 10 if quick else default_options(data)["num_steps"]
        fitted, seconds = fit(data, default_diffusion(data, steps), 0)
        account = probdiff.ledger(fitted, {}, data.oracle, data.test[: ITEMS or 20_000], key=jax.random.key(1))
        gap, floor = account.gap, account.irreducible
        print(
            f"{name:14} N = {steps}: gap {gap.mean:.4f} ± {gap.error:.4f} nats, of which {floor.mean:.4f} ± {floor.error:.4f} "
            f"with the exact network; fitted in {seconds:.0f} s",
            flush=True,
        )
