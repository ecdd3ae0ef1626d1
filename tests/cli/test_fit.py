"""``probdiff fit``."""

import contextlib
import io
import json
import shutil

import equinox as eqx
import jax
import numpy as np
import pytest
from cli_runs import SMALL, small_networks, small_run  # noqa: F401 (a fixture)
from conftest import assert_mean, patcher
from numpyro.infer import SVI

import probdiff
from probdiff import cli, datasets, presets
from probdiff.cli import fit as fit_command
from probdiff.cli.fit import evaluate
from probdiff.diagnostics.common_paths import compare_on_common_paths
from probdiff.diagnostics.tables import format_fit
from probdiff.elbo import data_set_elbo
from probdiff.oracles.closed_form import exact_terms
from probdiff.oracles.distributions import GaussianOracle

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make


@pytest.mark.long
def test_fit():
    path, results, stderr = small_run()
    assert "bits/dim" in stderr and "20/20" in stderr
    test, both = results["test"], results["two_ways"]
    elbo = test["reconstruction"]["nats"] - test["step_kl"]["nats"] - test["prior_kl"]["nats"]
    assert test["elbo"]["nats"] == pytest.approx(elbo, rel=1e-6) and test["num_items"] == 447
    assert test["elbo"]["bits_per_dim"] == pytest.approx(-elbo / 64 / np.log(2), rel=1e-6)
    parts = sum(test[name]["bits_per_dim"] for name in ("prior_kl", "step_kl", "reconstruction"))
    assert parts == pytest.approx(test["elbo"]["bits_per_dim"], rel=1e-6)
    assert both["agree"] is True and abs(both["z"]) < 4.9
    assert results["reference"]["independent_dimensions"]["bits_per_dim"] == pytest.approx(2.398, abs=0.002)
    names = {"config.json", "checkpoint.eqx", "parameters.eqx", "losses.csv", "elbo.nc", "results.json", "figures"}
    assert names <= {file.name for file in path.iterdir()}
    assert {file.name for file in (path / "figures").iterdir()} == {"loss.png", "step_kl.png", "samples.png"}
    opened = probdiff.open_run(path)
    terms = probdiff.elbo_terms(opened.diffusion, opened.data.test, key=jax.random.key(0), num_draws=4)
    assert_mean(np.asarray(terms.elbo.mean(0) - opened.terms.elbo.mean(0)), 0.0, power=200.0)
    errors = test["elbo"]["monte_carlo_error"], probdiff.elbo.Estimate.of_draws(opened.terms.elbo).monte_carlo_error
    assert abs(np.asarray(opened.terms.elbo, np.float64).mean() - elbo) < 4.9 * np.hypot(*errors)
    common = both["common_paths"]
    assert common["num_items"] == 4 and common["num_terms"] == 5 and common["largest"] < 1e-6 and common["wrong"] == []


@pytest.fixture(scope="module")
def evaluated():
    """What is said of data with a known density: the bound of all of them, both ways on some, the results and the data."""
    oracle = GaussianOracle(np.zeros(3), np.eye(3))
    x = oracle.sample(np.random.default_rng(0), 30).astype(np.float32)
    schedule = probdiff.log_snr_schedule(4, 1.0, -4.0)
    diffusion = probdiff.Diffusion(schedule, oracle.network(schedule, 0.9), dim=3)
    dataset = datasets.Dataset("gaussian", x, x, x, oracle=oracle)
    return *_seen(diffusion, dataset), dataset


def _seen(diffusion, dataset):
    """The bound of the whole data set that ``evaluate`` is given, and what it makes of it."""
    found = []

    def spy(*args, **kwargs):
        found.append(data_set_elbo(*args, **kwargs))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_command, "data_set_elbo", spy)
        both, results = evaluate(diffusion, dataset, key=jax.random.key(0))
    return found[0], both, results


@pytest.mark.usefixtures("small_networks")
def test_errors_of_the_fit_in_nats_and_in_bits_are_those_over_the_test_items():
    levels = np.random.default_rng(0).integers(0, 4, (40, 5)).astype(np.int32)
    dataset = datasets.Dataset("grid", levels[:20], levels, levels[10:], levels=4)
    whole, both, results = _seen(presets.default_diffusion(dataset, 4), dataset)
    names = "prior_kl", "step_kl", "reconstruction", "elbo"
    rows = [(results["test"][name], getattr(whole, name)) for name in names]
    rows.append((results["two_ways"]["analytic"], np.asarray(both.terms.elbo).mean(0)))
    rows.append((results["two_ways"]["trace_elbo"], both.path.mean(0)))
    for row, values in rows:
        values = np.asarray(values, np.float64)
        assert len(values) == 30 and row["nats"] == pytest.approx(values.mean(), rel=1e-4)
        assert row["error"] == pytest.approx(values.std(ddof=1) / np.sqrt(30), rel=1e-4)
    noise = whole.draws.var(0, ddof=1) / len(whole.draws)
    assert results["test"]["elbo"]["monte_carlo_error"] == pytest.approx(np.sqrt(noise.sum()) / 30, rel=1e-4)
    for row in (*(row for row, _ in rows), results["reference"]["independent_dimensions"]):
        assert row["bits_error"] == pytest.approx(row["error"] / (5 * np.log(2)), rel=1e-9) and row["error"] > 0


def test_the_gap_is_paired_item_by_item(evaluated):
    """What makes an item improbable makes its bound low: that must not count as an error of the gap."""
    whole, _, results, dataset = evaluated
    log_p, elbo = dataset.log_prob(dataset.test), whole.elbo
    gap = results["reference"]["gap"]
    assert gap["nats"] == pytest.approx((log_p - elbo).mean(), rel=1e-4)
    assert gap["error"] == pytest.approx((log_p - elbo).std(ddof=1) / np.sqrt(30), rel=1e-4)
    assert gap["error"] < 0.7 * np.hypot(log_p.std(), elbo.std()) / np.sqrt(30)


def test_the_difference_of_the_two_ways_comes_with_its_monte_carlo_error(evaluated):
    _, both, results, _ = evaluated
    found = results["two_ways"]
    draws = [np.asarray(each, np.float64) for each in (both.terms.elbo, both.path)]
    difference = draws[0].mean() - draws[1].mean()
    error = np.sqrt(sum((each.var(0, ddof=1) / len(each)).sum() for each in draws)) / 30
    assert found["num_items"] == 30 and found["num_draws"] == len(draws[0]) == len(draws[1])
    assert found["difference"] == pytest.approx(difference, abs=1e-5)
    assert found["difference_error"] == pytest.approx(error, rel=1e-4)
    assert found["z"] == pytest.approx(difference / error, abs=1e-3) and abs(found["z"]) <= 4.9
    assert found["detectable"] == pytest.approx(4.2816 * error, rel=1e-4)
    for name, each in zip(("analytic", "trace_elbo"), draws):
        assert found[name]["nats"] == pytest.approx(each.mean(), rel=1e-5)
        assert found[name]["error"] == pytest.approx(each.mean(0).std(ddof=1) / np.sqrt(30), rel=1e-4)


@pytest.mark.long
def test_the_report_is_of_test_data():
    """Of more of them than are evaluated both ways, which are the first; by closed form."""
    oracle, rng = GaussianOracle([0.0, 0.0], 0.25 * np.eye(2)), np.random.default_rng(0)
    cases = ((700, 0), (650, 1), (600, 2))
    train, validation, test = ((oracle.sample(rng, size) + shift).astype(np.float32) for size, shift in cases)
    test[512:] += 2
    schedule = probdiff.log_snr_schedule(4, 4.0, -3.0)
    diffusion = probdiff.Diffusion(schedule, oracle.network(schedule))
    dataset = datasets.Dataset("points", train, validation, test, oracle=oracle)
    _, results = evaluate(diffusion, dataset, key=jax.random.key(0))
    whole, first, other = (exact_terms(diffusion, x)["elbo"].mean() for x in (test, test[:512], train[:512]))
    ways, error = results["two_ways"], results["two_ways"]["difference_error"]
    for way in ("analytic", "trace_elbo"):
        assert abs(ways[way]["nats"] - first) <= 4.9 * error
    assert abs(results["test"]["elbo"]["nats"] - whole) <= 4.9 * results["test"]["elbo"]["monte_carlo_error"]
    assert min(abs(first - other), abs(first - whole)) > 30 * error
    gap = oracle.log_prob(test).mean() - results["test"]["elbo"]["nats"]
    assert results["reference"]["gap"]["nats"] == pytest.approx(gap, rel=1e-5)


@pytest.fixture
def one_way(patched):
    """The evaluation does not compare terms on common paths: that takes compilation, and is tested elsewhere."""
    patched(compare_on_common_paths, lambda *args, **kwargs: None)


@pytest.mark.release
@pytest.mark.usefixtures("small_networks")
def test_continuous_data_of_ones_own(tmp_path, capsys, monkeypatch, one_way):
    monkeypatch.chdir(tmp_path)
    np.save("mine.npy", np.random.default_rng(0).normal([5, -2, 0], [3, 0.1, 1], (400, 3)))
    assert cli.main(["fit", "--data", "mine.npy", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "bits/dim" not in text and "they agree" in text and "runs/mine-1" in text
    monkeypatch.chdir("/")
    assert probdiff.open_run(tmp_path / "runs" / "mine-1").data.train.shape == (320, 3)


@pytest.mark.release
@pytest.mark.usefixtures("small_networks")
def test_known_entropy_and_one_step(tmp_path, capsys, monkeypatch, one_way):
    monkeypatch.setitem(datasets.SIZES, "test", 200)
    arguments = ["fit", "--data", "8gaussians", "--out", str(tmp_path / "r"), "--json", *SMALL, "--num-steps", "1"]
    assert cli.main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["reference"]["entropy"]["nats"] == pytest.approx(2.832, abs=1e-3)
    log_prob, gap = (results["reference"][name]["nats"] for name in ("log_prob", "gap"))
    assert gap > 0 and results["test"]["step_kl"]["nats"] == 0
    # The gap is that of the bound in the same table; the entropy is that of the distribution, not of these items.
    assert log_prob - results["test"]["elbo"]["nats"] == pytest.approx(gap, abs=1e-6) and abs(log_prob + 2.832) > 1e-3


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What ``probdiff fit`` gives to the fit, of data of one's own and with options of one's own; and the run."""
    folder, seen = tmp_path_factory.mktemp("given"), {}
    np.save(folder / "mine.npy", np.random.default_rng(0).normal(size=(50, 2)))

    def fit(diffusion, data, **given):
        seen.update(given, diffusion=diffusion, data=data)
        raise KeyboardInterrupt

    options = ["--num-steps", "6", "--iterations", "7", "--batch-size", "5", "--learning-rate", "0.0123", "--seed", "3"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patcher(patch)(probdiff.fit, fit)
        assert cli.main(["fit", "--data", str(folder / "mine.npy"), "--out", str(folder / "run"), *options]) == 130
    return seen, probdiff.open_run(folder / "run"), np.load(folder / "mine.npy").astype(np.float32)


def test_the_fit_has_the_training_data_and_validates_on_those_for_validation(given):
    seen, run, rows = given
    parts = [{tuple(row) for row in part} for part in (seen["data"], seen["validation"], run.data.test)]
    assert [len(part) for part in parts] == [40, 5, 5] and set.union(*parts) == set(map(tuple, rows))
    np.testing.assert_array_equal(seen["data"], run.data.train)
    np.testing.assert_array_equal(seen["validation"], run.data.validation)


def test_a_run_has_the_splits_of_its_seed(given):
    _, run, _ = given
    same, other = (datasets.load(run.config["data"], seed) for seed in (3, 0))
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(run.data, name), getattr(same, name))
        assert not np.array_equal(getattr(same, name), getattr(other, name))


def test_the_weights_and_the_noise_of_a_fit_are_those_of_its_seed(given):
    seen, run, _ = given
    same, other = (presets.default_diffusion(run.data, 6, seed).network for seed in (3, 0))
    assert bool(eqx.tree_equal(seen["diffusion"].network, same)) and not bool(eqx.tree_equal(same, other))
    assert seen["key"] == jax.random.split(jax.random.key(3))[0]


@pytest.mark.long
def test_the_model_that_is_fitted_is_the_one_on_disk(given):
    """Which a fit goes on with that is resumed: the same parameters, tables and structure."""
    seen, run, _ = given
    assert bool(eqx.tree_equal(seen["diffusion"], run.untrained))
    for name in ("beta", "alpha_bar", "one_minus_alpha_bar", "log_snr"):
        tables = [getattr(diffusion.schedule, name) for diffusion in (seen["diffusion"], run.untrained)]
        np.testing.assert_array_equal(*tables)


def test_the_fit_has_the_options(given):
    seen, _, _ = given
    options = {"iterations": 7, "batch_size": 5, "learning_rate": 0.0123}
    assert {name: seen[name] for name in options} == options and seen["diffusion"].schedule.num_steps == 6


def test_a_bar_is_shown_before_the_weights_are_drawn(tmp_path, capsys, monkeypatch):
    """Drawing them is the first that is compiled."""

    def build(*_):
        shown.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    shown = []
    monkeypatch.setattr(fit_command, "default_diffusion", build)
    assert cli.main(["fit", "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert "building the model:   0%" in shown[0]


@pytest.mark.long
@pytest.mark.usefixtures("small_networks")
def test_resume(tmp_path, capsys):
    path, _, _ = small_run()
    before = (path / "parameters.eqx").read_bytes()
    for option in (["--iterations", "10"], ["--data", "moons"], ["--seed", "1"]):
        assert cli.main(["fit", "--out", str(path), "--resume", *option]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and option[0] in error and f"got {option[1]}" in error
    assert cli.main(["fit", "--out", str(path), "--resume", *SMALL]) == 0
    assert (path / "parameters.eqx").read_bytes() == before


@pytest.mark.usefixtures("small_networks")
def test_a_fit_that_has_ended_goes_on_to_more_iterations(tmp_path, capsys, patched):
    """The run says so; what was there stays; it is resumed, also if nothing of the new leg was saved. Before its end it is refused."""
    patched(fit_command.evaluate, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 2)))
    path, resume = tmp_path / "r", ["fit", "--out", str(tmp_path / "r"), "--resume"]
    options = ["--num-steps", "2", "--iterations", "3", "--batch-size", "4"]
    assert cli.main(["fit", "--data", str(tmp_path / "x.npy"), "--out", str(path), *options]) == 130
    run, ended = probdiff.open_run(path), (path / "checkpoint.eqx").read_bytes()
    first, first_parameters = run.losses, (path / "parameters.eqx").read_bytes()
    assert "legs" not in run.config and run.checkpoint.num_iterations == 3
    assert cli.main([*resume, "--iterations", "5"]) == 130
    assert run.config["iterations"] == 5 and run.config["legs"] == [3, 5]
    assert len(run.losses) == 5 and np.array_equal(run.losses[:3], first)
    parameters = (path / "parameters.eqx").read_bytes()
    assert parameters != first_parameters
    for name in ("checkpoint.eqx", "checkpoint.previous.eqx"):
        (path / name).write_bytes(ended)
    assert cli.main(resume) == 130 and (path / "parameters.eqx").read_bytes() == parameters
    capsys.readouterr()
    assert cli.main([*resume, "--iterations", "4"]) == 2
    assert "--iterations: Expected 5, as in the run to resume; got 4" in capsys.readouterr().err
    for name in ("checkpoint.eqx", "checkpoint.previous.eqx"):
        (path / name).unlink()
    assert cli.main([*resume, "--iterations", "9"]) == 2 and run.config["iterations"] == 5
    error = capsys.readouterr().err
    assert "--iterations: Expected 5, as in the run to resume, before it goes on to more; got 9 after 0 iterations" in error


@pytest.mark.release
def test_a_fit_with_minutes_and_then_more(tmp_path, capsys, patched):
    patched(fit_command.evaluate, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(50, 2)))
    path, resume = tmp_path / "r", ["fit", "--out", str(tmp_path / "r"), "--resume"]
    options = ["--num-steps", "2", "--minutes", "0.01", "--batch-size", "4"]
    assert cli.main(["fit", "--data", str(tmp_path / "x.npy"), "--out", str(path), *options]) == 130
    run = probdiff.open_run(path)
    assert run.config["minutes"] == 0.01 and "iterations" not in run.config and run.checkpoint.minutes == 0.01
    count = len(run.losses)
    assert cli.main([*resume, "--minutes", "0.02"]) == 130
    assert run.config["legs"] == [0.01, 0.02] and run.checkpoint.minutes == 0.02 and len(run.losses) > count
    capsys.readouterr()
    assert cli.main([*resume, "--iterations", "5000"]) == 2
    assert "--iterations: Expected None, as in the run to resume; got 5000" in capsys.readouterr().err


BAD = {
    "time and iterations": (["--minutes", "1", "--iterations", "5"], "--minutes: Expected none with --iterations; got 1.0"),
    "no time": (["--minutes", "0"], "--minutes: Expected a positive number; got 0"),
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
    "unknown data": (["--data", "digit"], "data: Expected one of digits, fashion-mnist"),
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
    np.save(path / "images.npy", np.zeros((20, 8, 8)))
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


@pytest.mark.release
@pytest.mark.usefixtures("small_networks")
def test_ten_rows_with_a_constant_first_pixel_to_the_end(tmp_path, capsys, one_way):
    array = np.random.default_rng(0).integers(0, 5, (10, 3)).astype(np.int8)
    array[:, 0] = 4
    np.save(tmp_path / "ten.npy", array)
    options = ["--num-steps", "2", "--iterations", "3", "--batch-size", "4", "--json", "--out", str(tmp_path / "r")]
    assert cli.main(["fit", "--data", str(tmp_path / "ten.npy"), *options]) == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    damaged = (tmp_path / "r" / "checkpoint.eqx").read_bytes()[:500]
    (tmp_path / "r" / "checkpoint.eqx").write_bytes(damaged)
    assert cli.main(["fit", "--out", str(tmp_path / "r"), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoint.eqx: Expected an intact file" in error


@pytest.mark.long
@pytest.mark.usefixtures("small_networks")
def test_resume_passes_over_a_damaged_checkpoint_with_one_line(tmp_path, capsys, patched):
    copy = tmp_path / "copy"
    shutil.copytree(small_run()[0], copy)
    (copy / "checkpoint.previous.eqx").write_bytes((copy / "checkpoint.eqx").read_bytes())
    (copy / "checkpoint.eqx").write_bytes(b"spoiled")
    patched(fit_command.evaluate, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["fit", "--out", str(copy), "--resume"]) == 130
    lines = capsys.readouterr().err.strip().splitlines()
    (warning,) = [line for line in lines if "warning" in line]
    assert warning.startswith("probdiff: warning:") and warning.endswith("going on from checkpoint.previous.eqx")
    assert lines[-1].endswith(f"probdiff fit --out {copy} --resume")


def test_a_config_that_is_not_one_of_probdiff_fit(tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(small_run()[0], copy)
    for change, message in (
        ({"iterations": "many"}, "--iterations: Expected an integer of at least 1; got many"),
        ({"data": None}, "data: Expected one of digits"),
        ({"model": {}}, "Expected the description of a model in config.json; got KeyError"),
    ):
        config = json.loads((small_run()[0] / "config.json").read_text()) | change
        (copy / "config.json").write_text(json.dumps(config))
        assert cli.main(["fit", "--out", str(copy), "--resume"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


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


@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize("agree", [True, False])
def test_the_table_says_what_the_results_say(bits, agree):
    """Every number in the row of its name; of the entropy its negative, to be held against the bound."""

    def row(k):
        more = {"bits_per_dim": k + 0.5, "bits_error": k + 0.75} if bits else {}
        return {"nats": -k - 0.125, "error": k + 0.25} | more

    names = ("prior_kl", "step_kl", "reconstruction", "elbo")
    test = {name: row(k) for k, name in enumerate(names, 10)}
    test["elbo"]["monte_carlo_error"] = 0.0625
    known = {"entropy": {"nats": 17.5, "error": 0.5}, "log_prob": {"nats": -16.5, "error": 0.75}, "gap": {"nats": 3.5, "error": 0.25}}
    two_ways = {"analytic": row(15), "trace_elbo": row(16), "difference": 1.5, "difference_error": 0.375, "detectable": 1.75}
    wrong = [] if agree else ["prior KL", *(f"KL of step {n}" for n in (2, 4, 7))]
    common = {"num_items": 3, "num_terms": 10, "largest": 2e-5, "wrong": wrong} if bits else None
    results = {
        "data": "mine",
        "dim": 6,
        "num_steps": 9,
        "test": {"num_items": 33, "num_evaluations": 64} | test,
        "two_ways": {"num_items": 22, "num_draws": 4, "z": -4.0, "agree": agree, "common_paths": common} | two_ways,
        "reference": {"independent_dimensions": row(14)} if bits else known,
    }
    title, header, *lines = format_fit(results).splitlines()
    assert "mine" in title and "33 items of 6 dimensions" in title and "N = 9 steps" in title
    assert ("bits/dim" in header) is bits and "the first 22 items, 4 draws each" in "\n".join(lines)
    assert "(at 64 random steps of each item: Monte Carlo error of the ELBO 0.0625 nats)" in lines
    labels = ("prior KL", "Σ step KL", "reconstruction", "ELBO")
    rows = [(label, list(test[name].values())[: 4 if bits else 2]) for label, name in zip(labels, names)]
    rows += [("log-likelihood of independent", list(row(14).values()))] if bits else []
    rows += [] if bits else [("minus entropy", [-17.5, 0.5]), ("log p(x)", [-16.5, 0.75]), ("gap", [3.5, 0.25])]
    rows += [("ELBO, analytic", list(row(15).values())), ("ELBO, Trace_ELBO", list(row(16).values()))]
    numbered = [line for line in lines if line[38:].lstrip(" -")[:1].isdigit() and not line.startswith(("(", "they", "THEY"))]
    for (label, numbers), line in zip(rows, numbered[:-1], strict=True):
        assert line.startswith(label) and [float(word) for word in line[38:].split()] == numbers
    assert numbered[-1].startswith("difference")
    assert numbered[-1][38:].split(maxsplit=2) == ["1.5000", "0.3750", "4.0 standard errors"]
    verdict, *seen = lines[-3 if bits else -2 :]
    named = " in prior KL, KL of step 2, KL of step 4 and 1 more" * bits
    assert verdict == ("they agree" if agree else f"THEY DISAGREE{named}")
    assert seen[0] == "a difference of 1.8 nats would have been seen nine times in ten"
    assert seen[1:] == ["on common paths of 3 items the 10 terms differ by 2e-05 nats at most"] * bits
