# %% [markdown]
# # How close are posterior samples to the exact posterior, and how accurate is the evidence?
#
# The benchmark of Cardoso et al. (2023), arXiv:2308.07983, section 4: a mixture of 25 Gaussians is observed through a random matrix, with noise. The posterior
# is again a mixture of Gaussians, known in closed form, and so is the density of y. Every method has the exact network, so that only its own error remains.
#
# Compared are sequential Monte Carlo (SMC, `probdiff.inference.smc`) with the Tweedie twist; SMC with the point twist, which is the twisted diffusion sampler (TDS, Wu et al. 2023,
# arXiv:2306.17775); and four samplers without weights: diffusion posterior sampling (DPS, Chung et al. 2023, arXiv:2209.14687), pseudoinverse-guided diffusion models (ΠGDM, Song et al. 2023,
# openreview.net/forum?id=9_gsMA8MRKQ), Tweedie moment projected diffusions (TMPD, Boys et al. 2023, arXiv:2310.06721) and denoising diffusion restoration models (DDRM, Kawar et al. 2022,
# arXiv:2201.11793). The figure is saved to the current directory.

# %%
import argparse
import json
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import probdiff
from probdiff.inference import LinearGaussian, smc
from probdiff.oracles import GaussianMixture

parser = argparse.ArgumentParser(description="How close are posterior samples to the exact posterior, and how accurate is the evidence?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
parser.add_argument("--dims", type=int, nargs="+", default=[8, 80], help="dimensions, even numbers")
parser.add_argument("--observed", type=int, nargs="+", default=[1, 2, 4], help="numbers of values of y")
parser.add_argument("--problems", type=int, default=10, help="random problems of each size")
arguments = parser.parse_args()
quick = arguments.quick

PARTICLES, NUM_STEPS, DIRECTIONS = (64, 20, 20) if quick else (1024, 200, 500)
DIMS, PROBLEMS, OBSERVED = ([8], 1, (2,)) if quick else (arguments.dims, arguments.problems, arguments.observed)
STEP_SIZES = (0.1, 1.0) if quick else (0.03, 0.1, 0.3, 1.0)  # of DPS
FLOORS, MORE = (2, 2) if quick else (10, 16)  # pairs of exact samples; runs for the evidence of the model
SCHEDULE = probdiff.log_snr_schedule(NUM_STEPS, 10.0, -8.0)
AT_ONCE = 128  # particles in a batch, so few that it stays in a processor's cache

# %% [markdown]
# ## The problems
#
# Means (8i, 8j, 8i, 8j, …) for i, j = −2 … 2, unit covariances, weights drawn as χ² with one degree of freedom. The matrix A has singular values uniform in [0, 1] and random
# singular vectors; the noise scale is uniform between 0 and the largest singular value; y is simulated from a draw of x.

# %%
GRID = 8.0 * np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3), indexing="ij"), -1).reshape(25, 2)
SCALE = float(np.sqrt(np.square(GRID).mean() + 1))  # of the data, divided by that of the chain


class Case(NamedTuple):
    """A problem with its solution: the posterior, and log p(y) of the true distribution."""

    prior: GaussianMixture
    matrix: np.ndarray
    y: np.ndarray
    noise: float
    posterior: GaussianMixture
    log_evidence: float

    def shares(self, x, weights=None):
        """The weight of each component in a weighted sample: the mean of its probability given x."""
        of_each = np.log(self.prior.weights) - np.square(x[:, None] - self.prior.means).sum(-1) / 2
        probability = np.exp(of_each - np.logaddexp.reduce(of_each, 1, keepdims=True))
        return np.average(probability, 0, weights)


def solved(prior, matrix, y, noise):
    """A problem with its solution, for components that share a covariance."""
    covariance = prior.covariances[0]
    of_y = matrix @ covariance @ matrix.T + noise**2 * np.eye(len(y))
    gain = np.linalg.solve(of_y, matrix @ covariance).T
    marginal = GaussianMixture(prior.weights, prior.means @ matrix.T, of_y)
    white = np.linalg.solve(np.linalg.cholesky(of_y), (y - marginal.means).T)
    weights = np.exp(np.log(prior.weights) - np.square(white).sum(0) / 2 - marginal.log_prob(y))
    weights = np.maximum(weights / weights.sum(), 1e-300)
    posterior = GaussianMixture(weights, prior.means + (y - marginal.means) @ gain.T, covariance - gain @ matrix @ covariance)
    return Case(prior, matrix, y, noise, posterior, float(marginal.log_prob(y)))


def drawn(prior, observed, rng):
    """A random observation of a draw from the prior."""
    left, _, right = np.linalg.svd(rng.normal(size=(observed, prior.dim)), full_matrices=False)
    singular = rng.uniform(size=observed)
    matrix, noise = left * singular @ right, rng.uniform() * singular.max()
    y = matrix @ prior.sample(rng, 1)[0] + noise * rng.normal(size=observed)
    return solved(prior, matrix, y, noise)


def mixture_case(dim, observed, seed):
    rng = np.random.default_rng([dim, observed, seed])
    weights = np.square(rng.normal(size=25))
    prior = GaussianMixture(weights / weights.sum(), np.tile(GRID, dim // 2), np.eye(dim))
    return drawn(prior, observed, rng)


def model_of(case):
    """The model with the exact network, whose constants are arrays, so that one compiled program serves all problems."""
    network = case.prior.standardized(0.0, SCALE).network(SCHEDULE)
    network = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), network)
    return probdiff.Diffusion(SCHEDULE, network, probdiff.NormalLikelihood(0.0, SCALE), reverse_variance="forward")


# %% [markdown]
# ## The measures
#
# *Sliced Wasserstein distance*: the root mean square, over 500 random directions, of the one-dimensional 2-Wasserstein (W₂) distance between the weighted particles and an exact
# sample of the same size. Its *floor* is the mean distance of ten pairs of exact samples: a sampler is below it only by chance. *Total variation* is the distance of the weights of the
# 25 components. For SMC, the table also has the error of log Ẑ, the log of the estimated evidence, and the effective sample size (ESS) of the weights at the end and at the worst step.
# Time is the time of one core, the median over problems, of which only the first compiles.


# %%
def sliced(x, exact, weights=None):
    """The sliced W₂ distance of a weighted sample from an equally weighted one."""
    directions = np.random.default_rng(0).normal(size=(x.shape[1], DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    a, b = x @ directions, np.sort(exact @ directions, 0)
    if weights is None:
        return float(np.sqrt(np.square(np.sort(a, 0) - b).mean()))
    order, level = np.argsort(a, 0), (np.arange(len(b)) + 0.5) / len(b)
    upper = np.cumsum(weights[order], 0)
    quantiles = [a[order[np.minimum(np.searchsorted(upper[:, k], level), len(a) - 1), k], k] for k in range(DIRECTIONS)]
    return float(np.sqrt(np.square(np.stack(quantiles, 1) - b).mean()))


class Row(NamedTuple):
    """The measurements of a method on a problem; the last three for SMC only."""

    distance: float  # in units of the floor
    variation: float
    seconds: float
    error: float | None = None
    ess: float | None = None
    worst: float | None = None


class Reference(NamedTuple):
    exact: np.ndarray
    floor: float
    variation: float


def reference(case, seed=0):
    rng = np.random.default_rng(seed)
    pairs = [(case.posterior.sample(rng, PARTICLES), case.posterior.sample(rng, PARTICLES)) for _ in range(FLOORS)]
    floor = float(np.mean([sliced(*pair) for pair in pairs]))
    variation = np.mean([np.abs(case.shares(x) - case.posterior.weights).sum() / 2 for x, _ in pairs])
    return Reference(pairs[0][1], floor, float(variation))


def measured(case, known, x, seconds, weights=None, posterior=None):
    x = np.nan_to_num(np.asarray(x, np.float64), nan=1e6, posinf=1e6, neginf=-1e6).clip(-1e6, 1e6)
    variation = np.abs(case.shares(x, weights) - case.posterior.weights).sum() / 2
    of_smc = () if posterior is None else (posterior.log_evidence - case.log_evidence, float(posterior.ess[0]), float(posterior.ess.min()))
    return Row(sliced(x, known.exact, weights) / known.floor, float(variation), seconds, *of_smc)


# %% [markdown]
# ## The samplers without weights
#
# Each is a few lines from the formulas of its paper, in the units of the chain. Three of them add a guidance term to the mean of the reverse step. ΠGDM and TMPD approximate
# ∇ log p(y | z_n); their term is β_n ∇ log p(y | z_n) / √α_n, as the score enters ancestral sampling. (The paper of ΠGDM gives another weight for images, found by trial; with the
# weight used here ΠGDM is exact for standard normal data.) In DPS the mean moves by −ζ ∇‖y − A x̂_0‖, as in its authors' program, with a step size ζ that must be chosen. For each size
# of problem the table has the best of four ζ *on these same problems*: a choice that favours DPS and needs the exact posterior. DDRM has η = 0.85 and η_b = 1, its authors' choice.


# %%
class Observed(eqx.Module):
    """y = A x_0 + noise in the chain's units, and the model."""

    model: probdiff.Diffusion
    matrix: jax.Array
    y: jax.Array
    noise: jax.Array

    def table(self, name, n):
        return jnp.asarray(getattr(SCHEDULE, name), jnp.float32)[n - 1]

    def x0(self, z, n):
        return (z - self.table("noise_scale", n) * self.model.predict_noise(z, n)) / self.table("signal_scale", n)


def observed_of(case):
    matrix, y, noise = (jnp.asarray(each, jnp.float32) for each in (case.matrix * SCALE, case.y, case.noise))
    return Observed(model_of(case), matrix, y, noise)


def dps(given, z, n, step_size):
    """The shift of the mean: eq. 16 and algorithm 1, with the norm."""
    return -step_size * jax.grad(lambda z: jnp.linalg.norm(given.y - given.matrix @ given.x0(z, n)))(z)


def gaussian_guidance(given, z, n, covariance_of):
    """The shift of the mean by ∇ log p(y | z_n), if A x_0 given z_n is normal with a fixed covariance."""
    x0, pull = jax.vjp(lambda z: given.x0(z, n), z)
    of_y = covariance_of(pull) + jnp.square(given.noise) * jnp.eye(len(given.y))
    gradient = pull(jnp.linalg.solve(of_y, given.y - given.matrix @ x0) @ given.matrix)[0]
    return given.table("beta", n) / jnp.sqrt(given.table("alpha", n)) * gradient


def pigdm(given, z, n, _):
    """The covariance r² A Aᵀ, r² = 1 − ᾱ_n: eq. 7 and appendix A.3 (σ²/(1 + σ²) with σ² = (1 − ᾱ)/ᾱ)."""
    return gaussian_guidance(given, z, n, lambda pull: given.table("one_minus_alpha_bar", n) * given.matrix @ given.matrix.T)


def tmpd(given, z, n, _):
    """The covariance (1−ᾱ)/√ᾱ A ∂x̂_0 Aᵀ: section 3."""
    ratio = given.table("one_minus_alpha_bar", n) / given.table("signal_scale", n)
    return gaussian_guidance(given, z, n, lambda pull: ratio * jax.vmap(lambda row: pull(row)[0])(given.matrix) @ given.matrix.T)


def _each(chain, key):
    return jax.lax.map(chain, jax.random.split(key, PARTICLES), batch_size=min(PARTICLES, AT_ONCE))


@eqx.filter_jit
def guided(given, key, move, step_size):
    """Ancestral sampling with a shifted mean at each step; samples in the chain's units."""

    def chain(key):
        first, *keys = jax.random.split(key, NUM_STEPS + 1)

        def step(z, step):
            n, key = step
            kernel = given.model.reverse_kernel(z, n).base_dist
            return kernel.loc + move(given, z, n, step_size) + kernel.scale * jax.random.normal(key, z.shape), None

        z = jax.random.normal(first, (given.matrix.shape[1],))
        return jax.lax.scan(step, z, (jnp.arange(NUM_STEPS, 0, -1), jnp.stack(keys)))[0]

    return _each(chain, key)


@eqx.filter_jit
def ddrm(given, key, eta=0.85, eta_b=1.0):
    """Eqs. 4 and 5, in the right singular vectors of A and for x_0 + σ_n ε; the last step gives x̂_0."""
    left, singular, right = jnp.linalg.svd(given.matrix, full_matrices=True)
    dim, observed = given.matrix.shape[1], len(given.y)
    y = jnp.zeros(dim).at[:observed].set(left.T @ given.y / singular)
    spread = jnp.full(dim, jnp.inf).at[:observed].set(given.noise / singular)  # the noise of y in these coordinates
    sigmas = jnp.asarray(SCHEDULE.noise_scale / SCHEDULE.signal_scale, jnp.float32)

    def chain(key):
        first, *keys = jax.random.split(key, NUM_STEPS + 1)

        def step(x, step):
            n, key = step
            sigma, next_sigma = sigmas[n - 1], jnp.where(n > 1, sigmas[n - 2], 0.0)
            x0 = right @ given.x0(right.T @ x * given.table("signal_scale", n), n)
            towards = jnp.where(jnp.isinf(spread), (x - x0) / sigma, (y - x0) / spread)
            wide = next_sigma < spread
            mean = jnp.where(wide, x0 + jnp.sqrt(1 - eta**2) * next_sigma * towards, (1 - eta_b) * x0 + eta_b * y)
            variance = jnp.where(wide, (eta * next_sigma) ** 2, next_sigma**2 - eta_b**2 * jnp.where(wide, 0.0, spread) ** 2)
            return mean + jnp.sqrt(jnp.maximum(variance, 0)) * jax.random.normal(key, x.shape), None

        known = spread < sigmas[-1]
        start = jnp.where(known, y, 0.0)
        start += jnp.sqrt(sigmas[-1] ** 2 - jnp.where(known, spread, 0.0) ** 2) * jax.random.normal(first, (dim,))
        return right.T @ jax.lax.scan(step, start, (jnp.arange(NUM_STEPS, 0, -1), jnp.stack(keys)))[0]

    return _each(chain, key)


RIVALS = {f"DPS, ζ = {size:g}": lambda given, key, size=size: guided(given, key, dps, jnp.float32(size)) for size in STEP_SIZES}
RIVALS |= {name: lambda given, key, move=move: guided(given, key, move, None) for name, move in (("ΠGDM", pigdm), ("TMPD", tmpd))}
RIVALS |= {"DDRM": ddrm}
TWISTS = {"SMC, Tweedie": "tweedie", "SMC, point (TDS)": "point"}


# %%
def timed(function, *args, **options):
    """A result, and the seconds of a core that it took."""
    start = time.process_time()
    found = jax.block_until_ready(function(*args, **options))
    return found, time.process_time() - start


def compared(case, seed):
    """A row for each method."""
    known, given, key, rows = reference(case), observed_of(case), jax.random.key(seed), {}
    for name, twist in TWISTS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of degenerate weights, which the table shows
            observation = LinearGaussian(case.matrix, case.y, case.noise)
            found, seconds = timed(smc, given.model, observation, key=key, num_particles=PARTICLES, twist=twist)
        rows[name] = measured(case, known, found.samples, seconds, found.weights if np.isfinite(found.log_evidence) else None, found)
    for name, sampler in RIVALS.items():
        x, seconds = timed(sampler, given, key)
        rows[name] = measured(case, known, x * SCALE, seconds)
    rows["exact"] = Row(1.0, known.variation, 0.0)
    return rows


# %% [markdown]
# ## The comparison
#
# The measurements of each size are kept in a file in the current directory, from which an interrupted run continues.


# %%
def spread(values):
    """Median with the range."""
    return "{} [{}, {}]".format(*(f"{value:.3g}" if value > 5e-4 else "0" for value in (np.median(values), np.min(values), np.max(values))))


def of_size(dim, observed):
    """For each method a row for each problem."""
    file = Path(f"inverse_problems-{dim}-{observed}.json")
    done = json.loads(file.read_text()) if file.exists() else []
    for seed in range(len(done), PROBLEMS):
        done.append(compared(mixture_case(dim, observed, seed), seed))
        file.write_text(json.dumps(done))
    found = {name: [Row(*each[name]) for each in done] for name in done[0]}
    best = min((name for name in RIVALS if name.startswith("DPS")), key=lambda name: np.median([row.distance for row in found[name]]))
    kept = {name: rows for name, rows in found.items() if name == best or not name.startswith("DPS")}
    print(f"\ndim {dim}, {observed} observed, {len(kept['exact'])} problems: median [least, greatest]")
    print(f"{'':18}{'distance / floor':>22}{'total variation':>26}{'|log Ẑ − log p(y)|':>26}{'ESS at the end':>20}{'ESS, worst step':>20}{'seconds':>9}")
    for name, rows in kept.items():
        line = f"{name:18}{spread([row.distance for row in rows]):>22}{spread([row.variation for row in rows]):>26}"
        if rows[0].error is None:
            line += " " * 66
        else:
            line += f"{spread([abs(row.error) for row in rows]):>26}{spread([row.ess for row in rows]):>20}{spread([row.worst for row in rows]):>20}"
        print(line + f"{np.median([row.seconds for row in rows]):9.2f}", flush=True)
    return {name.split(",")[0] if name == best else name: rows for name, rows in kept.items()}


results = {(dim, observed): of_size(dim, observed) for dim in DIMS for observed in OBSERVED}
ours = [row for each in results.values() for row in each["SMC, Tweedie"]]
distances, errors = (np.array([getattr(row, name) for row in ours]) for name in ("distance", "error"))
print(f"\nSMC, Tweedie, all {len(ours)} problems: distance / floor {spread(distances)}; target: a median of at most 1.3")
print(f"|log Ẑ − log p(y)| at most 0.2 in {np.mean(np.abs(errors) <= 0.2):.0%}; target: 90 %. Mean of log Ẑ − log p(y): {errors.mean():+.3f}, r.m.s. {np.sqrt(np.square(errors).mean()):.3f}")

# %% [markdown]
# ## The figure

# %%
names = list(next(iter(results.values())))[:-1]
figure = Figure(figsize=(10, 4.8), dpi=110, layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(3, 1))
places, MOST = np.arange(len(results)), 1000  # larger distances are drawn at this one
for k, name in enumerate(names):
    offset = (k - (len(names) - 1) / 2) * 0.12
    for place, each in zip(places, results.values()):
        values = np.minimum([row.distance for row in each[name]], MOST)
        colour = f"C{k}"
        left.plot(np.full(len(values), place + offset), values, "o", ms=3, color=colour, alpha=0.35, mec="none")
        left.plot(place + offset, np.median(values), "_", ms=11, mew=2.5, color=colour, label=name if place == 0 else None)
left.axhline(1, color="k", lw=0.8, ls="--", label="floor: two exact samples")
left.set_xticks(places, [f"dim {dim}\n{observed} observed" for dim, observed in results])
left.set(yscale="log", ylim=(0.2, 2e4), ylabel=f"sliced Wasserstein distance in units of the floor\n({MOST}: this or more)")
left.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
for k, name in enumerate(TWISTS):
    values = np.concatenate([[abs(row.error) for row in each[name]] for each in results.values()])
    right.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values), drawstyle="steps-post", color=f"C{k}", label=name)
right.axvline(0.2, color="k", lw=0.8, ls=":", label="0.2 nats")
right.set(xscale="log", xlabel="|log Ẑ − log p(y)|, nats", ylabel="share of problems below", ylim=(0, 1.02))
right.legend(frameon=False, fontsize=8, loc="lower right")
for axes in (left, right):
    axes.grid(alpha=0.3)
figure.savefig("inverse_problems.png")
print("\nfigure: inverse_problems.png")

# %% [markdown]
# ## A check: normal priors
#
# As N → ∞, ΠGDM, TMPD and the Tweedie twist are exact for a standard normal prior, and TMPD and the Tweedie twist for a correlated one; their distances must be near 1, the floor.
# DPS and DDRM are biased even here: DPS ignores the uncertainty of x_0 given z_n, and DDRM replaces x_0 by its mean given z_n alone.


# %%
def shown(cells):
    return "".join(f"{cell:>14}" for cell in cells)


def normal_case(seed, correlated):
    """A normal prior on the scale of the chain, written as 25 equal components, so that nothing is compiled again."""
    rng = np.random.default_rng([7, seed])
    root = rng.normal(size=(8, 8)) / np.sqrt(8)
    covariance = SCALE**2 * (root @ root.T + 0.05 * np.eye(8) if correlated else np.eye(8))
    return drawn(GaussianMixture(np.full(25, 0.04), np.zeros((25, 8)), covariance), 2, rng)


checked = {
    name: [compared(normal_case(seed, correlated), seed) for seed in range(1 if quick else 5)] for name, correlated in (("standard", False), ("correlated", True))
}
print(f"\nnormal priors in 8 dimensions, 2 observed: distance in units of the floor, median of {len(checked['standard'])} problems\n{'':20}" + shown(checked))
for method in [*TWISTS, *RIVALS]:
    medians = {name: float(np.median([rows[method].distance for rows in each])) for name, each in checked.items()}
    print(f"{method:20}" + shown(f"{median:.2f}" for median in medians.values()), flush=True)
    for name, median in medians.items():
        exact = method in ("SMC, Tweedie", "TMPD") or (method, name) == ("ΠGDM", "standard")
        assert quick or not exact or median < 1.5, (method, name, median)

# %% [markdown]
# ## The evidence of the model, and of the true distribution
#
# Ẑ is unbiased for p_θ(y), the evidence of the chain with its N steps. Above, log Ẑ was compared with log p(y) of the true distribution. The difference of log p_θ(y) from log p(y) is
# estimated from the mean of many runs.

# %%
print("\nlog p_θ(y) of the model minus log p(y) of the true distribution, nats")
for dim in DIMS:
    for observed in OBSERVED:
        case = mixture_case(dim, observed, 0)
        runs = MORE if dim == 8 else MORE // 2
        found = smc(model_of(case), LinearGaussian(case.matrix, case.y, case.noise), key=jax.random.key(1), num_particles=PARTICLES, num_runs=runs)
        print(f"dim {dim}, {observed} observed: {found.log_evidence - case.log_evidence:+.4f} ± {found.log_evidence_error:.4f}", flush=True)

# %% [markdown]
# ## Time against particles, and against N
#
# The time should be linear in both. The last column is the time divided by the time in proportion to the second row.

# %%
case = mixture_case(8, 2, 0)
observation = LinearGaussian(case.matrix, case.y, case.noise)


def model_of_steps(num_steps):
    """The chain with another number of steps, and the same network."""
    schedule = probdiff.log_snr_schedule(num_steps, 10.0, -8.0)
    return probdiff.Diffusion(schedule, model_of(case).network, probdiff.NormalLikelihood(0.0, SCALE), reverse_variance="forward")


print("\nseconds of one core, without compilation; 8 dimensions, 2 observed")
SIZES = [(32, NUM_STEPS), (PARTICLES, NUM_STEPS)] if quick else [(256, 200), (1024, 200), (4096, 200), (1024, 50), (1024, 100), (1024, 400)]
times = {}
for particles, num_steps in SIZES:
    for key in jax.random.split(jax.random.key(2), 2):
        found, times[particles, num_steps] = timed(smc, model_of_steps(num_steps), observation, key=key, num_particles=particles)
of_each = times[SIZES[1]] / np.prod(SIZES[1])
for (particles, num_steps), seconds in times.items():
    print(f"{particles:6} particles, N = {num_steps:4}: {seconds:6.2f} s, {seconds / of_each / particles / num_steps:5.2f}", flush=True)

# %% [markdown]
# ## Calibration
#
# Simulation-based calibration (Talts et al. 2018, arXiv:1804.06788): x is drawn from the model and y given x; if the posterior is right, the rank of x among its draws is uniform. The ranks are of two coordinates,
# and of log p(y | x), which detects a posterior that ignores y (Modrák et al. 2023, arXiv:2211.02383). ArviZ plots the empirical distribution function (ECDF) of the ranks minus that of the uniform distribution,
# with a simultaneous band of 98.5 %, so that all three curves are inside with a probability of at least 95 %. As a negative control, the same is done with the y of another x.

# %%
import arviz as az
from arviz_stats.ecdf_utils import compute_ecdf, ecdf_pit

PAIRS, RANKS, KEPT = (10, 9, 8) if quick else (200, 99, 256)
BAND, OF = 0.985, ("x₁", "x₂", "log p(y | x)")
model = model_of_steps(8 if quick else 50)
true = probdiff.samplers.ancestral(model, key=jax.random.key(4), num_samples=PAIRS)
seen = true @ case.matrix.T + case.noise * np.random.default_rng(4).normal(size=(PAIRS, 2))


def ranks(y, key):
    """The number of draws given each y that are below the true x, for each quantity: shape ``(pair, quantity)``."""
    found = []
    for x, each, keys in zip(true, y, jax.random.split(key, (PAIRS, 2))):
        observed = LinearGaussian(case.matrix, each, case.noise)
        drawn = smc(model, observed, key=keys[0], num_particles=KEPT).resample(keys[1], RANKS)
        both = np.concatenate([x[None], drawn])
        quantities = np.column_stack([both[:, :2], np.asarray(observed.log_prob(jnp.asarray(both, jnp.float32)))])
        found.append((quantities[1:] < quantities[0]).sum(0))
    return np.array(found)


uniform = np.random.default_rng(0).uniform(size=(PAIRS, len(OF)))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of degenerate weights, for the y of another x
    pit = {label: (ranks(y, jax.random.key(5)) + uniform) / (RANKS + 1) for label, y in (("own y", seen), ("y of another", np.roll(seen, 1, 0)))}
dims = {label: ["quantity"] for label in pit}
tree = az.from_dict({"prior_sbc": {label: each[None] for label, each in pit.items()}}, dims=dims, coords={"quantity": list(OF)})
p_values = tree["prior_sbc"].dataset.azstats.uniformity_test(dim=["chain", "draw"], method="pot_c")[0]
layout = {"col_wrap": len(OF), "figure_kwargs": {"figsize": (9, 5), "layout": "constrained"}}
plots = az.plot_ecdf_pit(tree, group="prior_sbc", envelope_prob=BAND, backend="matplotlib", visuals={"p_value_text": False}, **layout)
points, _, lower, upper = ecdf_pit(uniform[:, 0], BAND, n_simulations=200 if quick else 10_000)
print(f"\ncalibration: ranks of {PAIRS} x among {RANKS} draws of their posterior, {KEPT} particles, N = {model.schedule.num_steps}")
for label, each in pit.items():
    curves = np.stack([compute_ecdf(values, points) for values in each.T])
    out = np.maximum(curves - upper, lower - curves).max(1)
    print(f"{label}: {(out <= 0).sum()} of {len(out)} inside the band; furthest out by {out.max():.3f}; ", end="")
    print(f"p-values of uniformity {float(p_values[label].min()):.2g} to {float(p_values[label].max()):.2g}")
    for axes, name in zip(plots.viz["plot"][label].values, OF):
        axes.fill_between(points, lower - points, upper - points, step="mid", color="C2", alpha=0.2, lw=0)
        axes.set(title=f"{name}, {label}", ylim=(-1, 1), xlabel="rank, as a share", ylabel="Δ ECDF" if axes.get_subplotspec().is_first_col() else "")
plots.savefig("inverse_problems_calibration.png")
print("figure: inverse_problems_calibration.png")
