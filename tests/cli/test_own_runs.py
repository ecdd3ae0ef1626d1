"""Runs that were made in Python, by ``create_run`` and ``save``: the commands take them like any other."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probdiff
from probdiff import cli, training
from probdiff.storage import create_run

X = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
DATA = probdiff.datasets.split(X, name="mine")


def make_run(path, network=None, shift=0.0, data=DATA):
    network = network or probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1)
    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(4, 4.0, -3.0), network, DATA.likelihood(), dim=2)
    params = {probdiff.programs.PARAMS: jax.tree.map(lambda leaf: leaf + shift, diffusion.trainable())}
    fit = training.Fit(diffusion.bind(params), np.ones(3), np.zeros((0, 2)), None)
    run = create_run(path, diffusion, data=data)
    run.save(fit=fit, terms=probdiff.elbo_terms(fit.diffusion, (data or DATA).test, key=jax.random.key(1), num_draws=3))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    return [make_run(path / name, shift=shift) for name, shift in (("a", 0.0), ("b", 0.1))]


def command(*arguments):
    """Exit code, and what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main([str(each) for each in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.long
def test_inspect(runs, monkeypatch):
    """The saved terms, and that there is no final table; the model is not opened, nothing is computed or written."""
    run, before = runs[0], sorted(runs[0].path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(probdiff.storage.Run, "diffusion", property(lambda run: pytest.fail("the model was opened")))
        code, text, _ = command("inspect", run.path)
        assert code == 0
        _, document, _ = command("inspect", run.path, "--json")
    table = json.loads(document)["inspection"]["table"]
    assert table["elbo"]["nats"] == pytest.approx(float(run.terms.elbo.mean()), rel=1e-5)
    assert "N = 4 steps in 2 dimensions, MLP, NormalLikelihood\nThere is no final table" in text and "bits/dim" not in text
    assert f"{table['elbo']['nats']:.4f}" in text and sorted(run.path.rglob("*")) == before


def test_inspect_of_data_on_a_grid_is_also_in_bits(tmp_path):
    grid = probdiff.datasets.split(np.arange(80).reshape(40, 2) % 5, name="grid")
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(4), lambda z, n: z, grid.likelihood(), dim=2)
    run, rng = create_run(tmp_path / "grid", diffusion, data=grid), np.random.default_rng(0)
    run.save(terms=probdiff.elbo.ELBOTerms(np.ones(4), np.ones((3, 3, 4)), np.array([-1, -2, -30, -1]) + 0.1 * rng.normal(size=(3, 4))))
    code, text, _ = command("inspect", run.path)
    bits = -run.terms.elbo.mean(0)[2] / (2 * np.log(2))
    assert code == 0 and f"= {bits:.3f} bits/dim" in text


def test_inspect_of_a_run_without_terms(tmp_path):
    run = create_run(tmp_path / "bare", probdiff.Diffusion(probdiff.cosine_schedule(4), probdiff.MLP(2, key=jax.random.key(0))))
    code, _, error = command("inspect", run.path)
    assert code == 2 and "run.save(terms=probdiff.elbo_terms(…))" in error


@pytest.mark.long
def test_figures_and_samples(runs):
    assert command("inspect", runs[0].path, "--figures")[0] == 0
    assert {file.name for file in runs[0].figures.iterdir()} >= {"loss.png", "samples.png", "step_kl.png"}
    code, text, _ = command("sample", runs[0].path, "--num-samples", 5)
    assert code == 0 and "5 samples of mine" in text
    assert np.load(runs[0].path / "samples" / "ancestral-1.npy").shape == (5, 2)


@pytest.mark.long
def test_compare(runs, tmp_path):
    code, document, _ = command("compare", *(run.path for run in runs), "--json")
    assert code == 0 and all(str(run.path) in json.loads(document)["models"] for run in runs)
    code, text, _ = command("compare", runs[0].path, "--estimators", "kl_uniform", "--num-draws", 2)
    assert code == 0 and "kl_uniform" in text
    other = make_run(tmp_path / "other", data=probdiff.datasets.split(X, seed=1, name="mine"))
    code, _, error = command("compare", runs[0].path, other.path)
    assert code == 2 and "Expected the test data of" in error and "(mine, seed 0); got other data" in error


@pytest.mark.long
def test_what_the_commands_cannot_know_is_said_with_the_remedy(runs, tmp_path):
    """The data, if they were not kept; a network that is not probdiff's own; the options of a fit."""
    run = make_run(tmp_path / "no data", data=None)
    for arguments in (["sample", run.path], ["compare", run.path]):
        code, _, error = command(*arguments)
        assert code == 2 and "probdiff.storage.create_run(…, data=dataset) keeps them" in error
    own = make_run(tmp_path / "own", network=lambda z, n: jnp.sin(z))
    for arguments in (["sample", own.path], ["compare", own.path], ["inspect", own.path, "--figures"]):
        code, _, error = command(*arguments)
        assert code == 2 and "custom network function" in error and "probdiff.open_run(path, like=…)" in error
    assert command("inspect", own.path)[0] == 0
    code, _, error = command("fit", "--out", runs[0].path, "--resume")
    assert code == 2 and "go on in Python, with probdiff.fit(…, checkpoint=run.checkpoint)" in error
