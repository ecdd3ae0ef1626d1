# %% [markdown]
# # How accurate is the evidence under a fitted network?
#
# The twist of `smc` needs the covariance of x₀ given zₙ, which Tweedie's formula takes from the derivative of the network. Of an exact network it is exact. Of a fitted network it is far off where there is little
# signal, and a twist that believes it would be too narrow, with an estimate of the evidence that is nats too small beside a small error. `smc` therefore measures on paths of the model where the
# derivative can be believed. Here a model of the moons is fitted, one coordinate is observed with noise, and the estimates are compared with the mean of p(y | x) over many samples of the same model.

# %%
import argparse

import jax
import matplotlib.pyplot as plt
import numpy as np

import probdiff
from probdiff.inference import LinearGaussian, evidence_bounds, smc
from probdiff.inference.uncertainty import measure_uncertainty

parser = argparse.ArgumentParser(description="The evidence under a fitted network")
parser.add_argument("--quick", action="store_true", help="a small fit and few particles, to see that it runs")
quick = parser.parse_args().quick
NUM_STEPS, ITERATIONS, SAMPLES, RUNS, SIZES, NUM_DATA = (8, 10, 100, 2, [2, 4], 2) if quick else (200, 6000, 200_000, 16, [16, 64, 256, 1024], 20)

dataset = probdiff.datasets.load("moons")
model = probdiff.presets.default_diffusion(dataset, NUM_STEPS)
options = {"batch_size": 256, "learning_rate": 4e-3, "validation": dataset.validation}
fitted = probdiff.fit(model, dataset.train, iterations=ITERATIONS, **options).diffusion

# %% [markdown]
# ## Where the derivative can be believed
#
# A covariance has no negative variance. At each step, 32 paths of the model show whether the derivative of the network gives one.

# %%
uncertainty = measure_uncertainty(fitted.evaluated())
log_snr, credible = np.asarray(fitted.schedule.log_snr), np.asarray(uncertainty.credible)
print(f"believed at {credible.sum()} of {NUM_STEPS} steps, at all with a log-SNR above {log_snr[~credible].max(initial=log_snr[-1]):.1f}")

# %% [markdown]
# ## The evidence

# %%
OBSERVED = [(0.5, 0.05), (0.5, 0.5), (-3.0, 0.05)]  # the first coordinate and the scale of its noise
samples = np.asarray(probdiff.samplers.ancestral(fitted, key=jax.random.key(1), num_samples=SAMPLES))
figure, axes = plt.subplots(1, len(OBSERVED), figsize=(10, 3.4), layout="constrained")
for ax, (y, scale) in zip(axes, OBSERVED):
    observation = LinearGaussian([[1.0, 0.0]], y=[y], scale=scale)
    density = np.exp(np.asarray(jax.vmap(observation.log_prob)(samples), np.float64))
    expected, error = np.log(density.mean()), density.std(ddof=1) / density.mean() / np.sqrt(SAMPLES)
    print(f"\ny = {y} with noise of {scale}: log p(y) = {expected:.3f} ± {error:.3f} nats by {SAMPLES} samples of the model")
    ax.axhspan(expected - error, expected + error, color="grey", alpha=0.4, label=f"{SAMPLES} samples")
    for twist, colour in (("tweedie", "C0"), ("none", "C1")):
        found = [smc(fitted, observation, key=jax.random.key(2), num_particles=size, num_runs=RUNS, twist=twist) for size in SIZES]
        for size, each in zip(SIZES, found):
            ess = each.ess.min()
            print(f"  {twist:8} {size:5} particles: {each.log_evidence:.3f} ± {each.log_evidence_error:.3f}, effective sample size at the worst step {ess:.1f}", flush=True)
        ax.errorbar(SIZES, [each.log_evidence for each in found], [each.log_evidence_error for each in found], fmt="o-", color=colour, capsize=3, label=f"twist {twist}")
    ax.set(xscale="log", xlabel="particles of each run", title=f"y = {y}, noise {scale}")
axes[0].set_ylabel(f"log p(y) in nats, {RUNS} runs")
axes[-1].legend(fontsize=8)
figure.savefig("fitted_evidence.png", dpi=150)

# %% [markdown]
# ## From both sides
#
# On observations that are simulated from the model the evidence is bounded from above as well.

# %%
kind = LinearGaussian([[1.0, 0.0]], y=[0.0], scale=0.05)
print(f"\n{evidence_bounds(fitted, kind, key=jax.random.key(3), num_data=NUM_DATA, num_particles=SIZES[-2])}")
