"""``probdiff inspect``."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_runs import assert_is_the_bound_on_test_data, small_run, unmistakable_runs

import probdiff
from probdiff import cli
from probdiff.diagnostics.datatree import inspect_terms
from probdiff.elbo.estimate import Estimate

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make


def files(path):
    """Every file of a run, and when it was last written."""
    return {file: file.stat().st_mtime_ns for file in path.rglob("*")}


def test_inspect_says_what_is_there_and_writes_nothing(capsys, monkeypatch):
    path, fitted = small_run()[:2]
    before = files(path)
    with monkeypatch.context() as patch:
        patch.setattr(probdiff.storage.Run, "diffusion", property(lambda run: pytest.fail("the model was opened")))
        assert cli.main(["inspect", str(path)]) == 0
        text = capsys.readouterr().out
        assert cli.main(["inspect", str(path), "--json"]) == 0
    assert files(path) == before
    document = json.loads(capsys.readouterr().out)
    assert document["figures"] == [str(path / "figures" / f"{name}.png") for name in ("loss", "samples", "step_kl")]
    assert all(figure in text for figure in document["figures"]) and "ledger" not in document
    terms, table = probdiff.open_run(path).terms, document["inspection"]["table"]
    assert list(table) == ["prior_kl", "step_kl[2]", "step_kl[3]", "step_kl[4]", "reconstruction", "elbo"]
    assert table["step_kl[3]"]["nats"] == pytest.approx(float(terms.step_kl[:, 1].mean()), rel=1e-5)
    # One bound of these items, wherever it is printed.
    both = fitted["two_ways"]["analytic"]
    assert table["elbo"]["nats"] == pytest.approx(both["nats"], rel=1e-5)
    assert table["elbo"]["error_over_items"] == pytest.approx(both["error"], rel=1e-5)
    printed = [line.split()[:2] for line in text.splitlines() if line.startswith("ELBO  ")]
    assert ["ELBO", f"{both['nats']:.4f}"] in printed


@pytest.mark.long
def test_inspect_draws_the_figures_anew_if_asked(capsys):
    path = small_run()[0]
    for file in (path / "figures").iterdir():
        file.unlink()
    assert cli.main(["inspect", str(path)]) == 0
    assert "figures: none" in capsys.readouterr().out
    assert cli.main(["inspect", str(path), "--figures"]) == 0
    assert {file.name for file in (path / "figures").iterdir()} == {"loss.png", "samples.png", "step_kl.png"}


def test_the_findings_of_an_inspection_are_those_of_the_terms():
    """Of 13 steps in ten ranges, whose KLs are known; of an item that is far below the others. Both errors, each by its name."""
    rng = np.random.default_rng(0)
    size = np.array([1, 2, 4, 30, 1, 20, 3, 15, 2, 1, 6, 5, 10.0])
    step_kl = size[:, None] * rng.uniform(0.9, 1.1, (4, 13, 7))
    reconstruction = rng.normal(-3, 1, (4, 7))
    reconstruction[:, 5] -= 40
    terms = probdiff.elbo.ELBOTerms(rng.uniform(1, 2, 7), step_kl, reconstruction)
    found = inspect_terms(probdiff.to_datatree(terms), dim=7)
    sums = step_kl[:, 2:4].sum(1), step_kl[:, 4:6].sum(1)
    lead = Estimate.of((sums[0] - sums[1]).mean(0))
    assert found["largest_steps"] == pytest.approx({"steps": "4-5", "next": "6-7", "lead": lead.mean, "lead_error": lead.error}, rel=1e-9)
    assert f"steps 4-5 cost most, {lead.mean:.2f} ± {lead.error:.2f} nats more than steps 6-7" in found["text"]
    row, estimate = found["table"].loc["step_kl[4-5]"], Estimate.of_draws(sums[0])
    assert row["nats"] == pytest.approx(estimate.mean) and row["share"] == pytest.approx(sums[0].mean() / step_kl.sum(1).mean())
    assert row["error_over_items"] == pytest.approx(estimate.error)
    assert row["error_of_noise"] == pytest.approx(sums[0].std(0, ddof=1).dot(sums[0].std(0, ddof=1)) ** 0.5 / 2 / 7)
    (line,) = (line for line in found["text"].splitlines() if line.startswith("KL of steps 4-5"))
    shown = [estimate.mean, 100 * row["share"], estimate.error, estimate.monte_carlo_error]
    np.testing.assert_allclose([float(word.strip("%")) for word in line.split()[4:]], shown, atol=0.05)
    assert "± over items" in found["text"] and "± of the noise" in found["text"]
    elbo = reconstruction - step_kl.sum(1) - terms.prior_kl
    second = np.argsort(elbo.mean(0))[1]
    own, lead = (each.std(ddof=1) / 2 for each in (elbo[:, 5], elbo[:, second] - elbo[:, 5]))
    ahead, worst = (elbo[:, second] - elbo[:, 5]).mean(), elbo[:, 5].mean()
    expected = {"item": 5, "elbo": worst, "error": own, "next": second, "lead": ahead, "lead_error": lead}
    assert found["worst_item"] == pytest.approx(expected, rel=1e-9)
    bits = -worst / (7 * np.log(2))
    assert f"lowest bound: item 5, ELBO {worst:.2f} ± {own:.2f} nats (of the noise) = {bits:.3f} bits/dim, {ahead:.2f} ± " in found["text"]
    assert "of the first 7 items" in found["text"] and "4 draws" in found["text"]


@pytest.mark.parametrize("num_draws, num_steps, num_data", [(4, 13, 7), (1, 13, 7), (4, 1, 7), (4, 2, 1)])
def test_what_is_within_its_error_is_not_ranked(num_draws, num_steps, num_data):
    """Steps and items that are alike but for the noise; and where there is no error, or nothing to compare."""
    rng = np.random.default_rng(1)
    parts = (rng.normal(3, 1, (num_draws, *shape)) for shape in ((num_steps - 1, num_data), (num_data,)))
    found = inspect_terms(probdiff.to_datatree(probdiff.elbo.ELBOTerms(np.ones(num_data), *parts)))
    assert found["largest_steps"] is None and found["worst_item"] is None
    assert "no range of steps costs more" in found["text"] and "no item has a lower bound" in found["text"]
    assert "nan" not in found["text"] and len(found["table"]) == 3 + min(10, num_steps - 1)


@pytest.mark.release
def test_the_ledger_of_inspect_is_of_test_data_and_is_kept(capsys, patched):
    bounds, dataset = unmistakable_runs(patched)
    path, bound = next(iter(bounds.items()))
    assert cli.main(["inspect", path, "--ledger", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    account = first["ledger"]
    elbo = account["reconstruction"]["mean"] - account["step_kl"]["mean"] - account["prior_kl"]["mean"]
    assert_is_the_bound_on_test_data(elbo, bound, 1)
    assert_is_the_bound_on_test_data(dataset.oracle.log_prob(dataset.test).mean() - account["gap"]["mean"], bound, 1)
    assert first["figures"] == [str(Path(path) / "figures" / "ledger.png")]
    before = files(Path(path))
    assert cli.main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first and files(Path(path)) == before


def test_a_ledger_needs_a_density(capsys):
    assert cli.main(["inspect", str(small_run()[0]), "--ledger"]) == 2
    assert "--ledger: Expected data whose density is known" in capsys.readouterr().err


def test_inspect_of_no_run(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_of_a_run_that_has_not_ended(tmp_path, capsys):
    run = probdiff.storage.create_run(tmp_path / "run", probdiff.Diffusion(probdiff.cosine_schedule(5), lambda z, n: z, dim=2))
    assert cli.main(["inspect", str(run.path)]) == 2
    assert "Expected a finished run; got one without results.json; go on with probdiff fit --resume" in capsys.readouterr().err
