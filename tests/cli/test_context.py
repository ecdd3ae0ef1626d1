"""Conditional models through the commands: which rows of the context a command uses, and what it refuses."""

import contextlib
import io
import json

import jax
import numpy as np
import pandas as pd
import pytest
from cli_runs import set_small_networks
from conftest import patcher
from numpyro.infer import SVI

import probdiff
import probdiff.cli.compare
import probdiff.cli.fit
import probdiff.cli.sample
from probdiff import cli, datasets, presets, training
from probdiff.diagnostics.common_paths import compare_on_common_paths
from probdiff.oracles import GaussianOracle, exact_terms
from probdiff.programs.sites import PARAMS
from probdiff.storage import create_run

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make

RNG = np.random.default_rng(0)
AGE = RNG.normal(40, 9, 60)
SITE = RNG.choice(["north", "south"], 60)
FRAME = pd.DataFrame({"age": AGE, "x": AGE / 9 + RNG.normal(size=60), "y": (SITE == "north") * 3 + RNG.normal(size=60), "site": SITE})
GIVEN = ["age", "site"]
DATA = datasets.split(FRAME, name="mine", context=GIVEN)
SMALL = ["--num-steps", "4", "--iterations", "6", "--batch-size", "8"]


def command(*arguments):
    """Exit code, and what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main([str(each) for each in arguments])
    return code, out.getvalue(), err.getvalue()


def make_run(path, data):
    """A run whose model is not trained, and in which the context counts."""
    network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, context_dim=data.context_dim)
    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(4, 4.0, -3.0), network, data.likelihood())
    params = {PARAMS: jax.tree.map(lambda leaf: leaf + 0.05, diffusion.trainable())}
    fit = training.Fit(diffusion.bind(params), np.ones(3), np.zeros((0, 2)), None)
    run = create_run(path, diffusion, data=data)
    terms = probdiff.elbo_terms(fit.diffusion, data.test, context=data.test_context, key=jax.random.key(1), num_draws=3)
    run.save(fit=fit, terms=terms)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a conditional model, and one of the same data without their context."""
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "given", DATA), make_run(folder / "plain", DATA.without_context())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "mine.csv"
    FRAME.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def fitted(table):
    """A fit from a file to the end; the JSON document that it printed, and what it said before."""
    with pytest.MonkeyPatch.context() as patch:
        set_small_networks(patch)
        patcher(patch)(compare_on_common_paths, lambda *args, **kwargs: None)
        code, out, err = command("fit", "--data", table, "--context", "age, site", "--out", table.parent / "run", "--json", *SMALL)
    assert code == 0
    return probdiff.open_run(table.parent / "run"), json.loads(out), err


def test_a_file_is_fitted_and_inspected(fitted):
    run, results, stderr = fitted
    assert results["context"] == GIVEN and "given: site, 2 categories (north, south)" in results["columns"]
    assert "given: age, a number" in stderr and results["two_ways"]["agree"]
    assert run.config["context"] == GIVEN and run.diffusion.is_conditional and run.data.columns == ("x", "y")
    constants = run.datatree["constant_data"].dataset
    np.testing.assert_array_equal(constants["context"].values, DATA.test_context)
    code, text, _ = command("inspect", run.path)
    assert code == 0 and "given: site, 2 categories" in text and "6 items of 2 dimensions given age, site" in text
    assert json.loads(command("inspect", run.path, "--json")[1])["context"] == GIVEN
    figures = run.path / "figures"
    assert sorted(path.name for path in figures.iterdir()) == ["loss.png", "samples.png", "step_kl.png"]
    (figures / "samples.png").unlink()
    assert command("inspect", run.path, "--figures")[0] == 0 and (figures / "samples.png").exists()


def test_a_run_keeps_its_context_when_the_file_changes(fitted, table):
    run, _, _ = fitted
    content = table.read_text()
    table.write_text("age,x\n")
    found = run.data
    table.write_text(content)
    np.testing.assert_array_equal(found.test_context, DATA.test_context)
    assert found.covariates == DATA.covariates


def test_a_fit_is_resumed(fitted, table):
    run, _, _ = fitted
    before = (run.path / "parameters.eqx").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        seen = spy(patch, probdiff.fit)
        code, _, error = command("fit", "--out", run.path, "--resume", "--context", "age")
        assert code == 2 and "--context: Expected ['age', 'site'], as in the run to resume; got ['age']" in error
        assert command("fit", "--out", run.path, "--resume", "--context", "age,site")[0] == 130
    np.testing.assert_array_equal(seen["context"], DATA.train_context)
    assert (run.path / "parameters.eqx").read_bytes() == before


def spy(patch, function):
    """What ``function`` is given by the next command, which ends there."""
    seen = {}

    def interrupt(diffusion, x, **options):
        seen.update(options, diffusion=diffusion, x=x)
        raise KeyboardInterrupt

    patcher(patch)(function, interrupt)
    return seen


@pytest.mark.parametrize("source", ["csv", "npz"])
def test_the_fit_has_the_context_of_each_split(source, table, tmp_path, monkeypatch):
    seen, file = spy(monkeypatch, probdiff.fit), table
    if source == "npz":
        file = tmp_path / "mine.npz"
        np.savez(file, x=FRAME[["x", "y"]], theta=AGE)
    options = ["--context", "theta" if source == "npz" else "0,3", "--out", tmp_path / "run"]
    assert command("fit", "--data", file, *options, *SMALL)[0] == 130
    width = 1 if source == "npz" else 3
    for name, split in (("context", "train"), ("validation_context", "validation")):
        np.testing.assert_array_equal(seen[name], getattr(DATA, f"{split}_context")[:, :width])
    np.testing.assert_array_equal(seen["x"], DATA.train)
    assert seen["diffusion"].network.network.context_dim == width


@pytest.mark.release
def test_the_report_is_of_the_context_of_test_data():
    """By closed form, of a model whose bound is another at any other row."""
    oracle, rng = GaussianOracle([0.5, -0.3], [[0.06, 0.02], [0.02, 0.03]], [[2.0, 0.0], [0.5, -1.5]]), np.random.default_rng(0)
    contexts = [rng.normal(size=(40, 2)).astype(np.float32) for _ in range(3)]
    splits = [oracle.sample(rng, 40, context).astype(np.float32) for context in contexts]
    given = dict(zip(("train_context", "validation_context", "test_context"), contexts))
    dataset = datasets.Dataset("points", *splits, **given)
    schedule = probdiff.log_snr_schedule(8, 6.0, -4.0)
    diffusion = probdiff.Diffusion(schedule, oracle.network(schedule), reverse_variance="forward").bind({})
    both, results = probdiff.cli.fit.evaluate(diffusion, dataset, key=jax.random.key(0))
    exact = exact_terms(diffusion, dataset.test, context=dataset.test_context)["elbo"].mean()
    found, ways = results["test"]["elbo"], results["two_ways"]
    assert abs(found["nats"] - exact) <= 4.9 * found["monte_carlo_error"] < 1
    for way in ("analytic", "trace_elbo"):
        assert abs(ways[way]["nats"] - exact) <= 4.9 * ways["difference_error"] < 2
    np.testing.assert_array_equal(both.terms.context, dataset.test_context)


def test_models_with_and_without_are_compared_on_the_same_rows(runs):
    """Each conditional model with the context of its run, the others without."""
    paths = [str(run.path) for run in runs]
    code, out, _ = command("compare", *paths, "--num-draws", "2", "--json")
    document = json.loads(out)
    assert code == 0 and document["context"] == {paths[0]: GIVEN}
    models = {path: run.diffusion for path, run in zip(paths, runs)}
    expected = probdiff.compare_models(models, DATA.test, context=DATA.test_context, key=jax.random.key(0), num_draws=2)
    for path in paths:
        assert document["models"][path]["elbo"] == pytest.approx(expected.table["elbo"][path], rel=1e-6)
    other = probdiff.compare_models(models, DATA.test, context=DATA.test_context[::-1], key=jax.random.key(0), num_draws=2)
    assert abs(other.table["elbo"][paths[0]] - expected.table["elbo"][paths[0]]) > 1e-3
    assert f"{paths[0]}: given age, site" in command("compare", *paths, "--num-draws", "2")[1]


@pytest.mark.release
def test_models_of_other_columns_are_not_compared(runs, tmp_path):
    other = make_run(tmp_path / "other", datasets.split(FRAME[["x", "y", "site"]].assign(x=AGE), context="site", name="mine"))
    code, _, error = command("compare", runs[0].path, other.path)
    assert code == 2 and error.count("\n") == 1
    assert "the test data of" in error and "given age, site" in error and "other data (mine, seed 0, given site)" in error


def test_estimators_are_compared_given_the_context_of_the_items(runs, monkeypatch):
    seen = spy(monkeypatch, probdiff.compare_estimators)
    assert command("compare", runs[0].path, "--num-items", "4")[0] == 130
    np.testing.assert_array_equal(seen["x"], DATA.test[:4])
    np.testing.assert_array_equal(seen["context"], DATA.test_context[:4])


def sampled(run, *options):
    """What a command draws, the document that it prints; and the same in Python, of some contexts."""
    code, out, err = command("sample", run.path, *options, "--json", "--seed", "3")
    assert code == 0, err
    document = json.loads(out)
    return pd.read_csv(document["samples"]), document


def drawn(run, context):
    return probdiff.samplers.ancestral(run.diffusion, context=context, key=jax.random.key(3))


def test_samples_of_a_context_in_words(runs):
    run = runs[0]
    frame, document = sampled(run, "--context", "site=south,age=31.5", "--num-samples", "8")
    context = np.repeat(DATA.covariates.encode({"age": [31.5], "site": ["south"]}), 8, 0)
    np.testing.assert_allclose(frame[["x", "y"]], drawn(run, context), rtol=1e-5)
    assert set(frame["age"]) == {31.5} and set(frame["site"]) == {"south"}
    assert document["context"] == "site=south,age=31.5" and document["num_samples"] == 8
    other, _ = sampled(run, "--context", "50,north", "--num-samples", "8")
    assert np.all(np.abs(other["x"] - frame["x"]) > 1e-3) and set(other["site"]) == {"north"}
    text = command("sample", run.path, "--context", "31.5,south", "--num-samples", "8")[1]
    assert "8 samples of mine, given 31.5,south, by ancestral" in text


@pytest.mark.parametrize("suffix", [".csv", ".npy"])
def test_samples_of_the_contexts_in_a_file(suffix, tmp_path, runs):
    """One for each row: in a .csv file found by their names."""
    rows, run, path = FRAME.iloc[[7, 3, 9]], runs[0], tmp_path / f"rows{suffix}"
    rows.to_csv(path, index=False) if suffix == ".csv" else np.save(path, rows[GIVEN].to_numpy().astype(str))
    frame, document = sampled(run, "--context", path)
    np.testing.assert_allclose(frame[["x", "y"]], drawn(run, DATA.covariates.encode(rows)), rtol=1e-4)
    assert document["num_samples"] == 3 and frame["site"].tolist() == rows["site"].tolist()
    rows[:1].to_csv(tmp_path / "one.csv", index=False)
    once, repeated = (sampled(run, "--context", tmp_path / "one.csv", *more)[0] for more in ([], ["--num-samples", "3"]))
    assert len(once) == 1 and len(repeated) == 3 and set(repeated["age"]) == set(once["age"])
    code, _, error = command("sample", run.path, "--context", path, "--num-samples", "4")
    assert code == 2 and f"--num-samples: Expected none, or 3 as {path} has rows; got 4" in error


def test_samples_of_the_contexts_of_test_data(runs):
    """From the first on again where there are fewer."""
    run = runs[0]
    frame, document = sampled(run, "--num-samples", "8")
    np.testing.assert_allclose(frame[["x", "y"]], drawn(run, np.concatenate([DATA.test_context, DATA.test_context[:2]])), rtol=1e-5)
    assert document["context"] == "test split"
    assert "given the contexts of test data" in command("sample", run.path, "--num-samples", "8")[1]
    assert json.loads(command("sample", runs[1].path, "--num-samples", "8", "--json")[1])["context"] is None


def test_the_figure_has_data_of_the_same_context(runs, monkeypatch):
    """Of the digits, images of the same label beside samples of it; of any, where there are none, which the title says."""
    seen = {}
    monkeypatch.setattr("probdiff.cli.common.plot_samples", lambda samples, data, shape, title: seen.update(data=data, title=title))
    digits = datasets.load("digits", context="labels")
    sevens = np.repeat(digits.covariates.parse("7"), 9, 0)
    probdiff.cli.common.sample_figures(np.zeros((9, 64)), digits, "digits, given 7", sevens)
    np.testing.assert_array_equal(seen["data"], digits.test[digits.test_context[:, 7] > 0][:9])
    assert seen["title"] == "digits, given 7, beside data of the test split with the same context"
    probdiff.cli.common.sample_figures(np.zeros((4, 2)), DATA, "mine", np.repeat(DATA.covariates.parse("1,north"), 4, 0))
    np.testing.assert_array_equal(seen["data"], DATA.test[:4])
    assert "with any context" in seen["title"]


@pytest.mark.long
@pytest.mark.parametrize("data", [DATA, datasets.load("digits", context="labels"), datasets.split(RNG.integers(0, 300, (40, 80)), context=[0])])
def test_the_default_model_is_conditional(data):
    """Of a table, of images, of few levels and of many."""
    diffusion = presets.default_diffusion(data, 4)
    assert diffusion.is_conditional and not presets.default_diffusion(data.without_context(), 4).is_conditional
    assert diffusion.given(data.test_context).context.shape == (len(data.test), data.context_dim)


BAD_FIT = {
    "no such column": (["--data", "{table}", "--context", "sex"], "context: Expected some of the columns age, x, y, site, by name"),
    "nothing left": (["--data", "{table}", "--context", "age,x,y,site"], "context: Expected some of the columns, so that there are others to model"),
    "no column": (["--data", "{table}", "--context", "age,"], "--context: Expected columns, with commas between them; got 'age,'"),
    "empty": (["--data", "{table}", "--context", ""], "--context: Expected columns, with commas between them; got ''"),
    "labels that are data": (["--data", "{table}", "--context", "age"], "a readable .csv file of numbers"),
    "of the moons": (["--data", "moons", "--context", "labels"], "context: Expected none for moons; got ['labels']"),
    "of the digits": (["--context", "label"], "context: Expected labels, or none, for digits; got ['label']"),
    "an option by part of its name": (["--contex", "labels"], "unrecognized arguments: --contex labels"),
}


@pytest.mark.parametrize("case", BAD_FIT)
def test_fit_refuses_in_one_line_before_anything_is_compiled(case, table, monkeypatch):
    monkeypatch.setattr(SVI, "__init__", lambda *args, **kwargs: pytest.fail("the fit was started"))
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("something was compiled"))
    arguments, message = BAD_FIT[case]
    code, out, error = command("fit", *(each.format(table=table) for each in arguments))
    assert code == 2 and message in error and error.count("\n") == 1 and out == ""


BAD_SAMPLES = {
    "too few values": ("40", "context: Expected 2 values, of age, site; got 1: 40"),
    "a name of none": ("ages=40,site=north", "context: Expected one value of each of age, site, as NAME=VALUE; got ages=40,site=north"),
    "an unknown label": ("40,west", "context: Expected one of the labels north, south; got west"),
    "no number": ("old,north", "context: Expected numbers of 'age'; got 'old'"),
    "nan": ("nan,north", "context: Expected finite values; got"),
    "nothing": ("", "context: Expected 2 values, of age, site; got 0"),
    "no file": ("none.csv", "context: Expected an existing file; got none.csv, which is not there"),
    "a file without a column": ("{tmp}/ages.csv", "context: Expected the columns age, site; got none named site"),
    "a hole in a file": ("{tmp}/hole.csv", "in row 1 (counted from 0) of column 'age'"),
    "an array of other columns": ("{tmp}/wide.npy", "shape (row, 2), of age, site; got shape (3, 5)"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_sample_refuses_in_one_line_before_anything_is_compiled(case, tmp_path, runs, monkeypatch):
    monkeypatch.setattr(probdiff.samplers, "_draw_batch", lambda *arguments: pytest.fail("something was compiled"))
    (tmp_path / "ages.csv").write_text("age\n40\n")
    (tmp_path / "hole.csv").write_text("age,site\n40,north\n,south\n")
    np.save(tmp_path / "wide.npy", np.ones((3, 5)))
    context, message = BAD_SAMPLES[case]
    before = sorted(runs[0].path.rglob("*"))
    code, out, error = command("sample", runs[0].path, "--context", context.format(tmp=tmp_path))
    assert code == 2 and message in error and error.count("\n") == 1 and out == ""
    assert sorted(runs[0].path.rglob("*")) == before


def test_a_posterior_given_one_row_in_a_file(tmp_path, runs, monkeypatch):
    """The same context as in words; of several rows there is no posterior."""
    seen = spy(monkeypatch, probdiff.inference.smc)
    (tmp_path / "seen.csv").write_text("x,y\n0.5,\n")
    FRAME.iloc[[7, 3]].to_csv(tmp_path / "two.csv", index=False)
    FRAME.iloc[[7]].to_csv(tmp_path / "one.csv", index=False)
    for context in (tmp_path / "one.csv", f"{AGE[7]},{SITE[7]}"):
        assert command("posterior", runs[0].path, "--observe", tmp_path / "seen.csv", "--context", context)[0] == 130
        np.testing.assert_allclose(seen.pop("context"), DATA.covariates.encode(FRAME.iloc[[7]]), rtol=1e-5)
    code, _, error = command("posterior", runs[0].path, "--observe", tmp_path / "seen.csv", "--context", tmp_path / "two.csv")
    assert code == 2 and "--context: Expected the values of one row; got 2 rows" in error


def test_a_context_of_a_model_without(runs):
    code, _, error = command("sample", runs[1].path, "--context", "40,north")
    assert code == 2 and "--context: Expected none, for a run whose model is given none; got 40,north" in error
