# %% [markdown]
# # Conditional density estimation: p(y | c)
#
# Gaussian linear regression gives the mean of y given covariates c, and one standard deviation for all c. A conditional diffusion gives the whole density
# of y given c. Its bound and the log density of the regression are compared in nats per row, on rows that neither was fitted to.
#
# The first example is a known density with two or three peaks; then come three real tables.
# Figures are saved to the current directory.

# %%
import argparse

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold
from statsmodels.datasets import engel, grunfeld
from tqdm import tqdm

import probdiff
from probdiff.networks import DensityHead, Ensemble

parser = argparse.ArgumentParser(description="Conditional density estimation: p(y | c)")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick
ROWS, NUM_STEPS, ITERATIONS = (200, 20, 50) if quick else (4000, 500, 6000)
FOLDS, MEMBERS, TABLE_ITERATIONS = (2, 1, 20) if quick else (10, 5, 800)
DRAWS = 2 if quick else 20

# %% [markdown]
# ## Two or three peaks
#
# y is uniform on (0, 1) and c = y + 0.3 sin 2πy + noise of standard deviation 0.05. A c in the middle comes from up to three values of y, and their
# mean is where the density is low. The exact density of y given c is the prior times the likelihood, normalised by quadrature.

# %%
GRID = np.linspace(0, 1, 2001)
WIDTH = 0.05


def curve(y):
    return y + 0.3 * np.sin(2 * np.pi * y)


def exact_log_prob(y, c):
    """log p(y | c), shape of ``y`` and ``c``, nats."""
    evidence = stats.norm.pdf(np.asarray(c)[..., None], curve(GRID), WIDTH).mean(-1)
    return stats.norm.logpdf(c, curve(y), WIDTH) - np.log(evidence)


rng = np.random.default_rng(0)
y = rng.uniform(size=2 * ROWS)
c = curve(y) + WIDTH * rng.normal(size=len(y))
# The interval is mapped to the real line: y = Φ(x).
x, context = (each.astype(np.float32)[:, None] for each in (stats.norm.ppf(y), (c - c.mean()) / c.std()))
train, held_out, test = slice(0, ROWS * 3 // 4), slice(ROWS * 3 // 4, ROWS), slice(ROWS, None)


def make(context_dim, seed, hidden=64, dropout=0.0):
    """An untrained model of a scalar y."""
    network = probdiff.MLP(1, key=jax.random.key(seed), hidden=hidden, num_blocks=2, dropout=dropout, context_dim=context_dim)
    return probdiff.Diffusion(probdiff.log_snr_schedule(NUM_STEPS, 11.0, -6.0), DensityHead(network), reverse_variance="optimal")


fit = probdiff.fit(
    make(1, 0),
    x[train],
    context=context[train],
    validation=x[held_out],
    validation_context=context[held_out],
    iterations=ITERATIONS,
    batch_size=256,
    learning_rate=4e-3,
    elbo="kl_importance",
    progress=False,
)
to_y = -stats.norm.logpdf(x[test, 0])  # the Jacobian: dx/dy = 1/φ(x)
bound = np.asarray(probdiff.elbo_terms(fit.diffusion, x[test], context=context[test], key=jax.random.key(1), num_draws=DRAWS, reduce=True).elbo.mean) + to_y
line = LinearRegression().fit(c[train, None], y[train])
residual = y - line.predict(c[:, None])
gaussian = stats.norm.logpdf(residual[test], 0, residual[train].std(ddof=2))
rows = {"exact": exact_log_prob(y[test], c[test]), "diffusion, lower bound": bound, "Gaussian linear regression": gaussian}


def against(rows, reference):
    """Mean of each method with its error, and its paired difference from the reference with its error; nats per test row."""
    table = {}
    for name, values in rows.items():
        difference = values - rows[reference]
        error, paired = (each.std(ddof=1) / np.sqrt(len(each)) for each in (values, difference))
        table[name] = {"nats": values.mean(), "± s.e.": error, f"− {reference}": difference.mean(), "± s.e. ": paired}
    return pd.DataFrame.from_dict(table, orient="index")


print(against(rows, "exact").round(4).to_string())

# %%
levels = np.array([0.15, 0.5, 0.7]) if quick else np.array([0.15, 0.35, 0.5, 0.65, 0.85])
count = 50 if quick else 4000
given = np.repeat((levels - c.mean()) / c.std(), count).astype(np.float32)[:, None]
drawn = stats.norm.cdf(probdiff.samplers.ancestral(fit.diffusion, context=given, key=jax.random.key(2))[:, 0]).reshape(len(levels), count)
figure, grid = plt.subplots((len(levels) + 3) // 3, 3, figsize=(10, 2.9 * ((len(levels) + 3) // 3)), layout="constrained")
axes = grid.ravel()
axes[0].plot(c[train][:1000], y[train][:1000], ".", markersize=3, alpha=0.5, color="0.4", label="data")
order = np.argsort(c[test])
axes[0].plot(c[test][order], line.predict(c[test][order, None]), color="C3", label="mean by regression")
axes[0].set(xlabel="c", ylabel="y", title="1000 of the training rows")
for level in levels:
    axes[0].axvline(level, color="C0", linewidth=0.8, linestyle=":")
axes[0].legend()
for ax in axes[1 + len(levels) :]:
    ax.set_axis_off()
for ax, level, samples in zip(axes[1:], levels, drawn):
    ax.hist(samples, np.linspace(0, 1, 61), density=True, alpha=0.5, label=f"{count} samples")
    ax.plot(GRID, np.exp(exact_log_prob(GRID, np.full(len(GRID), level))), color="k", linewidth=1, label="exact")
    mean, sd = line.predict([[level]])[0], residual[train].std(ddof=2)
    ax.plot(GRID, stats.norm.pdf(GRID, mean, sd), color="C3", linewidth=1, label="regression")
    ax.set(xlabel="y", title=f"p(y | c = {level})", yticks=[])
axes[1].legend()
figure.savefig("conditional_density.png", dpi=150)

# %% [markdown]
# ## Three tables
#
# The progression of diabetes given ten measurements (scikit-learn), the food expenditure of Belgian households given their income (Engel 1857) and the investment of
# eleven firms in twenty years given value, capital, firm and year (Grunfeld 1958; both in the public domain, from statsmodels).
#
# By ten-fold cross-validation each row is a test row once. The diffusion models the residual of the linear regression, in units of its standard deviation.
# A sixth of the training rows is held out for early stopping. As the rows are few, five networks are fitted and their predictions averaged.
# Differences are paired row by row.


# %%
def read_tables():
    """Name, covariates and target of each table."""
    patients = load_diabetes(as_frame=True, scaled=False).frame
    yield "diabetes", patients.drop(columns="target"), patients["target"]
    households = engel.load_pandas().data
    yield "food expenditure", households[["income"]], households["foodexp"]
    firms = grunfeld.load_pandas().data
    yield "investment", pd.get_dummies(firms.drop(columns="invest"), columns=["firm"], drop_first=True), firms["invest"]


def cross_validated(covariates, target):
    """For each row as a test row, in nats: log p by the regression, and the bound of the diffusion."""
    linear, diffusion = np.zeros(len(target)), np.zeros(len(target))
    for fold, (train, test) in enumerate(tqdm(list(KFold(10, shuffle=True, random_state=0).split(target))[:FOLDS], disable=None)):
        c = (covariates - covariates[train].mean(0)) / covariates[train].std(0)
        line = LinearRegression().fit(c[train], target[train])
        residual = target - line.predict(c)
        scale = np.sqrt(np.square(residual[train]).sum() / (len(train) - 1 - c.shape[1]))
        linear[test] = stats.norm.logpdf(residual[test], 0, scale)
        x, c = (residual / scale).astype(np.float32)[:, None], c.astype(np.float32)
        rows = np.random.default_rng(fold).permutation(train)
        held_out, own = rows[: len(rows) // 6], rows[len(rows) // 6 :]
        networks = []
        for seed in range(MEMBERS):
            fit = probdiff.fit(
                make(c.shape[1], seed, hidden=32, dropout=0.2),
                x[own],
                context=c[own],
                validation=x[held_out],
                validation_context=c[held_out],
                iterations=TABLE_ITERATIONS,
                batch_size=64,
                learning_rate=4e-3,
                validate_every=max(1, TABLE_ITERATIONS // 8),
                elbo="kl_importance",
                key=jax.random.key(seed),
                progress=False,
            )
            networks.append(fit.diffusion.network)
        together = fit.diffusion.with_network(Ensemble(networks))
        together = probdiff.elbo.optimal_variance(together, x[held_out], context=c[held_out], key=jax.random.key(1), num_draws=8)
        terms = probdiff.elbo_terms(together, x[test], context=c[test], key=jax.random.key(2), num_draws=DRAWS, reduce=True)
        diffusion[test] = np.asarray(terms.elbo.mean) - np.log(scale)
    seen = linear != 0
    return {"Gaussian linear regression": linear[seen], "diffusion, lower bound": diffusion[seen]}


for name, covariates, target in list(read_tables())[: 1 if quick else None]:
    found = cross_validated(covariates.to_numpy(float), target.to_numpy(float))
    print(f"\n{name}: {len(found['diffusion, lower bound'])} test rows, {covariates.shape[1]} covariates; nats per row")
    print(against(found, "Gaussian linear regression").round(3).to_string())
