"""What analyses/arviz_examples.py relies on: the exported terms, and ArviZ's figures for them, mean what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from conftest import Z_MAX, assert_mean

import probdiff

# isort: split
import arviz as az

X = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
NUM_DRAWS = 1000


def export(num_steps, network=lambda z, n: 0.5 * z, num_draws=NUM_DRAWS):
    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(num_steps), network)
    return probdiff.to_datatree(probdiff.elbo_terms(diffusion, X, key=jax.random.key(0), num_draws=num_draws))


@pytest.mark.long
@pytest.mark.parametrize("n", [2, 6])
def test_a_step_is_found_by_its_number(n):
    tree = export(6, lambda z, step: jnp.where(step == n, 100.0, 0.0)[..., None] + 0 * z, num_draws=2)
    per_step = tree["per_step"]["step_kl"].mean(["chain", "draw", "datum"])
    assert per_step.idxmax("step") == n and per_step.sel(step=n) > 100 * per_step.drop_sel(step=n).max()


@pytest.mark.long
@pytest.mark.parametrize("num_steps", [1, 6])
def test_a_file_keeps_values_coordinates_and_units(num_steps, tmp_path):
    tree = export(num_steps, num_draws=4)
    tree.to_netcdf(tmp_path / "terms.nc", engine="h5netcdf")
    with az.from_netcdf(tmp_path / "terms.nc") as reloaded:
        assert reloaded.identical(tree)
        kls = ["step_kl"] * (num_steps > 1)  # N = 1 has none, and no ranges of steps
        per_datum = [*kls, "reconstruction", "elbo"]
        names = {"posterior": ["prior_kl", *per_datum], "per_datum": per_datum, "per_step": ["step_kl"], "constant_data": ["prior_kl"]}
        assert set(reloaded.children) == set(names)
        for group in names:
            assert list(reloaded[group].data_vars) == names[group]
            for variable in reloaded[group].data_vars.values():
                assert variable.dtype == np.float32 and variable.attrs["units"] == "nats"


@pytest.mark.long
def test_draws_are_independent_over_draws_steps_and_data():
    """Effective sample size finds noise that successive draws share; the variances add up only if no terms share any."""
    tree = export(20)
    step_kl, per_datum = tree["per_step"]["step_kl"], tree["per_datum"].to_dataset()
    ess = az.ess(step_kl.mean("datum").to_dataset())
    assert 0.9 < ess["step_kl"].mean() / NUM_DRAWS < 1.1
    variances = [each.var(["chain", "draw"], ddof=1) for each in (step_kl, per_datum["reconstruction"])]
    parts = (variances[0].sum("step") + variances[1]).sum("datum") / len(X) ** 2
    ratio = per_datum["elbo"].mean("datum").var(ddof=1) / parts
    assert abs(ratio - 1) < Z_MAX * np.sqrt(2 / NUM_DRAWS)


def test_summary_of_independent_draws_in_chains():
    step_kl = export(20)["per_step"]["step_kl"]
    assert dict(step_kl.sizes) == {"chain": 4, "draw": NUM_DRAWS // 4, "step": 19, "datum": 3}
    draws = step_kl.values.reshape(NUM_DRAWS, 19, 3).astype(np.float64).mean(-1)
    chains = step_kl.mean("datum").to_dataset()
    summary = az.summary(chains, round_to="none").loc[[f"step_kl[{n}]" for n in range(2, 21)]]
    np.testing.assert_allclose(summary["mean"], draws.mean(0), rtol=1e-5)
    np.testing.assert_allclose(summary["sd"], draws.std(0, ddof=1), rtol=1e-4)
    mcse = draws.std(0, ddof=1) / np.sqrt(NUM_DRAWS)
    assert 0.93 < np.mean(summary["mcse_mean"] / mcse) < 1.07
    assert np.all(np.abs(summary["r_hat"] - 1) < 0.02)


@pytest.mark.long
@pytest.mark.parametrize("k", [0.2, 0.5])
def test_k_hat_of_paths_whose_tail_is_known(k):
    """One step at x = 0 in the plane, ε̂ ∝ z: log p − log q = k E + constant with E ~ Exp(1), whose tail is exactly k.

    With reverse mean g z, log w = (1/β − 1 − g²/β) ‖z‖²/2 + constant and ‖z‖²/β = 2E, so that k = 1 − β − g².
    """
    beta = 0.3
    scale = (1 - np.sqrt((1 - beta - k) * (1 - beta))) / np.sqrt(beta)
    diffusion = probdiff.Diffusion(probdiff.NoiseSchedule.from_betas([beta]), lambda z, n: scale * z)
    x = np.zeros((12_800, 2), np.float32)
    path = probdiff.diagnostics.compute_both_ways(diffusion, x, key=jax.random.key(0), num_draws=40).path
    log_weights = xr.DataArray(path.astype(np.float64).reshape(2000, 256), dims=["draw", "datum"])
    _, k_hat = (-log_weights).azstats.psislw(dim="draw")
    tail = np.floor(3 * np.sqrt(2000))
    assert_mean(k_hat, (tail * k + 10 * 0.5) / (tail + 10), power=0.1)  # a prior worth ten draws at 0.5


def test_traps_of_k_hat():
    """Should ArviZ change here, the page must."""
    log_weights = xr.DataArray(0.5 * np.random.default_rng(0).exponential(size=(1, 100_000)), dims=["chain", "draw"])
    error = 1.5 / np.sqrt(3 * np.sqrt(log_weights.size))
    assert abs(log_weights.azstats.pareto_khat(log_weights=True, r_eff=1) - 0) < Z_MAX * error / 1.5
    assert abs(np.exp(log_weights).azstats.pareto_khat(tail="right", r_eff=1) - 0.5) < Z_MAX * error
    with pytest.raises(ValueError, match="All tail values are the same"):
        (0 * log_weights).azstats.psislw(dim="draw")
