# %% [markdown]
# # How does a fitted diffusion become the prior of a latent in a program of one's own?
#
# In a hierarchical program, each of four units has a latent x in the plane, whose prior is a diffusion. One coordinate of each x is observed, along a known direction, with an
# unknown offset and noise scale that all units share. To be inferred are offset, scale, and every x.
#
# The posterior is sampled in three ways. `FlowPrior`: x is a latent with the density of the probability flow, sampled by NUTS in the space of z_N. `ChainPrior`: the latents are the noise of a
# short chain, sampled by NUTS. `log_evidence`: sequential Monte Carlo integrates x out, and `PseudoMarginal` samples offset and scale (particle marginal
# Metropolis–Hastings); x is then drawn given them by `smc`.
#
# The distribution of x is a mixture of three Gaussians that overlap, and the network is the exact one, so that the posterior is known: given offset and scale it is a mixture again, and
# these two are integrated on a grid. The figure is saved to the current directory.

# %%
import argparse
import time

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from matplotlib.figure import Figure
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.reparam import TransformReparam
from scipy import stats

import probdiff
from probdiff.inference import ChainPrior, FlowPrior, LinearGaussian, Program, PseudoMarginal, log_evidence, smc
from probdiff.oracles import GaussianMixture

parser = argparse.ArgumentParser(description="How does a fitted diffusion become the prior of a latent in a program of one's own?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

UNITS, CHAINS = (1, 2) if quick else (4, 4)
NUM_STEPS, FLOW_STEPS = (4, 3) if quick else (30, 25)
WARMUP, DRAWS = (5, 10) if quick else (200, 400)  # of NUTS, for each chain
WALK_WARMUP, WALK, PARTICLES = (5, 60, 4) if quick else (200, 800, 16)  # of the random walk, for each chain
PLACES, PLACE_PARTICLES = (8, 4) if quick else (100, 64)  # draws of offset and scale for which x is drawn; particles for each

# %% [markdown]
# ## The prior, the program and the data

# %%
MIXTURE = GaussianMixture(
    [0.4, 0.35, 0.25], [[-1.3, -0.4], [0.1, 0.9], [1.2, -0.5]], [[[0.25, 0.1], [0.1, 0.35]], [[0.35, -0.1], [-0.1, 0.15]], [[0.15, -0.1], [-0.1, 0.4]]]
)
DIRECTION = np.array([0.8, 0.6])
OFFSET, SCALE = 0.7, 0.35  # of the data
rng = np.random.default_rng(1)
Y = MIXTURE.sample(rng, UNITS) @ DIRECTION + OFFSET + SCALE * rng.normal(size=UNITS)


SCHEDULE = probdiff.log_snr_schedule(NUM_STEPS, 7.0, -6.0)


def shared():
    return numpyro.sample("offset", dist.Normal(0, 1)), numpyro.sample("scale", dist.LogNormal(-1, 0.5))


def read(x, offset, scale):
    return dist.Normal(x @ DIRECTION + offset, scale)


def program(prior, y):
    offset, scale = shared()
    with numpyro.plate("unit", len(y)):
        x = prior()
        numpyro.sample("y", read(x, offset, scale), obs=y)


def with_flow(fitted):
    """The program with z_N as the latent, where the posterior is nearly normal."""
    return handlers.reparam(lambda y: program(lambda: numpyro.sample("x", FlowPrior(fitted, steps=FLOW_STEPS)), y), {"x": TransformReparam()})


def with_chain(fitted):
    return lambda y: program(lambda: ChainPrior(fitted)(), y)


def with_particles(fitted):
    """The program with x integrated out; the particles use the key."""

    def of_y(key, y):
        offset, scale = shared()

        def of_unit(key, y):
            observed = Program(lambda x: numpyro.sample("y", read(x, offset, scale), obs=y))
            return log_evidence(fitted, observed, key=key, num_particles=PARTICLES)

        numpyro.factor("evidence", jax.vmap(of_unit)(jax.random.split(key, len(y)), y).sum())

    return of_y


# %% [markdown]
# ## The exact posterior
#
# It is computed on a grid of offset and scale. The first two moments of x are averages over the grid of the moments of a mixture.

# %%
offsets, scales = np.linspace(-2.0, 3.0, 241), np.exp(np.linspace(-3.5, 1.2, 241))
grid_offset, grid_scale = (each.ravel() for each in np.meshgrid(offsets, scales, indexing="ij"))


def given_shared(y, offset, scale):
    """For one unit and arrays of offsets and scales: log p(y), and the weights, means and covariances of the components of x given y."""
    gain = MIXTURE.covariances @ DIRECTION
    of_y = gain @ DIRECTION + scale[:, None] ** 2
    residual = y - offset[:, None] - MIXTURE.means @ DIRECTION
    log_weights = np.log(MIXTURE.weights) + stats.norm.logpdf(residual, 0, np.sqrt(of_y))
    log_y = np.logaddexp.reduce(log_weights, 1)
    means = MIXTURE.means + (residual / of_y)[..., None] * gain
    covariances = MIXTURE.covariances - gain[:, :, None] * gain[:, None] / of_y[..., None, None]
    return log_y, np.exp(log_weights - log_y[:, None]), means, covariances


of_units = [given_shared(y, grid_offset, grid_scale) for y in Y]
# (The grid is even in the log of the scale, whose density is normal.)
log_joint = stats.norm.logpdf(grid_offset) + stats.norm.logpdf(np.log(grid_scale), -1, 0.5) + sum(log_y for log_y, *_ in of_units)
weight = np.exp(log_joint - log_joint.max())
weight /= weight.sum()
EXACT = {"offset": (weight @ grid_offset, weight @ grid_offset**2), "scale": (weight @ grid_scale, weight @ grid_scale**2)}
for j, (_, shares, means, covariances) in enumerate(of_units):
    for d in range(2):
        second = means[..., d] ** 2 + covariances[..., d, d]
        EXACT[f"x[{j}, {d}]"] = tuple(float(weight @ (shares * each).sum(1)) for each in (means[..., d], second))
EXACT = {name: (first, float(np.sqrt(second - first**2))) for name, (first, second) in EXACT.items()}

# %% [markdown]
# ## The three ways
#
# Printed is the difference of each posterior mean from the exact one, in units of the exact standard deviation (sd), with the Monte Carlo error by ArviZ's effective sample size.
# Neither the chain nor the flow is exactly the mixture: they differ by the effect of N steps and by the noise of the first step. With the short chain this is visible.


# %%
def sampled(kernel, *args, seed, **options):
    """Draws of each site, ``(chain, draw, …)``, and the seconds of a core."""
    mcmc = MCMC(kernel, num_chains=CHAINS, progress_bar=False, **options)
    start = time.process_time()
    mcmc.run(jax.random.key(seed), *args)
    found = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    return found, time.process_time() - start


def by_nuts(program, seed):
    """Sample all latents at once; x is computed from them."""
    found, seconds = sampled(NUTS(program), jnp.asarray(Y), seed=seed, num_warmup=WARMUP, num_samples=DRAWS, chain_method="vectorized")
    if "x" not in found:
        found |= Predictive(program, found, batch_ndims=2, return_sites=["x"])(jax.random.key(0), jnp.asarray(Y))
    return found, seconds


def by_particles(fitted, seed):
    """Offset and scale by a random walk on the estimate of the evidence; x of each unit by particles, given some of the draws."""
    kernel, options = PseudoMarginal(with_particles(fitted)), {"num_warmup": WALK_WARMUP, "num_samples": WALK}
    found, seconds = sampled(kernel, jnp.asarray(Y), seed=seed, chain_method="sequential", **options)
    start = time.process_time()
    places = {name: np.ravel(found[name])[:: CHAINS * WALK // PLACES][:PLACES] for name in ("offset", "scale")}
    x = []
    for k, (offset, scale) in enumerate(zip(*places.values())):
        for j, key in enumerate(jax.random.split(jax.random.fold_in(jax.random.key(seed), k), UNITS)):
            observed = LinearGaussian(DIRECTION[None], [Y[j] - offset], scale)
            x.append(smc(fitted, observed, key=key, num_particles=PLACE_PARTICLES).resample(key, 1)[0])
    return found | {"x": np.reshape(x, (CHAINS, -1, UNITS, 2))}, seconds + time.process_time() - start


def columns(found):
    """The draws of each quantity, ``(chain, draw)``."""
    x = np.asarray(found["x"], np.float64)
    return {name: np.asarray(found[name], np.float64) for name in ("offset", "scale")} | {f"x[{j}, {d}]": x[..., j, d] for j in range(UNITS) for d in range(2)}


exact = probdiff.Diffusion(SCHEDULE, MIXTURE.network(SCHEDULE)).bind({})
WAYS = {
    "NUTS, FlowPrior": lambda: by_nuts(with_flow(exact), 0),
    "NUTS, ChainPrior": lambda: by_nuts(with_chain(exact), 1),
    "SMC": lambda: by_particles(exact, 2),
}
print(f"{UNITS} units; exact posterior: " + ", ".join(f"{name} {mean:.3f} (sd {sd:.3f})" for name, (mean, sd) in list(EXACT.items())[:2]))
draws = {}
for way, run in WAYS.items():
    found, seconds = run()
    draws[way] = columns(found)
    print(f"\n{way}: {seconds:.0f} s of a core; (mean − exact mean) / exact sd ± Monte Carlo error, sd / exact sd, R̂")
    for name, values in draws[way].items():
        mean, sd = EXACT[name]
        error, rhat = float(az.mcse(values, method="mean")), float(az.rhat(values))
        print(f"  {name:8}{(values.mean() - mean) / sd:+8.3f} ± {error / sd:.3f}{values.std() / sd:8.3f}{rhat:8.3f}", flush=True)

# %% [markdown]
# ## The figure

# %%
COLOURS = dict(zip(WAYS, ("C0", "C2", "C1")))
figure = Figure(figsize=(13, 4.4), dpi=100, layout="constrained")
plane, both, every = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
axis = np.linspace(-3, 3, 121)
points = np.stack(np.meshgrid(axis, axis), -1)
plane.contourf(axis, axis, np.exp(MIXTURE.log_prob(points)), levels=8, cmap="Greys", alpha=0.6)
shown_unit = 0
for way in ("NUTS, FlowPrior", "SMC"):
    x = np.stack([draws[way][f"x[{shown_unit}, {d}]"].ravel() for d in range(2)], -1)[:: max(1, draws[way][f"x[{shown_unit}, 0]"].size // 300)]
    plane.plot(*x.T, ".", ms=4, color=COLOURS[way], label=way)
# The exact posterior of one unit: a mean over places of the grid, drawn by their weights.
density = np.zeros(points.shape[:2])
_, weights, means, covariances = of_units[shown_unit]
for place in np.random.default_rng(0).choice(len(weight), 5 if quick else 200, p=weight):
    conditional = zip(weights[place], means[place], covariances[place])
    density += sum(w * stats.multivariate_normal(mean, covariance).pdf(points) for w, mean, covariance in conditional)
plane.contour(axis, axis, density, levels=5, colors="k", linewidths=0.8)
plane.set(xlabel="x₁", ylabel="x₂", title=f"unit {shown_unit}: prior (grey), posterior (lines)", aspect="equal")
plane.legend(frameon=False, fontsize=8, loc="lower left")
both.contour(offsets, scales, weight.reshape(len(offsets), -1).T / scales[:, None], levels=6, colors="k", linewidths=0.8)
for way in ("NUTS, FlowPrior", "SMC"):
    each = [draws[way][name].ravel() for name in ("offset", "scale")]
    both.plot(*(values[:: max(1, len(values) // 300)] for values in each), ".", ms=4, color=COLOURS[way], label=way)
both.plot(OFFSET, SCALE, "k*", ms=12, label="true values")
both.set(xlabel="offset", ylabel="scale of the noise", title="shared by the units: posterior (lines)", xlim=(-1, 2), ylim=(0, 1.3))
both.legend(frameon=False, fontsize=8, loc="upper right")
names = list(EXACT)
for k, (way, of_way) in enumerate(draws.items()):
    places = np.arange(len(names)) + 0.2 * (k - 1)
    mean, sd = (np.array([getattr(of_way[name], moment)() for name in names]) for moment in ("mean", "std"))
    exact_mean, exact_sd = np.array([EXACT[name] for name in names]).T
    every.errorbar((mean - exact_mean) / exact_sd, places, xerr=sd / exact_sd, fmt="o", ms=4, color=COLOURS[way], label=way, lw=1.2)
every.axvline(0, color="k", lw=0.8)
every.axvspan(-1, 1, color="0.9", zorder=0, label="exact mean ± sd")
every.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlim=(-2, 3.6), title="every latent: mean ± sd")
every.set_xlabel("difference from the exact mean, in units of the exact sd")
every.legend(frameon=False, fontsize=8, loc="upper right")
figure.savefig("prior_in_a_program.png")
print("\nfigure: prior_in_a_program.png")
