# %% [markdown]
# # How good are the samples of each sampler, for how many network evaluations?
#
# The model is fitted to the moons with the defaults of `probdiff fit`, but N = 1000 steps. Its samples are compared with
# test data. Then the exact ε-network of the moons takes the place of the fitted one, so that only the error of the
# sampler remains. Errors (±) are one standard error. The figure is saved to the current directory.

# %%
import argparse

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist

import probdiff
from probdiff.presets import default_diffusion, default_options

parser = argparse.ArgumentParser(description="How good are the samples of each sampler?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
parser.add_argument("--data", choices=["moons", "8gaussians"], default="moons")
parser.add_argument("--claim", action="store_true", help="DDIM in 20 steps and ancestral only")
arguments = parser.parse_args()
quick = arguments.quick

N, SAMPLES, TEST, GROUPS = (50, 100, 200, 10) if quick else (1000, 10_000, 20_000, 100)
CLAIMED = 5 if quick else 20  # steps of DDIM
STEPS = (CLAIMED,) if quick or arguments.claim else (5, 10, 20, 30, 40, 50, 100, 200)
HEUN = (3,) if quick else (3, 5, 10, 20, 50)
LANGEVIN = ((3, 2),) if quick else ((10, 5), (10, 10), (20, 10), (50, 10), (100, 10))  # levels, updates at each
if arguments.claim:
    HEUN, LANGEVIN = (10,), ()
UNIT = 1e-4  # of the printed energy distances, in units of the data
Z_MAX = 4.9  # standard errors

data = probdiff.datasets.load(arguments.data)
test = data.test[:TEST]
untrained = default_diffusion(data, N)
schedule = untrained.schedule

# %% [markdown]
# ## The measure
#
# The energy distance, 2 E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖ for samples X and data Y: zero if their distributions are the
# same, positive otherwise. Samples and data are split into G = 100 groups. Samples and data of two groups, i and j,
# give an unbiased estimate hᵢⱼ; the mean over all pairs i ≠ j is a U-statistic of order two, and so is the difference
# between two samplers, from the same data. Its variance has an unbiased estimate: 4(G − 2) ζ₁ + 2 ζ₂ over G(G − 1),
# with ζ₁ the covariance of hᵢⱼ and hᵢₖ and ζ₂ the variance of hᵢⱼ. Near zero distance ζ₁ vanishes; an estimate below 0
# is taken as 0.
#
# Source: Székely and Rizzo (2013), doi:10.1016/j.jspi.2013.03.018; Hoeffding (1948), doi:10.1214/aoms/1177730196, eq.
# 5.13.


# %%
def between(a, b):
    """Mean distance of the points in each group of ``a`` from those in each group of ``b``."""
    return np.array([cdist(rows, b).mean(0).reshape(GROUPS, -1).mean(1) for rows in np.split(a, GROUPS)])


WITHIN_TEST = between(test, test)


def energy(x):
    """hᵢⱼ for the samples ``x``."""
    cross = between(x, test)
    return cross + cross.T - between(x, x) - WITHIN_TEST


def estimate(h):
    """Mean of hᵢⱼ, i ≠ j, and its standard error."""
    h, size = h * (1 - np.eye(GROUPS)), GROUPS
    pairs = size * (size - 1)
    total, rows, squares = h.sum(), np.square(h.sum(1)).sum(), np.square(h).sum()
    square_of_mean = (total**2 - 4 * rows + 2 * squares) / (pairs * (size - 2) * (size - 3))
    zeta_1 = (rows - squares) / (pairs * (size - 2)) - square_of_mean
    zeta_2 = squares / pairs - square_of_mean
    return total / pairs, np.sqrt((4 * (size - 2) * max(zeta_1, 0) + 2 * zeta_2) / pairs)


# %% [markdown]
# ## The samplers
#
# DDIM takes any sub-sequence of the steps. The schedule of the moons is linear in log-SNR, from 15 to −6, so that steps
# spread evenly over 1 … N are even in log-SNR. But the shape of the data is determined between 6 and −4. *Quadratic* is
# the other sub-sequence of Song et al. (2021), arXiv:2010.02502, appendix D.2. The last, *arcsinh*, is even in the
# arcsinh of the log-SNR, from 5 to −3: densest at log-SNR 0, where signal and noise are equal.


# %%
def nearest(log_snr):
    """The steps whose log-SNRs are nearest to the given ones, increasing."""
    return np.unique(np.abs(schedule.log_snr[:, None] - log_snr).argmin(0)) + 1


EVEN, ARCSINH = "even", "arcsinh, 5 … −3"
SPACINGS = {
    EVEN: lambda steps: np.unique(np.linspace(1, N, steps).round().astype(int)),
    "quadratic": lambda steps: np.unique((1 + (N - 1) * np.linspace(0, 1, steps) ** 2).round().astype(int)),
    "even, 6 … −4": lambda steps: nearest(np.linspace(6, -4, steps)),
    ARCSINH: lambda steps: nearest(np.sinh(np.linspace(np.arcsinh(5), np.arcsinh(-3), steps))),
}
SERIES = ((EVEN, 0), (EVEN, 1), ("quadratic", 0), ("even, 6 … −4", 0), (ARCSINH, 0), (ARCSINH, 0.5), (ARCSINH, 1))


def settings():
    """Series, setting, network evaluations, sampler and its options; ancestral first, true data last."""
    yield "ancestral", "", N, probdiff.samplers.ancestral, {}
    for spacing, eta in SERIES:
        for number in STEPS if spacing in (EVEN, ARCSINH) and eta != 0.5 else (CLAIMED,):
            steps = SPACINGS[spacing](number)
            yield f"ddim, η = {eta}, {spacing}", number, len(steps), probdiff.samplers.ddim, {"steps": steps, "eta": eta}
    for levels, updates in LANGEVIN:
        options = {"steps": levels, "num_updates": updates}
        setting = f"{levels} × {updates}"
        yield "annealed_langevin", setting, levels * updates + 1, probdiff.samplers.annealed_langevin, options
    for number in HEUN:
        yield "probability_flow", number, 4 * number + 1, probdiff.samplers.probability_flow, {"steps": number}
    yield "true data", "", 0, lambda *_, **__: data.oracle.sample(np.random.default_rng(3), SAMPLES), {}


# %% [markdown]
# ## The measurements
#
# The last column is another measure, of errors to which the energy distance is hardly sensitive: the mean true log density
# of the samples plus the entropy H, in nats. It is negative if samples lie off the moons, positive if they are too
# concentrated.

# %%
entropy, _ = data.entropy()


def measure(diffusion):
    """Rows of (series, setting, evaluations, energy distance, difference from ancestral); each pair with its error."""
    print(f"{'sampler':31}{'steps':>9}{'evals':>7}{'energy distance':>21}{'minus ancestral':>21}{'log p + H':>15}")
    rows, ancestral = [], None
    for k, (name, setting, evaluations, sampler, options) in enumerate(settings()):
        key = jax.random.fold_in(jax.random.key(2), k)
        x = np.asarray(sampler(diffusion, key=key, num_samples=SAMPLES, **options), np.float64)
        h, surplus = energy(x), data.log_prob(x) + entropy
        ancestral = h if ancestral is None else ancestral
        pairs = estimate(h), estimate(h - ancestral)
        cells = (f"{value / UNIT:12.2f} ± {error / UNIT:<6.2f}" for value, error in pairs)
        last = f"{surplus.mean():10.4f} ± {surplus.std(ddof=1) / np.sqrt(SAMPLES):.4f}"
        print(f"{name:31}{setting!s:>9}{evaluations:>7}" + "".join(cells) + last, flush=True)
        rows.append((name, setting, evaluations, *pairs))
    return rows


def fit():
    options = {name: default_options(data)[name] for name in ("iterations", "batch_size", "learning_rate")}
    return probdiff.fit(untrained, data.train, key=jax.random.key(1), validation=data.validation, **options).diffusion


likelihood = untrained.likelihood
exact = data.exact_network(schedule, likelihood)
networks = {} if quick else {"fitted network": fit()}
networks["exact network"] = probdiff.Diffusion(schedule, exact, likelihood, reverse_variance="forward")
results = {}
for network, diffusion in networks.items():
    print(f"\n{network}, N = {N}: {SAMPLES} samples, {TEST} test data; energy distances in {UNIT:.0e} data units, log p + H in nats")
    results[network] = measure(diffusion)

# %% [markdown]
# ## Is DDIM in 20 steps within twice the sampling error of ancestral sampling in 1000?
#
# The sampling error is the standard error of the energy distance of ancestral sampling, in the tables above. Distances
# here are in 10⁻⁴ data units.
#
# With `--data 8gaussians` the answer is yes for *arcsinh*: its 20 steps are 3.3 ± 4.8 from ancestral, with a limit of 8.9.
# On the moons (findings of a run with log-SNR from 13 to −8) it is no for every sub-sequence tried, with either network.
# Even steps are at 20 times the limit; *arcsinh* is the best, at three times. DDIM at η = 0 is Euler's method on the
# probability flow: S steps displace its samples by about 1/S, and the energy distance grows with the square of that. The
# limit is reached by some 50 *arcsinh* steps, 100 even ones, or 10 steps of Heun's method (41 evaluations). (Near the limit the
# answer depends on chance, as the samples of DDIM have a sampling error, too.) Langevin dynamics takes between 200 and
# 500 evaluations.
#
# All this is the error of the samplers, as the exact network is no better. The log density does show the error of the
# fitted network: the probability flow in 50 steps, with hardly an error of its own, has log p + H = −0.051 ± 0.014 nats,
# and −0.003 ± 0.008 nats with the exact network. With *arcsinh* it is above 0, up to 0.15 nats: these steps end at
# log-SNR 5 with the expected datum, and so lose noise that the data have.

# %%
for network, rows in results.items():
    limit = 2 * rows[0][3][1]
    print(f"\n{network}: is ddim in {CLAIMED} steps within {limit / UNIT:.2f} of ancestral in {N}?")
    for series in dict.fromkeys(row[0] for row in rows if row[0].startswith("ddim")):
        away = {row[1]: row[4] for row in rows if row[0] == series}
        difference, error = away.pop(CLAIMED)
        verdict = "yes" if abs(difference) <= limit else f"no, {abs(difference) / limit:.1f} times the limit"
        also = ", ".join(str(steps) for steps, (distance, _) in away.items() if abs(distance) <= limit)
        distance = f"{difference / UNIT:9.2f} ± {error / UNIT:.2f}"
        print(f"{series:31}{distance:20}{verdict}" + (f"; in {also} steps yes" if also else ""))
        reached = arguments.data == "8gaussians" and series == f"ddim, η = 0, {ARCSINH}"
        assert quick or (abs(difference) <= limit if reached else arguments.data != "moons" or abs(difference) > limit)
    if not quick:
        found = {row[:2]: row[4] for row in rows}
        (even, even_error), (best, error) = (found[f"ddim, η = 0, {spacing}", CLAIMED] for spacing in (EVEN, ARCSINH))
        print(f"the distance of even steps minus that of arcsinh: {(even - best) / UNIT:.2f} ± {np.hypot(even_error, error) / UNIT:.2f}")
        assert abs(found["probability_flow", 10][0]) <= Z_MAX * found["probability_flow", 10][1]

# %% [markdown]
# ## The figure

# %%
figure = Figure(figsize=(12, 5.5), dpi=110, layout="constrained")
markers = {"ddim": "o", "annealed_langevin": "s", "probability_flow": "^"}
for axes, (network, rows) in zip(figure.subplots(1, len(results), sharey=True, squeeze=False)[0], results.items()):
    (middle, error), (floor, _) = (np.divide(row[3], UNIT) for row in (rows[0], rows[-1]))
    axes.axhspan(middle - 2 * error, middle + 2 * error, color="0.85", label=f"ancestral, {N} steps, ± 2 s.e.")
    axes.axhline(floor, color="k", lw=0.8, ls="--", label="true data")
    for k, series in enumerate(dict.fromkeys(row[0] for row in rows[1:-1])):
        places, values = zip(*((row[2] * 1.02 ** (k - 4), row[3]) for row in rows if row[0] == series))
        height, error = np.transpose(values) / UNIT
        style = {"marker": markers[series.split(",")[0]], "ls": "-" if len(height) > 1 else "none"}
        style |= {"mfc": "w", "ls": "--"} if "η = 1" in series else {}
        axes.errorbar(places, height, 2 * error, label=series, ms=4, lw=1.2, elinewidth=0.8, capsize=2, **style)
    axes.set(xscale="log", xlabel="network evaluations per sample", title=network)
    axes.set_yscale("symlog", linthresh=10, linscale=0.8)
    axes.set_xticks(ticks := [5, 10, 20, 50, 100, 200, 500, 1000], ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
figure.axes[0].set_ylabel("energy distance to the test data, 10⁻⁴ units of the data, ± 2 s.e.\n(linear below 10)")
figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
figure.savefig("samplers.png")
print("\nfigure: samplers.png")
