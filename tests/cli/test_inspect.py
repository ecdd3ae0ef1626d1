"""``probdiff inspect``."""

import json

import numpy as np
import pytest
from cli_runs import assert_is_the_bound_on_test_data, small_run, unmistakable_runs

import probdiff
from probdiff import cli
from probdiff.diagnostics.datatree import inspect_terms

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make


def test_inspect(capsys):
    path, _, _ = small_run()
    for file in (path / "figures").iterdir():
        file.unlink()
    assert cli.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    terms = probdiff.open_run(path).terms
    largest = int(np.argmax(terms.step_kl.mean((0, 2)))) + 2
    worst = int(np.argmin(terms.elbo.mean(0)))
    assert f"step {largest} dominates" in text and f"test item {worst}," in text
    assert text.index(f"step_kl[{largest}]") < text.index("mean") + 200  # the first row of the table
    assert (path / "figures" / "step_kl.png").exists()
    assert cli.main(["inspect", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["inspection"]["dominant_step"] == largest and document["inspection"]["worst_item"] == worst
    row = document["inspection"]["summary"][f"step_kl[{largest}]"]
    assert float(row["mean"]) == pytest.approx(float(terms.step_kl[:, largest - 2].mean()), abs=1e-3)


def test_the_figures_of_an_inspection_are_those_of_the_terms():
    """Of 13 steps whose KLs are known, 3 make up half; the worst item's error is that of its mean over draws."""
    rng = np.random.default_rng(0)
    size = np.array([1, 2, 30, 4, 1, 20, 3, 15, 2, 1, 6, 5, 10.0])
    step_kl = size[:, None] * rng.uniform(0.9, 1.1, (4, 13, 7))
    reconstruction = rng.normal(-3, 1, (4, 7))
    reconstruction[:, 5] -= 40
    terms = probdiff.elbo.ELBOTerms(rng.uniform(1, 2, 7), step_kl, reconstruction)
    found = inspect_terms(probdiff.to_datatree(terms), dim=7)
    elbo = reconstruction - step_kl.sum(1) - terms.prior_kl
    worst = elbo[:, 5].mean()
    assert found["worst_item"] == 5 and found["worst_elbo"] == pytest.approx(worst, rel=1e-9)
    error = elbo[:, 5].std(ddof=1) / 2
    assert found["worst_error"] == pytest.approx(error, rel=1e-9)
    share = step_kl[:, 2].mean() / step_kl.mean((0, 2)).sum()
    assert found["dominant_step"] == 4 and found["dominant_share"] == pytest.approx(share, rel=1e-9)
    assert found["half_of_kl"] == 3 and f"{share:.2%} of Σ step KL; the 3 largest of 13" in found["text"]
    bits = -worst / (7 * np.log(2))
    assert f"test item 5, ELBO {worst:.2f} ± {error:.2f} nats = {bits:.3f} bits/dim" in found["text"]
    assert f"(median of the items: {np.median(elbo.mean(0)):.2f})" in found["text"]
    summary = found["summary"]
    largest = np.argsort(-size, kind="stable")[:4]
    assert list(summary.index[:4]) == [f"step_kl[{k + 2}]" for k in largest] and len(summary) == 10
    for k in largest:
        row, values = summary.loc[f"step_kl[{k + 2}]"], step_kl[:, k].ravel()
        assert float(row["mean"]) == pytest.approx(values.mean(), abs=1e-3)
        assert float(row["sd"]) == pytest.approx(values.std(ddof=1), rel=1e-2)
        assert float(row["mcse"]) == pytest.approx(values.std(ddof=1) / np.sqrt(28), abs=1e-4)


def test_the_ledger_of_inspect_is_of_test_data(capsys, patched):
    bounds, dataset = unmistakable_runs(patched)
    path, bound = next(iter(bounds.items()))
    assert cli.main(["inspect", path, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)["ledger"]
    elbo = account["reconstruction"]["mean"] - account["step_kl"]["mean"] - account["prior_kl"]["mean"]
    assert_is_the_bound_on_test_data(elbo, bound, 1)
    assert_is_the_bound_on_test_data(dataset.oracle.log_prob(dataset.test).mean() - account["gap"]["mean"], bound, 1)


def test_inspect_of_no_run(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
