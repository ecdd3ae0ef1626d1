# %% [markdown]
# # How good is the model?
#
# The bound on test data is compared with what is known about the data: their entropy, or the results of other models. The models are the defaults
# of `probdiff fit`, and variants that show what its parts contribute. Errors are standard errors over the test data. No model was chosen on test data.

# %%
import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from numpyro.infer import SVI

import probdiff
from probdiff.presets import default_diffusion, default_options

parser = argparse.ArgumentParser(description="How good is the model?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
parser.add_argument("--only", metavar="SECTION", help="digits, few, heartbeat, planar or variance")
arguments = parser.parse_args()
quick = arguments.quick

SEEDS = 1 if quick else 3
ITERATIONS = {"iterations": 2, "batch_size": 8} if quick else {}
ITEMS = 4 if quick else None
FEW = 10 if quick else 20
PLANAR = ("moons",) if quick else ("moons", "circles", "8gaussians", "swissroll", "checkerboard")


def wanted(section):
    return arguments.only in (None, section)


def model_of(data, num_steps, seed=0):
    """The default model; at toy size with a small network."""
    model = default_diffusion(data, num_steps, seed)
    if not quick:
        return model
    network = probdiff.MLP(data.dim, key=jax.random.key(seed), hidden=8, num_blocks=1, outputs=data.levels)
    network = probdiff.networks.DensityHead(network) if data.levels is None else probdiff.networks.CategoricalHead(network, data.levels)
    return probdiff.Diffusion(model.schedule, network, model.likelihood, kernel=model.kernel)


def fit(data, diffusion, seed):
    """Fit any model with the default options of a data set; the trained Diffusion, and the seconds."""
    start = time.perf_counter()
    options = default_options(data) | ITERATIONS
    rest = {name: options[name] for name in ("iterations", "batch_size", "learning_rate")}
    validation = None if quick else data.validation
    found = probdiff.fit(diffusion, data.train, validation=validation, key=jax.random.key(seed), progress=False, **rest)
    return found.diffusion, time.perf_counter() - start


def bits(diffusion, x, num_draws=1):
    """Bits/dim on test data: mean and standard error."""
    terms = probdiff.elbo_terms(diffusion, x, key=jax.random.key(9), num_draws=num_draws, reduce=True)
    each = probdiff.elbo.bits_per_dim(np.asarray(terms.elbo.mean, np.float64), x.shape[1])
    return each.mean(), each.std(ddof=1) / np.sqrt(len(each))


# %% [markdown]
# ## Digits
#
# Bits per dimension of the test split. For comparison: independent pixels 2.397, an autoregressive network 1.947. The networks of all
# seeds are also combined into an ensemble, which predicts their mean and uses no more data.

# %%
digits = probdiff.datasets.load("digits")
x = digits.test[:ITEMS]
N = 10 if quick else default_options(digits)["num_steps"]
if wanted("digits"):
    values, networks, total = [], [], 0.0
    for seed in range(SEEDS):
        fitted, seconds = fit(digits, model_of(digits, N, seed), seed)
        mean, error = bits(fitted, x)
        values.append(mean)
        networks.append(fitted.network)
        total += seconds
        print(f"digits, N = {N}, seed {seed}: {mean:.4f} ± {error:.4f} bits/dim, fitted in {seconds:.0f} s", flush=True)
    spread = f" ± {np.std(values, ddof=1) / np.sqrt(SEEDS):.4f} between seeds" if SEEDS > 1 else ""
    print(f"digits, N = {N}, mean of {SEEDS}: {np.mean(values):.4f}{spread}", flush=True)
    together = probdiff.Diffusion(fitted.schedule, probdiff.networks.Ensemble(networks), fitted.likelihood).bind({})
    mean, error = bits(together, x)
    print(f"digits, N = {N}, ensemble of {SEEDS}: {mean:.4f} ± {error:.4f} bits/dim, fitted in {total:.0f} s", flush=True)

# %% [markdown]
# ## Few steps
#
# The same network with a Gaussian kernel and with the mixture kernel.

# %%
if wanted("few"):
    model = model_of(digits, FEW)
    kernels = {"Gaussian, β̃": None, "mixture": probdiff.chain.MixtureKernel(digits.levels)}
    for name, kernel in kernels.items():
        own = probdiff.Diffusion(model.schedule, model.network, model.likelihood, kernel=kernel)
        fitted, seconds = fit(digits, own, 0)
        mean, error = bits(fitted, x, num_draws=2 if quick else 20)
        print(f"digits, N = {FEW}, {name} kernel: {mean:.4f} ± {error:.4f} bits/dim, fitted in {seconds:.0f} s", flush=True)

# %% [markdown]
# ## Binary data
#
# The heartbeat of Sohl-Dickstein et al. (2015, arXiv:1503.03585, section 3.1): twenty bits of which every fifth is one, five sequences in all, so
# that the optimum is log2(1/5) = −2.322 bits per sequence. Their chain of bit flips reached −2.414. Here a bit is one of the two levels of a grid,
# and the chain is Gaussian.

# %%
if wanted("heartbeat"):
    beats = np.array([[i % 5 == phase for i in range(20)] for phase in range(5)]).astype(np.int32)
    steps, size = (10, 10) if quick else (2000, 500)
    network = probdiff.MLP(20, key=jax.random.key(0), hidden=8 if quick else 128, num_blocks=2, outputs=2)
    schedule = probdiff.log_snr_schedule(steps, 5.0, -9.0)
    model = probdiff.Diffusion(schedule, probdiff.networks.CategoricalHead(network, 2), probdiff.DiscretizedNormalLikelihood(2))
    options = {"iterations": 20_000, "batch_size": 128, "learning_rate": 2e-3} | ITERATIONS
    start = time.perf_counter()
    fitted = probdiff.fit(model, np.tile(beats, (200, 1)), key=jax.random.key(0), progress=False, **options).diffusion
    seconds = time.perf_counter() - start
    mean, error = bits(fitted, np.tile(beats, (size // 5, 1)), num_draws=2 if quick else 8)
    print(f"heartbeat, N = {steps}: {-20 * mean:.4f} ± {20 * error:.4f} bits/sequence, fitted in {seconds:.0f} s", flush=True)

# %% [markdown]
# ## Planar data: the gap of the bound to the entropy
#
# The gap is paired with the true log density datum by datum, and has a control variate of known mean, so that its error is small.
# (`probdiff inspect --ledger` shows how much of a gap remains with the exact network.)

# %%
def gap(diffusion, data, x):
    """E log p − ELBO, mean and standard error."""
    bound = jax.jit(probdiff.AnalyticELBO(diffusion, "all", control="linear").per_datum)
    parts = np.array_split(x, max(1, len(x) // 200))
    bounds = [bound(jax.random.fold_in(jax.random.key(1), i), part) for i, part in enumerate(parts)]
    each = data.log_prob(x) - np.concatenate(bounds).astype(np.float64)
    return each.mean(), each.std(ddof=1) / np.sqrt(len(each))


if wanted("planar"):
    for name in PLANAR:
        data = probdiff.datasets.load(name)
        steps = 10 if quick else default_options(data)["num_steps"]
        fitted, seconds = fit(data, model_of(data, steps), 0)
        mean, error = gap(fitted, data, data.test[: ITEMS or 10_000])
        print(f"{name:14} N = {steps}: gap {mean:.4f} ± {error:.4f} nats, fitted in {seconds:.0f} s", flush=True)

# %% [markdown]
# ## The variance of a one-step estimate, by schedule
#
# The same fitted network, a function of the log-SNR, is used with four schedules of equal ends. One of them is learned: only its shape is
# trained, by the gradient of the variance. The variance is that of (N − 1) times the KL of step n, over a uniform n = 2 … N and the noise; printed is its mean over test data.
# On CIFAR-10, Variational Diffusion Models (figure 4b) report 0.53 / 6.35 / 31.6 / 31.1 for learned / log-SNR-linear / linear β / cosine.

# %%
PIECES = 2 if quick else 300  # updates of the shape


def constants(tree):
    """The arrays of a module as constants: nothing trains them."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def stretched(schedule, first, last):
    """A schedule's shape with other ends of log-SNR, without its last step (at which cosine is cut off)."""
    path = schedule.log_snr[:-1]
    return probdiff.NoiseSchedule.from_log_snr(np.interp(path, (path[-1], path[0]), (last, first)))


def learned_shape(model, first, last):
    """The shape with the least variance, for this network."""
    start = probdiff.LearnedSchedule(N, first, last)
    start = eqx.tree_at(lambda s: (s.start, s.log_range), start, (np.asarray(start.start), np.asarray(start.log_range)))
    diffusion = probdiff.Diffusion(start, constants(model.network), model.likelihood)
    objective = probdiff.AnalyticELBO(diffusion, "uniform", schedule_loss="variance")
    svi = SVI(diffusion.model, objective.guide, optax.adam(0.05), objective)
    train = jnp.asarray(digits.train)

    @jax.jit
    def update(state, key):
        return svi.update(state, train[jax.random.randint(key, (ITEMS or 256,), 0, len(train))])[0]

    state = svi.init(jax.random.key(0), train[: ITEMS or 256])
    for key in jax.random.split(jax.random.key(1), PIECES):
        state = update(state, key)
    return diffusion.bind(svi.get_params(state)).schedule


def variance(diffusion, x, draws):
    """Mean over data and its error, (bits/dim)²."""
    terms = probdiff.elbo_terms(diffusion, x, key=jax.random.key(2), num_draws=draws)
    term = np.asarray(terms.step_kl, np.float64) / (x.shape[1] * np.log(2))
    each = term.shape[1] * np.square(term).sum(1).mean(0) - np.square(term.sum(1).mean(0))
    return each.mean(), each.std(ddof=1) / np.sqrt(len(each))


if wanted("variance"):
    fitted, _ = fit(digits, model_of(digits, N), 0)
    ends = fitted.schedule.log_snr[0], fitted.schedule.log_snr[-1]
    schedules = {
        "learned": learned_shape(fitted, *ends),
        "log-SNR-linear": fitted.schedule,
        "linear β": stretched(probdiff.linear_schedule(N + 1), *ends),
        "cosine": stretched(probdiff.cosine_schedule(N + 1), *ends),
    }
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, schedule in schedules.items():
        model = probdiff.Diffusion(schedule, fitted.network, fitted.likelihood).bind({})
        mean, error = variance(model, digits.test[: ITEMS or 48], draws=2 if quick else 4)
        print(f"{name:16} variance {mean:.3f} ± {error:.3f} (bits/dim)²", flush=True)
        axes.plot(np.linspace(0, 1, N), schedule.log_snr, label=f"{name}: {mean:.2f}")
    axes.set(xlabel="n / N", ylabel="log-SNR", title=f"digits, N = {N}")
    axes.legend(title="variance, (bits/dim)²")
    figure.savefig("likelihood_schedules.png", dpi=150)
