"""Runs that the tests of several commands share."""

import contextlib
import functools
import io
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import set_constant

import probdiff
from probdiff import cli, datasets, presets, training
from probdiff.oracles.distributions import GaussianOracle
from probdiff.programs.sites import PARAMS

SMALL = ["--num-steps", "4", "--iterations", "20", "--batch-size", "16"]
FOLDER = tempfile.TemporaryDirectory(prefix="probdiff-cli-tests-")


def set_small_networks(monkeypatch):
    """Networks of one narrow block in the place of the defaults, which take much longer to compile."""
    for name, width in (("MLP", {"hidden": 16}), ("ConvNet", {"channels": 8})):
        network = getattr(presets, name)
        monkeypatch.setattr(presets, name, lambda *args, network=network, width=width, **options: network(*args, **options | width | {"num_blocks": 1}))


@pytest.fixture
def small_networks(monkeypatch):
    """What ``probdiff fit`` fits is small; see :func:`set_small_networks`."""
    set_small_networks(monkeypatch)


@functools.cache
def small_run():
    """A small finished run of the digits, and the JSON document that the fit printed."""
    path = Path(FOLDER.name) / "small"
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        set_constant(patch, "VALIDATION_ROWS", 64)
        set_small_networks(patch)
        assert cli.main(["fit", "--out", str(path), "--json", *SMALL]) == 0
    return path, json.loads(out.getvalue()), err.getvalue()


@functools.cache
def _unmistakable():
    """Two runs with parameters unlike the initial ones, and data in splits unlike one another.

    For each run the bound on test data, its standard error and that of one draw; and what it must not be: the bound
    on the other splits, and that of the initial model.
    """
    oracle, rng = GaussianOracle([0.0, 0.0], 0.25 * np.eye(2)), np.random.default_rng(0)
    splits = [(oracle.sample(rng, 30) + shift).astype(np.float32) for shift in (0, 3, 6)]
    dataset = datasets.Dataset("points", *splits, oracle=oracle)
    network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1)
    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(4, 4.0, -3.0), network, dataset.likelihood())
    bounds = {}
    for k in (1, 2):
        params = {PARAMS: jax.tree.map(lambda leaf, k=k: leaf + 0.05 * k, diffusion.trainable())}
        fit = training.Fit(diffusion.bind(params), np.ones(3), np.array([[3.0, -1.0]]), None)
        cases = [(fit.diffusion, x) for x in reversed(splits)] + [(diffusion.bind({}), dataset.test)]
        terms = [probdiff.elbo_terms(model, x, key=jax.random.key(9), num_draws=100) for model, x in cases]
        draws = np.array([np.asarray(each.elbo).mean(1) for each in terms])
        path = Path(FOLDER.name) / f"unmistakable{k}"
        run = probdiff.storage.create_run(path, diffusion, {"data": "points", "seed": 0})
        run.save(fit=fit, terms=terms[0], results={})
        bounds[str(run.path)] = draws[0].mean(), draws[0].std(ddof=1) / 10, draws[0].std(ddof=1), draws[1:].mean(1)
    return bounds, dataset


def unmistakable_runs(patched):
    """The runs of :func:`_unmistakable`, whose data are loaded as theirs."""
    bounds, dataset = _unmistakable()
    patched(datasets.load, lambda name, seed=0, index=None: dataset)
    return bounds, dataset


def assert_is_the_bound_on_test_data(found, bound, draws):
    """Found with so many draws: within 4.9 standard errors; what it must not be is twice as far."""
    expected, error, of_one, others = bound
    error = np.hypot(error, of_one / np.sqrt(draws))
    assert abs(found - expected) <= 4.9 * error
    assert np.all(np.abs(others - expected) > 9.7 * error)
