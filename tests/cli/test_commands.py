"""The command line, as a user meets it."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import assert_mean, patcher, set_constant
from numpyro.infer import SVI

import probdiff
from probdiff import cli, datasets, presets, training
from probdiff._files import load_arrays
from probdiff.diagnostics import report
from probdiff.diagnostics.datatree import inspect_terms
from probdiff.oracles import GaussianOracle, exact_terms
from probdiff.programs.sites import PARAMS
from probdiff.samplers import _draw_batch

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make

SMALL = ["--num-steps", "4", "--iterations", "20", "--batch-size", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run of the digits, and the JSON document that the fit printed."""
    path = tmp_path_factory.mktemp("cli") / "run"
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        set_constant(patch, "VALIDATION_ROWS", 64)
        assert cli.main(["fit", "--out", str(path), "--json", *SMALL]) == 0
    return path, json.loads(out.getvalue()), err.getvalue()


def test_fit(run):
    path, results, stderr = run
    assert "bits/dim" in stderr and "20/20" in stderr
    test, both = results["test"], results["two_ways"]
    elbo = test["reconstruction"]["nats"] - test["step_kl"]["nats"] - test["prior_kl"]["nats"]
    assert test["elbo"]["nats"] == pytest.approx(elbo, rel=1e-6) and test["num_items"] == 447
    assert test["elbo"]["bits_per_dim"] == pytest.approx(-elbo / 64 / np.log(2), rel=1e-6)
    parts = sum(test[name]["bits_per_dim"] for name in ("prior_kl", "step_kl", "reconstruction"))
    assert parts == pytest.approx(test["elbo"]["bits_per_dim"], rel=1e-6)
    assert both["agree"] is True and abs(both["z"]) < 4.9
    assert results["reference"]["independent_dimensions"]["bits_per_dim"] == pytest.approx(2.398, abs=0.002)
    names = {"config.json", "checkpoint.npz", "parameters.npz", "losses.csv", "elbo.nc", "results.json", "figures"}
    assert names <= {file.name for file in path.iterdir()}
    assert {file.name for file in (path / "figures").iterdir()} == {"loss.png", "step_kl.png", "samples.png"}
    opened = probdiff.open_run(path)
    terms = probdiff.elbo_terms(opened.diffusion, opened.data.test, key=jax.random.key(0), num_draws=4)
    assert_mean(np.asarray(terms.elbo.mean(0) - opened.terms.elbo.mean(0)), 0.0, power=200.0)
    np.testing.assert_allclose(opened.terms.elbo.mean(), elbo, rtol=1e-5)


def test_errors_of_the_fit_in_nats_and_in_bits_are_those_over_the_test_items(run):
    path, results, _ = run
    terms = probdiff.open_run(path).terms
    per_item = {
        "prior_kl": terms.prior_kl,
        "step_kl": terms.step_kl.sum(1).mean(0),
        "reconstruction": terms.reconstruction.mean(0),
        "elbo": terms.elbo.mean(0),
    }
    rows = [(results["test"][name], values) for name, values in per_item.items()]
    rows.append((results["two_ways"]["analytic"], per_item["elbo"]))
    for row, values in rows:
        values = np.asarray(values, np.float64)
        assert len(values) == 447 and row["nats"] == pytest.approx(values.mean(), rel=1e-4)
        assert row["error"] == pytest.approx(values.std(ddof=1) / np.sqrt(447), rel=1e-4)
    others = results["two_ways"]["trace_elbo"], results["reference"]["independent_dimensions"]
    for row in (*(row for row, _ in rows), *others):
        assert row["bits_error"] == pytest.approx(row["error"] / (64 * np.log(2)), rel=1e-9) and row["error"] > 0


@pytest.fixture(scope="module")
def evaluated():
    """What is said of data with a known density: the draws, the results and the data."""
    oracle = GaussianOracle(np.zeros(3), np.eye(3))
    x = oracle.sample(np.random.default_rng(0), 30).astype(np.float32)
    schedule = probdiff.log_snr_schedule(4, 1.0, -4.0)
    diffusion = probdiff.Diffusion(schedule, oracle.network(schedule, 0.9), dim=3)
    dataset = datasets.Dataset("gaussian", x, x, x, oracle=oracle)
    both, results = report.evaluate(diffusion, dataset, key=jax.random.key(0))
    return both, results, dataset


def test_the_gap_is_paired_item_by_item(evaluated):
    """What makes an item improbable makes its bound low: that must not count as an error of the gap."""
    both, results, dataset = evaluated
    log_p, elbo = dataset.log_prob(dataset.test), np.asarray(both.terms.elbo, np.float64).mean(0)
    gap = results["reference"]["gap"]
    assert gap["nats"] == pytest.approx((log_p - elbo).mean(), rel=1e-4)
    assert gap["error"] == pytest.approx((log_p - elbo).std(ddof=1) / np.sqrt(30), rel=1e-4)
    assert gap["error"] < 0.7 * np.hypot(log_p.std(), elbo.std()) / np.sqrt(30)


def test_the_difference_of_the_two_ways_comes_with_its_monte_carlo_error(evaluated):
    both, results, _ = evaluated
    found = results["two_ways"]
    draws = [np.asarray(each, np.float64) for each in (both.terms.elbo, both.path)]
    difference = draws[0].mean() - draws[1].mean()
    error = np.sqrt(sum((each.var(0, ddof=1) / len(each)).sum() for each in draws)) / 30
    assert found["num_items"] == 30 and found["num_draws"] == len(draws[0]) == len(draws[1])
    assert found["difference"] == pytest.approx(difference, abs=1e-5)
    assert found["difference_error"] == pytest.approx(error, rel=1e-4)
    assert found["z"] == pytest.approx(difference / error, abs=1e-3) and abs(found["z"]) <= 4.9
    for name, each in zip(("analytic", "trace_elbo"), draws):
        assert found[name]["nats"] == pytest.approx(each.mean(), rel=1e-5)
        assert found[name]["error"] == pytest.approx(each.mean(0).std(ddof=1) / np.sqrt(30), rel=1e-4)


@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize("agree", [True, False])
def test_the_table_says_what_the_results_say(bits, agree):
    """Every number in the row of its name; of the entropy its negative, to be held against the bound."""

    def row(k):
        more = {"bits_per_dim": k + 0.5, "bits_error": k + 0.75} if bits else {}
        return {"nats": -k - 0.125, "error": k + 0.25} | more

    names = ("prior_kl", "step_kl", "reconstruction", "elbo")
    test = {name: row(k) for k, name in enumerate(names, 10)}
    entropy, gap = {"nats": 17.5, "error": 0.5}, {"nats": 3.5, "error": 0.25}
    two_ways = {"analytic": row(15), "trace_elbo": row(16), "difference": 1.5, "difference_error": 0.375}
    results = {
        "data": "mine",
        "dim": 6,
        "num_steps": 9,
        "test": {"num_items": 33, "num_draws": 1} | test,
        "two_ways": {"num_items": 22, "num_draws": 4, "z": -4.0, "agree": agree} | two_ways,
        "reference": {"independent_dimensions": row(14)} if bits else {"entropy": entropy, "gap": gap},
    }
    title, header, *lines = report.format_table(results).splitlines()
    assert "mine" in title and "33 items of 6 dimensions, 1 draw each" in title and "N = 9 steps" in title
    assert ("bits/dim" in header) is bits and "the first 22 items, 4 draws each" in "\n".join(lines)
    labels = ("prior KL", "Σ step KL", "reconstruction", "ELBO")
    rows = [(label, list(test[name].values())) for label, name in zip(labels, names)]
    rows += [("log-likelihood of independent", list(row(14).values()))] if bits else []
    rows += [] if bits else [("minus entropy", [-17.5, 0.5]), ("gap", [3.5, 0.25])]
    rows += [("ELBO, analytic", list(row(15).values())), ("ELBO, Trace_ELBO", list(row(16).values()))]
    numbered = [line for line in lines if line[38:].lstrip(" -")[:1].isdigit()]
    for (label, numbers), line in zip(rows, numbered[:-1], strict=True):
        assert line.startswith(label) and [float(word) for word in line[38:].split()] == numbers
    verdict = "they agree" if agree else "THEY DISAGREE"
    assert numbered[-1].startswith("difference")
    assert numbered[-1][38:].split(maxsplit=2) == ["1.5000", "0.3750", f"4.0 standard errors: {verdict}"]


def test_what_is_compiled_is_kept_for_the_next_run(monkeypatch, tmp_path):
    """In the user's cache folder, unless the user says otherwise; JAX has read its environment before."""
    option = "jax_compilation_cache_dir"
    before = getattr(jax.config, option)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        cli._keep_what_is_compiled()
        assert getattr(jax.config, option) == before == os.environ[option.upper()]
        monkeypatch.delenv(option.upper())
        cli._keep_what_is_compiled()
        assert getattr(jax.config, option) == str(tmp_path / "probdiff")
    finally:
        jax.config.update(option, before)


def test_inspect(run, capsys):
    path, _, _ = run
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
    terms = probdiff.ELBOTerms(rng.uniform(1, 2, 7), step_kl, reconstruction)
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


def test_sample(run, capsys):
    path, _, _ = run
    assert cli.main(["sample", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    samples = np.load(document["samples"])
    assert samples.shape == (64, 64) and np.issubdtype(samples.dtype, np.integer) and 0 <= samples.min() < samples.max() <= 16
    assert document["samples"] == str(path / "samples" / "ancestral-1.npy") and document["sampler"] == "ancestral"
    assert (path / "samples" / "ancestral-1.png").stat().st_size > 10_000 and document["seconds"] > 0
    again = ["sample", str(path), "--num-samples", "5", "--sampler", "ddim", "--steps", "3"]
    for seed in ("0", "0", "1"):
        assert cli.main([*again, "--seed", seed]) == 0
    text = capsys.readouterr().out
    assert "5 samples of digits by ddim, 3 steps" in text and "ddim-3.npy" in text
    first, second, other = (np.load(path / "samples" / f"ddim-{k}.npy") for k in (1, 2, 3))
    assert first.shape == (5, 64) and np.array_equal(first, second) and not np.array_equal(first, other)


SAMPLE_ERRORS = {
    "sampler": (["--sampler", "ddpm"], "--sampler: Expected one of ancestral, ddim, langevin, ode; got ddpm"),
    "no samples": (["--num-samples", "0"], "--num-samples: Expected an integer of at least 1; got 0"),
    "seed": (["--seed", "-1"], "--seed: Expected an integer of at least 0; got -1"),
    "no steps": (["--sampler", "ddim", "--steps", "0"], "--steps: Expected an integer of at least 1; got 0"),
    "ancestral": (["--steps", "5"], "--steps: Expected none for ancestral, which takes all steps; got 5"),
    "too many": (["--sampler", "ddim", "--steps", "9"], "steps: Expected a number of steps, 1 to 4, or increasing"),
    "suffix": (["--out", "samples.npz"], "out: Expected a file ending in .npy; got samples.npz"),
}


@pytest.mark.parametrize("case", SAMPLE_ERRORS)
def test_sample_refuses(run, case, capsys, patched):
    options, message = SAMPLE_ERRORS[case]
    patched(_draw_batch, lambda *arguments: pytest.fail("something was compiled"))
    assert cli.main(["sample", str(run[0]), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("taken", ["mine.npy", "mine.png"])
def test_sample_overwrites_nothing(run, tmp_path, capsys, taken):
    (tmp_path / taken).write_text("mine")
    assert cli.main(["sample", str(run[0]), "--out", str(tmp_path / "mine.npy")]) == 2
    assert f"out: Expected a new file; got {tmp_path / taken}, which exists" in capsys.readouterr().err
    assert (tmp_path / taken).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_continuous_data_of_ones_own(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("mine.npy", np.random.default_rng(0).normal([5, -2, 0], [3, 0.1, 1], (400, 3)))
    assert cli.main(["fit", "--data", "mine.npy", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "bits/dim" not in text and "they agree" in text and "runs/mine-1" in text
    monkeypatch.chdir("/")
    assert probdiff.open_run(tmp_path / "runs" / "mine-1").data.train.shape == (320, 3)


def test_known_entropy_and_one_step(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(datasets.SIZES, "test", 2000)
    arguments = ["fit", "--data", "8gaussians", "--out", str(tmp_path / "r"), "--json", *SMALL, "--num-steps", "1"]
    assert cli.main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["reference"]["entropy"]["nats"] == pytest.approx(2.832, abs=1e-3)
    assert results["reference"]["gap"]["nats"] > 0 and results["test"]["step_kl"]["nats"] == 0


@pytest.fixture(scope="module")
def with_schedule(tmp_path_factory):
    """What ``probdiff fit`` gives to the fit, of data of one's own and with options of one's own; and the run."""
    folder, seen = tmp_path_factory.mktemp("told"), {}
    np.save(folder / "mine.npy", np.random.default_rng(0).normal(size=(50, 2)))

    def fit(diffusion, data, **given):
        seen.update(given, diffusion=diffusion, data=data)
        raise KeyboardInterrupt

    options = ["--num-steps", "6", "--iterations", "7", "--batch-size", "5", "--learning-rate", "0.0123", "--seed", "3"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patcher(patch)(probdiff.fit, fit)
        assert cli.main(["fit", "--data", str(folder / "mine.npy"), "--out", str(folder / "run"), *options]) == 130
    return seen, probdiff.open_run(folder / "run"), np.load(folder / "mine.npy").astype(np.float32)


def test_the_fit_has_the_training_data_and_validates_on_those_for_validation(told):
    seen, run, rows = told
    parts = [{tuple(row) for row in part} for part in (seen["data"], seen["validation"], run.data.test)]
    assert [len(part) for part in parts] == [40, 5, 5] and set.union(*parts) == set(map(tuple, rows))
    np.testing.assert_array_equal(seen["data"], run.data.train)
    np.testing.assert_array_equal(seen["validation"], run.data.validation)


def test_a_run_has_the_splits_of_its_seed(told):
    _, run, _ = told
    same, other = (datasets.load(run.config["data"], seed) for seed in (3, 0))
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(run.data, name), getattr(same, name))
        assert not np.array_equal(getattr(same, name), getattr(other, name))


def test_the_fit_has_the_options(told):
    seen, _, _ = told
    options = {"iterations": 7, "batch_size": 5, "learning_rate": 0.0123}
    assert {name: seen[name] for name in options} == options and seen["diffusion"].schedule.num_steps == 6


@pytest.fixture(scope="module")
def unmistakable(tmp_path_factory):
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
        path = tmp_path_factory.mktemp("unmistakable") / "run"
        run = probdiff.create_run(path, diffusion, {"data": "points", "seed": 0})
        run.save(fit=fit, terms=terms[0], results={})
        bounds[str(run.path)] = draws[0].mean(), draws[0].std(ddof=1) / 10, draws[0].std(ddof=1), draws[1:].mean(1)
    return bounds, dataset


@pytest.fixture
def unmistakable_runs(unmistakable, patched):
    bounds, dataset = unmistakable
    patched(datasets.load, lambda name, seed=0: dataset)
    return bounds, dataset


def assert_is_the_bound_on_test_data(found, bound, draws):
    """Found with so many draws: within 4.9 standard errors; what it must not be is twice as far."""
    expected, error, of_one, others = bound
    error = np.hypot(error, of_one / np.sqrt(draws))
    assert abs(found - expected) <= 4.9 * error
    assert np.all(np.abs(others - expected) > 9.7 * error)


def test_models_are_compared_by_their_bound_on_test_data(unmistakable_runs, capsys):
    bounds, _ = unmistakable_runs
    assert cli.main(["compare", *bounds, "--num-draws", "4", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    for path, bound in bounds.items():
        assert_is_the_bound_on_test_data(models[path]["elbo"], bound, 4)


def test_estimators_are_compared_on_test_data_for_the_trained_model(unmistakable_runs, patched):
    bounds, dataset = unmistakable_runs
    path, seen = next(iter(bounds)), []

    def compare(diffusion, x, **options):
        seen.extend([diffusion, x])
        raise KeyboardInterrupt

    patched(probdiff.compare_estimators, compare)
    assert cli.main(["compare", path]) == 130
    diffusion, x = seen
    np.testing.assert_array_equal(x, dataset.test)
    leaves = zip(jax.tree.leaves(diffusion.trainable()), jax.tree.leaves(probdiff.open_run(path).diffusion.trainable()))
    assert all(np.array_equal(*pair) for pair in leaves)


def test_the_ledger_of_inspect_is_of_test_data(unmistakable_runs, capsys):
    bounds, dataset = unmistakable_runs
    path, bound = next(iter(bounds.items()))
    assert cli.main(["inspect", path, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)["ledger"]
    elbo = account["reconstruction"]["mean"] - account["step_kl"]["mean"] - account["prior_kl"]["mean"]
    assert_is_the_bound_on_test_data(elbo, bound, 1)
    assert_is_the_bound_on_test_data(dataset.oracle.log_prob(dataset.test).mean() - account["gap"]["mean"], bound, 1)


def test_samples_are_of_the_trained_model(unmistakable_runs, capsys):
    """Their moments, against draws in Python."""
    bounds, _ = unmistakable_runs
    path = list(bounds)[1]
    assert cli.main(["sample", path, "--num-samples", "400", "--json"]) == 0
    run = probdiff.open_run(path)
    samples = [np.load(json.loads(capsys.readouterr().out)["samples"])]
    for diffusion in (run.diffusion, run.untrained.bind({})):
        samples.append(probdiff.SAMPLERS["ancestral"](diffusion, key=jax.random.key(7), num_samples=400))
    found, trained, initial = (np.concatenate([each, np.square(each)], 1) for each in samples)
    error = np.hypot(found.std(0), trained.std(0)) / 20
    assert np.all(np.abs(found.mean(0) - trained.mean(0)) <= 4.9 * error)
    assert np.any(np.abs(initial.mean(0) - trained.mean(0)) > 9.7 * error)


def test_the_report_is_of_test_data():
    """Of more of them than are evaluated both ways, which are the first; by closed form."""
    oracle, rng = GaussianOracle([0.0, 0.0], 0.25 * np.eye(2)), np.random.default_rng(0)
    cases = ((700, 0), (650, 1), (600, 2))
    train, validation, test = ((oracle.sample(rng, size) + shift).astype(np.float32) for size, shift in cases)
    test[512:] += 2
    schedule = probdiff.log_snr_schedule(4, 4.0, -3.0)
    diffusion = probdiff.Diffusion(schedule, oracle.network(schedule))
    dataset = datasets.Dataset("points", train, validation, test, oracle=oracle)
    _, results = report.evaluate(diffusion, dataset, key=jax.random.key(0))
    whole, first, other = (exact_terms(diffusion, x)["elbo"].mean() for x in (test, test[:512], train[:512]))
    ways, error = results["two_ways"], results["two_ways"]["difference_error"]
    for way in ("analytic", "trace_elbo"):
        assert abs(ways[way]["nats"] - first) <= 4.9 * error
    assert abs(results["test"]["elbo"]["nats"] - whole) <= 9.8 * error  # of one draw each, not four
    assert min(abs(first - other), abs(first - whole)) > 30 * error
    gap = oracle.log_prob(test).mean() - results["test"]["elbo"]["nats"]
    assert results["reference"]["gap"]["nats"] == pytest.approx(gap, rel=1e-5)


@pytest.mark.parametrize("levels, image_shape", [(17, (8, 8)), (2, None), (100_000, None)])
def test_on_a_grid_the_last_noise_is_a_third_of_the_half_width_of_a_level(levels, image_shape):
    x = np.random.default_rng(0).integers(0, levels, (20, 1 if image_shape is None else 64)).astype(np.int32)
    dataset = datasets.Dataset("grid", x, x, x, levels=levels, image_shape=image_shape)
    diffusion = presets.default_diffusion(dataset, 10)
    lowest, next_lowest = np.asarray(diffusion.likelihood.encode(np.array([0, 1])), np.float64)
    half_width = (next_lowest - lowest) / 2
    assert diffusion.schedule.sigma[0] == pytest.approx(half_width / 3, rel=0.15)


def test_continuous_data_are_standardised_by_the_training_split():
    rng = np.random.default_rng(0)
    splits = [rng.normal(loc, scale, (30, 3)).astype(np.float32) for loc, scale in ((1, 2), (5, 3), (-4, 1))]
    likelihood = presets.default_diffusion(datasets.Dataset("points", *splits), 5).likelihood
    np.testing.assert_allclose(likelihood.loc, splits[0].mean(0, np.float64), rtol=1e-6)
    np.testing.assert_allclose(likelihood.scale, splits[0].std(0, np.float64), rtol=1e-6)


def test_resume(run, tmp_path, capsys):
    path, _, _ = run
    before = (path / "parameters.npz").read_bytes()
    for option in (["--iterations", "30"], ["--data", "moons"], ["--seed", "1"]):
        assert cli.main(["fit", "--out", str(path), "--resume", *option]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and option[0] in error and f"got {option[1]}" in error
    assert cli.main(["fit", "--out", str(path), "--resume", *SMALL]) == 0
    assert (path / "parameters.npz").read_bytes() == before


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_run_to_go_on_with(kind, tmp_path):
    arguments = [
        sys.executable,
        "-m",
        "probdiff.cli",
        "fit",
        "--data",
        "moons",
        "--num-steps",
        "5",
        "--batch-size",
        "64",
        "--iterations",
        "3000",
        "--out",
    ]
    process = subprocess.Popen(
        [*arguments, tmp_path / "a"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(kind, signal.SIG_DFL),  # a shell ignores it for its jobs in the background
    )
    while not (tmp_path / "a" / "checkpoint.npz").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(kind)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.strip().splitlines()[-1].endswith("--resume")
    # That it goes on bit for bit is tested with the fit, and by analyses/crash.py.
    losses = load_arrays(tmp_path / "a" / "checkpoint.npz")["losses"]
    assert 500 <= len(losses) < 3000 and np.isfinite(losses).all()


def test_standard_output_is_the_document_alone_whatever_a_library_prints(run, capfd, patched):
    """In Python, and past it by the file descriptor, as libraries in C do."""

    def load(*arguments):
        print("from Python")
        os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks\n")
        return right(*arguments)

    right = datasets.load
    patched(right, load)
    assert cli.main(["inspect", str(run[0]), "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["data"] == "digits" and captured.out.count("\n") == 1
    assert "[Gloo]" in captured.err and "from Python" in captured.err
    assert cli.main(["inspect", str(run[0])]) == 0
    assert "[Gloo]" in capfd.readouterr().out


BAD = {
    "more devices than there are": (["--devices", "2"], "devices: Expected 1 to 1, the devices that JAX has; got 2"),
    "a process without the first": (["--process", "1"], "--coordinator: Expected the address HOST:PORT of the first process"),
    "processes without a folder": (["--coordinator", "a:1"], "--out: Expected a folder that all processes see; got none"),
    "a process too many": (
        ["--coordinator", "a:1", "--out", "{tmp}/r", "--processes", "2", "--process", "2"],
        "--process: Expected one of 0 … P−1 out of --processes P; got 2 of 2",
    ),
    "an address without a port": (
        ["--coordinator", "a", "--out", "{tmp}/r", "--processes", "2", "--process", "0"],
        "--coordinator: Expected HOST:PORT or auto; got a",
    ),
    "auto and by hand": (
        ["--coordinator", "auto", "--out", "{tmp}/r", "--processes", "2"],
        "--coordinator: Expected no --processes and --process with auto",
    ),
    "zero steps": (["--num-steps", "0"], "--num-steps: Expected an integer of at least 1; got 0"),
    "negative iterations": (["--iterations", "-5"], "--iterations: Expected an integer of at least 1; got -5"),
    "empty batch": (["--batch-size", "0"], "--batch-size: Expected"),
    "learning rate": (["--learning-rate", "nan"], "--learning-rate: Expected a positive number; got nan"),
    "negative seed": (["--seed", "-1"], "--seed: Expected"),
    "huge seed": (["--seed", "99999999999999999999"], "--seed: Expected"),
    "unknown data": (["--data", "digit"], "data: Expected one of digits, checkerboard"),
    "no such file": (["--data", "none.npy"], "none.npy, which is not there"),
    "empty file": (["--data", "{tmp}/empty.npy"], "an empty file"),
    "nan": (["--data", "{tmp}/nan.npy"], "Expected finite values; got nan at index [3, 1]"),
    "images": (["--data", "{tmp}/images.npy"], "x.reshape(len(x), -1)"),
    "taken": (["--out", "{tmp}/taken"], "Expected a new folder"),
    "resume nothing": (["--resume"], "--resume: Expected --out DIR"),
    "resume no run": (["--out", "{tmp}/taken", "--resume"], "has no config.json"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    (path / "empty.npy").write_bytes(b"")
    nan = np.random.default_rng(0).normal(size=(20, 2))
    nan[3, 1] = np.nan
    np.save(path / "nan.npy", nan)
    np.save(path / "images.npy", np.zeros((20, 8, 8), int))
    (path / "taken").mkdir()
    (path / "taken" / "notes.txt").write_text("mine")
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2_before_anything_is_compiled(case, bad_files, capsys, monkeypatch):
    monkeypatch.setattr(SVI, "__init__", lambda *args, **kwargs: pytest.fail("the fit was started"))
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("something was compiled"))
    arguments, message = BAD[case]
    assert cli.main(["fit", *(a.format(tmp=bad_files) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("arguments", [["fit", "--steps", "3"], ["fit", "--num-steps", "many"], ["train"], []])
def test_unknown_options(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_inspect_of_no_run(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_importing_the_command_line_is_light():
    code = "import sys, probdiff.cli; print([m for m in ('arviz', 'matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_ten_rows_with_a_constant_first_pixel_to_the_end(tmp_path, capsys):
    array = np.random.default_rng(0).integers(0, 5, (10, 3)).astype(np.int8)
    array[:, 0] = 4
    np.save(tmp_path / "ten.npy", array)
    options = ["--num-steps", "2", "--iterations", "3", "--batch-size", "4", "--json", "--out", str(tmp_path / "r")]
    assert cli.main(["fit", "--data", str(tmp_path / "ten.npy"), *options]) == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    damaged = (tmp_path / "r" / "checkpoint.npz").read_bytes()[:500]
    (tmp_path / "r" / "checkpoint.npz").write_bytes(damaged)
    assert cli.main(["fit", "--out", str(tmp_path / "r"), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoint.npz: Expected an intact file" in error


def test_resume_passes_over_a_damaged_checkpoint_with_one_line(run, tmp_path, capsys, patched):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    (copy / "checkpoint.previous.npz").write_bytes((copy / "checkpoint.npz").read_bytes())
    (copy / "checkpoint.npz").write_bytes(b"spoiled")
    patched(report.evaluate, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["fit", "--out", str(copy), "--resume"]) == 130
    lines = capsys.readouterr().err.strip().splitlines()
    (warning,) = [line for line in lines if "warning" in line]
    assert warning.startswith("probdiff: warning:") and warning.endswith("going on from checkpoint.previous.npz")
    assert lines[-1].endswith(f"probdiff fit --out {copy} --resume")


def test_a_config_that_is_not_one_of_probdiff_fit(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    for change, message in (
        ({"iterations": "many"}, "--iterations: Expected an integer of at least 1; got many"),
        ({"data": None}, "data: Expected one of digits"),
        ({"model": {}}, "Expected the description of a model in config.json; got KeyError"),
    ):
        config = json.loads((run[0] / "config.json").read_text()) | change
        (copy / "config.json").write_text(json.dumps(config))
        assert cli.main(["fit", "--out", str(copy), "--resume"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
