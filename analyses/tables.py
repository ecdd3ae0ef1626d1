# %% [markdown]
# # Two tables with columns of several kinds, from data frame to bound
#
# Both come with scikit-learn. The wines have twelve measurements, a count and a class; the patients with diabetes have measurements, an age,
# a sex and counts. A column with few distinct values has no density, and a bound that treats it as a density is meaningless.
# Therefore each column is a density, counts or categories, and a row has a bound on log p(measurements | the rest) + log P(the rest), in nats.
# Figures are saved to the current directory.

# %%
import argparse

import arviz as az
import jax
import numpy as np
import pandas as pd
from sklearn.datasets import load_diabetes, load_wine

import probdiff

parser = argparse.ArgumentParser(description="Two tables with columns of several kinds, from data frame to bound")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick
NUM_STEPS, ITERATIONS = (20, 60) if quick else (1000, None)

wine = load_wine(as_frame=True).frame.rename(columns={"target": "cultivar"})
wine["cultivar"] = wine["cultivar"].map({0: "barolo", 1: "grignolino", 2: "barbera"}).astype("category")
diabetes = load_diabetes(as_frame=True, scaled=False).frame

# %% [markdown]
# ## The kind of each column
#
# `datasets.split` shuffles the rows, splits them and chooses a kind for each column, which `describe()` prints. To choose otherwise,
# make a `ColumnLikelihood` yourself.

# %%
tables = {"wine": probdiff.datasets.split(wine, name="wine"), "diabetes": probdiff.datasets.split(diabetes, name="diabetes")}
for table in tables.values():
    print(table.describe(), "\n")
tables = {"wine": tables["wine"]} if quick else tables
print(tables["wine"].likelihood())

# %% [markdown]
# ## Fit, bound, and reference
#
# The reference models the columns as independent: a normal distribution for a column with a density, frequencies for the others.
# The bound can be above it because the columns say something about each other.


# %%
def fit(table):
    """A fitted model, with the defaults of ``probdiff fit`` except for the number of steps."""
    options = probdiff.presets.default_options(table)
    diffusion = probdiff.presets.default_diffusion(table, NUM_STEPS)
    names = ("batch_size", "learning_rate", "validate_every")
    return probdiff.fit(
        diffusion,
        table.train,
        validation=table.validation,
        iterations=ITERATIONS or options["iterations"],
        progress=False,
        **{name: options[name] for name in names},
    ).diffusion


fitted = {name: fit(table) for name, table in tables.items()}
rows = {}
for name, table in tables.items():
    bound = probdiff.elbo.data_set_elbo(fitted[name], table.test, key=jax.random.key(0)).estimate
    reference, reference_error = table.independent_columns()
    rows[name] = {
        "test rows": len(table.test),
        "ELBO": bound.mean,
        "± s.e.": bound.error,
        "± Monte Carlo": bound.monte_carlo_error,
        "independent columns": reference,
        "± s.e. ": reference_error,
    }
print(pd.DataFrame.from_dict(rows, orient="index").round(2).to_string())

# %% [markdown]
# ## The two ways of computing the bound, and its terms in ArviZ

# %%
both = probdiff.diagnostics.compute_both_ways(fitted["wine"], tables["wine"].test[:16], key=jax.random.key(1), num_draws=4)
print(f"{both.analytic.mean:.3f} by the KL terms, {both.trace.mean:.3f} by Trace_ELBO: {abs(both.z):.1f} standard errors")
print(f"term by term on the same paths, the two differ by {both.common.largest:.0e} nats at most")
print(az.summary(probdiff.to_datatree(both.terms)).to_string())

# %% [markdown]
# ## Samples, with the names and the labels of the table

# %%
for name, table in tables.items():
    drawn = probdiff.samplers.ancestral(fitted[name], key=jax.random.key(2), num_samples=500)
    samples, data = table.to_frame(drawn), table.to_frame(np.concatenate([table.train, table.validation, table.test]))
    probdiff.plots.plot_marginals(samples, data, name).savefig(f"{name}_marginals.png")
    probdiff.plots.plot_pairs(samples, data, name).savefig(f"{name}_pairs.png")
    print(samples.head(3).to_string(), "\n")
