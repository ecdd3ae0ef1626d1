# %% [markdown]
# # How good a classifier is the bound of a conditional model, for how many network evaluations?
#
# The data are scikit-learn's digits, in the split of `probdiff fit --data digits`: 1000 for training, 350 for validation, 447 for testing.
# The unconditional model is the default of `probdiff fit`. In the conditional model a learned embedding of the label is a further input of the network.
# By Bayes' rule the conditional model is a classifier: p(c | x) ∝ p(x | c) p(c), with the bound in the place of log p(x | c). The other classifiers are trained on the
# labels of the training and the validation split; the diffusion uses the latter to choose among four stages of its fit.
# The settings are the defaults without a label; none was chosen on the test data. Errors (±) are one standard error over the test data. The figure is saved to the current directory.

# %%
import argparse
import time

import jax
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

import probdiff
from probdiff.networks import CategoricalHead, ConvNet, Embedding, Ensemble
from probdiff.presets import default_diffusion, default_options

parser = argparse.ArgumentParser(description="How good a classifier is the bound?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

SEEDS = (0, 1) if quick else (0, 1, 2)
BUDGETS = (80, 160) if quick else (80, 160, 320, 640, 1280)
AT = BUDGETS[-1]
N = 20 if quick else 1000
COUNT = 20 if quick else 447  # of test data
SMALLER = {"channels": 4, "num_blocks": 1} if quick else {}

data = probdiff.datasets.load("digits")
labels = load_digits().target
train, validation, test = np.split(labels, [1000, 1350])
x, y = data.test[:COUNT], test[:COUNT]
options = default_options(data) | {"num_steps": N}
options |= {"iterations": 10, "validate_every": 10} if quick else {}
FIT = {name: options[name] for name in ("iterations", "batch_size", "learning_rate", "validate_every")}


# %% [markdown]
# ## The models


# %%
def untrained(seed, conditional):
    """The default model for the digits, with or without a label for its network."""
    plain, key = default_diffusion(data, N, seed), jax.random.key(seed)
    network = ConvNet(**plain.network.network.arguments | SMALLER | ({"context_dim": 10} if conditional else {}), key=key)
    labelled = Embedding(network, 10, key=jax.random.fold_in(key, 7)) if conditional else network
    return plain.with_network(CategoricalHead(labelled, data.levels))


def fit(seed, conditional):
    start = time.perf_counter()
    contexts = {"context": train, "validation_context": validation} if conditional else {}
    found = probdiff.fit(untrained(seed, conditional), data.train, validation=data.validation, key=jax.random.key(seed), progress=False, **contexts, **FIT)
    print(f"{'conditional' if conditional else 'unconditional'}, seed {seed}: {time.perf_counter() - start:.0f} s")
    return found.diffusion


conditional = [fit(seed, True) for seed in SEEDS]
unconditional = fit(SEEDS[0], False)
ensemble = conditional[0].with_network(Ensemble([each.network for each in conditional]))
print(conditional[0], unconditional, sep="\n")

# %% [markdown]
# ## The bound, with the label and without
#
# The difference is taken image by image. On average the label cannot increase the exact code length, and if the ten labels are equally frequent and certain given the image, it saves log 10 = 2.303 nats.

# %%
key = jax.random.key(10)
bounds = {
    "given the label": probdiff.elbo.data_set_elbo(conditional[0], x, context=y, key=key),
    "without": probdiff.elbo.data_set_elbo(unconditional, x, key=key),
}
dim = data.dim
for name, bound in bounds.items():
    bits = probdiff.elbo.bits_per_dim(bound.estimate.mean, dim)
    print(f"{name:16} {bits:.4f} ± {bound.estimate.error / dim / np.log(2):.4f} bits/dim (Monte Carlo error {bound.estimate.monte_carlo_error / dim / np.log(2):.4f})")
paired = probdiff.elbo.Estimate.of(bounds["given the label"].elbo - bounds["without"].elbo)
print(f"difference       {paired.mean:.3f} ± {paired.error:.3f} nats, {-paired.mean / dim / np.log(2):.4f} ± {paired.error / dim / np.log(2):.4f} bits/dim")

# %% [markdown]
# The bound under the true label minus the bound under the next label, on common random numbers:

# %%
after = (y + 1) % 10
difference = probdiff.diagnostics.compare_contexts(conditional[0], x, y, after, key=jax.random.key(11), num_draws=4)
print(difference)
print(f"larger for the true label: {np.mean(difference.difference > 0):.4f} of the images")

# %% [markdown]
# ## The classifier
#
# The budget is the largest number of network evaluations for an image; the figure shows the mean number used. The error rate of the first network is measured for each budget,
# and that of the other networks and of the ensemble for the largest. An evaluation of the ensemble counts as one of each of its networks.


# %%
def classified(model, networks, budgets):
    """Rows of (evaluations, error rate, its error), one for each budget."""
    rows = []
    for budget in budgets:
        start = time.perf_counter()
        found = probdiff.classify(model, x, range(10), key=jax.random.key(12), num_evaluations=budget)
        wrong = (found.label != y).mean()
        surprise = -np.log(np.maximum(found.posterior[np.arange(COUNT), y], 1e-12)).mean()
        rows.append((networks * found.num_evaluations.mean(), wrong, np.sqrt(wrong * (1 - wrong) / COUNT)))
        print(f"{budget:6}: {rows[-1][0]:6.0f} evaluations, {100 * wrong:5.2f} ± {100 * rows[-1][2]:.2f} % wrong, {found.is_decided.mean():.3f} decided, "
              f"{surprise:.3f} nats of log loss, {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    return np.array(rows)


print("seed 0")
rates = {f"conditional diffusion, seed {SEEDS[0]}": classified(conditional[0], 1, BUDGETS)}
for seed, model in zip(SEEDS[1:], conditional[1:]):
    print(f"seed {seed}")
    rates[f"seed {seed}"] = classified(model, 1, [AT])
print(f"ensemble of {len(SEEDS)}")
rates[f"ensemble of {len(SEEDS)} seeds"] = classified(ensemble, len(SEEDS), [AT])

# %% [markdown]
# ## The other classifiers

# %%
seen = np.concatenate([data.train, data.validation])
RIVALS = {
    "logistic regression": LogisticRegression(max_iter=10_000),
    "support vectors": SVC(),
    "nearest neighbour": KNeighborsClassifier(1),
}
wrong = {name: (rival.fit(seen, labels[:1350]).predict(x) != y).mean() for name, rival in RIVALS.items()}
for name, rate in wrong.items():
    print(f"{name:20} {100 * rate:5.2f} ± {100 * np.sqrt(rate * (1 - rate) / COUNT):.2f} % wrong")

# %%
figure = Figure(figsize=(7, 4.2), layout="constrained")
axes = figure.subplots()
for (label, rows), marker in zip(rates.items(), "osDv"):
    axes.errorbar(rows[:, 0], 100 * rows[:, 1], 100 * rows[:, 2], label=label, marker=marker, markersize=5, capsize=2)
for (name, rate), style in zip(wrong.items(), ("--", "-.", ":")):
    axes.axhline(100 * rate, color="0.4", linestyle=style, linewidth=1)
    axes.annotate(name, (1, 100 * rate), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=8, color="0.3")
axes.set(xscale="log", ylim=(0, 140 * max(wrong.values())), xlabel="network evaluations per image, mean", ylabel="misclassified test images, %")
axes.set_title(f"Digits, classified by the bound of p(image | label): {COUNT} test images, ± one standard error", fontsize=10)
axes.set_xticks([50, 100, 200, 400, 800, 1600], [50, 100, 200, 400, 800, 1600])
axes.minorticks_off()
axes.legend(loc="upper right", fontsize=8, ncols=2)
figure.savefig("classification.png", dpi=150)
