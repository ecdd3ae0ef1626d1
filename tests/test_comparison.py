"""The comparison of estimators and of models: statistics by another route, verdicts that can be wrong, outputs."""

import json
import shutil
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import probdiff
from probdiff import cli, comparison
from probdiff.estimators import ESTIMATORS
from probdiff.oracles import GaussianOracle, LinearNetwork, exact_terms

pytestmark = pytest.mark.xdist_group("comparison")  # its tests share what is costly to make

ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
SCHEDULE = probdiff.log_snr_schedule(6, 4.0, -1.0)
NAMES = ["trace", "kl_marginal", "kl_uniform", "kl_controlled", "kl_combined"]
X = ORACLE.sample(np.random.default_rng(0), 5).astype(np.float32)


class Scaled(eqx.Module):
    scale: jax.Array
    network: LinearNetwork

    def __call__(self, z, n):
        return self.scale * self.network(z, n)


def make(scale=0.9):
    return probdiff.Diffusion(SCHEDULE, Scaled(jnp.array(scale), ORACLE.network(SCHEDULE)), dim=2)


@pytest.fixture(scope="module")
def result():
    return probdiff.compare_estimators(make(), {}, X, key=jax.random.key(0), num_draws=64, estimators=NAMES)


def test_every_estimator_has_a_row_and_they_agree(result):
    assert list(result.table.index) == NAMES
    assert result.draws.shape == (len(NAMES), 64, 5)
    assert result.agree and result.largest_z < result.z_limit
    closed = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.9))
    exact = exact_terms(closed, X)["elbo"].mean()
    assert np.all(np.abs(result.table["elbo"] - exact) < 4.9 * result.table["se"])
    assert 9.7 * result.table["se"].max() < 2
    np.testing.assert_allclose(result.table["bits_per_dim"], -result.table["elbo"] / (2 * np.log(2)), rtol=1e-12)


def test_costs_by_another_route(result):
    """Variance of the value and of the one gradient, drawn directly; cost relative to kl_uniform."""
    table, diffusion = result.table, make()
    for name in ("trace", "kl_uniform", "kl_marginal"):
        guide, elbo = ESTIMATORS[name](diffusion)

        def one(scale, key, elbo=elbo, guide=guide):
            params = {"diffusion$params": eqx.tree_at(lambda d: d.network.scale, diffusion.trainable(), scale)}
            return -elbo.loss(key, params, diffusion.model, guide, jnp.asarray(X)) / 5

        keys = jax.random.split(jax.random.key(1), 4000)
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(one), (None, 0)))(jnp.array(0.9), keys)
        draws = 64 * 6 // table.loc[name, "evaluations"]
        for variance, ours, count in (
            (values.var(), table.loc[name, "sd"] ** 2, draws),
            (gradients.var(), table.loc[name, "gradient_variance"], table.loc[name, "gradient_draws"]),
        ):
            assert ours == pytest.approx(float(variance), rel=4.9 * np.sqrt(5 / count))
    assert list(table["evaluations"]) == [6, 6, 1, 1, 1]
    cost = table["sd"] ** 2 * table["evaluations"]
    np.testing.assert_allclose(table["value_by_evaluations"], cost / cost["kl_uniform"], rtol=1e-9)
    cost = table["gradient_variance"] * table["gradient_seconds"]
    np.testing.assert_allclose(table["gradient_by_seconds"], cost / cost["kl_uniform"], rtol=1e-9)
    assert result.best("value_by_evaluations") == table["value_by_evaluations"].idxmin()


def test_common_random_numbers(result):
    """Estimators that share their parts share their draws."""
    draws = dict(zip(result.table.index, result.draws))
    uniform, controlled = (draws[name].mean(1) for name in ("kl_uniform", "kl_controlled"))
    assert (uniform - controlled).std() < uniform.std()
    again = probdiff.compare_estimators(
        make(), {}, X, key=jax.random.key(0), num_draws=8, estimators=["kl_marginal", "trace"]
    )
    np.testing.assert_allclose(again.draws[0], draws["kl_marginal"][:8], rtol=1e-4)
    np.testing.assert_allclose(again.draws[1], draws["trace"][:8], rtol=1e-4)


@pytest.mark.parametrize("biased", ["value", "gradient"])
def test_a_biased_estimator_is_found_out(biased, monkeypatch):
    class Biased(probdiff.AnalyticELBO):
        def per_datum(self, key, params, x):
            return super().per_datum(key, params, x) + (0.5 if biased == "value" else 0.0)

        def loss_with_mutable_state(self, *arguments):
            result = super().loss_with_mutable_state(*arguments)
            return result | {"loss": result["loss"] * (1.3 if biased == "gradient" else 1)}

    monkeypatch.setitem(
        ESTIMATORS, "kl_marginal", lambda diffusion: (lambda elbo: (elbo.guide, elbo))(Biased(diffusion))
    )
    result = probdiff.compare_estimators(
        make(0.5), {}, X, key=jax.random.key(0), num_draws=400, estimators=["trace_posterior", "kl_marginal"]
    )
    assert not result.agree and "DO NOT AGREE" in str(result)


def test_z_scores_are_standard_normal_when_all_is_well():
    """By simulation, equal and unequal counts; and exactly the t-test's tail."""
    rng = np.random.default_rng(0)
    for counts in ((8, 8), (8, 40)):
        z = [comparison._z(*(rng.standard_normal((count, 1)) for count in counts))[0] for _ in range(4000)]
        assert np.mean(np.abs(z) > 1.96) < 0.07
    first, second = rng.standard_normal((2, 12, 1))
    z = comparison._z(first, second)[0]
    assert 2 * scipy.stats.norm.sf(abs(z)) == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue[0], rel=1e-4)
    assert comparison._z(np.ones((5, 1)), np.ones((5, 1)) + 1e-7)[0] == pytest.approx(0, abs=0.2)


def test_outputs(result):
    text = str(result)
    assert all(f"\n{name} " in text for name in NAMES) and "Pairwise z-scores, gradients" in text
    assert f"best for values: {result.best('value_by_evaluations')}" in text and "does not measure the gap" in text
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["agree"] is True and len(document["khat"]) == 5
    assert document["estimators"]["trace"]["evaluations"] == 6
    tree = result.to_datatree()
    elbo = tree["posterior"]["elbo"]
    assert elbo.dims == ("chain", "draw", "estimator", "datum") and elbo.attrs["units"] == "nats"
    np.testing.assert_array_equal(elbo.sel(estimator="kl_marginal", chain=0), result.draws[1])
    assert float(tree["table"]["se"].sel(estimator="trace")) == result.table.loc["trace", "se"]
    figure = result.plot()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == NAMES and "nats" in figure.axes[0].get_xlabel()


def test_a_model_without_parameters_and_one_estimator():
    diffusion = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE))
    result = probdiff.compare_estimators(diffusion, {}, X, key=jax.random.key(0), num_draws=2, estimators="kl_marginal")
    assert np.isnan(result.table.loc["kl_marginal", "gradient_variance"]) and result.best("gradient_by_evaluations") is None
    assert "nan" not in str(result) and json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_draws": 1}, "num_draws: Expected at least 2"),
        ({"num_draws": 2.5}, "num_draws: Expected a positive integer; got 2.5"),
        ({"estimators": ["trase"]}, "estimators: Expected names out of trace, .*; got 'trase'"),
        ({"estimators": []}, "estimators: Expected at least one name"),
        ({"x": np.zeros((3, 4), np.float32)}, r"x: Expected shape \(datum, 2\)"),
        ({"diffusion": "digits"}, "diffusion: Expected a Diffusion; got str"),
    ],
)
def test_what_is_not_usable_is_refused(options, message):
    arguments = {"diffusion": make(), "x": X, "num_draws": 4} | options
    with pytest.raises((ValueError, TypeError), match=message):
        probdiff.compare_estimators(params={}, key=jax.random.key(0), **arguments)


def test_models_are_ranked_with_paired_differences():
    """Against the closed form; the paired error is far below that of the two bounds apart."""
    x = ORACLE.sample(np.random.default_rng(1), 300).astype(np.float32)
    models = {name: make(scale) for name, scale in (("worse", 0.7), ("best", 1.0), ("good", 0.95))}
    result = probdiff.compare_models(models, x, key=jax.random.key(0), num_draws=50)
    table = result.table
    assert list(table.index) == ["best", "good", "worse"] and list(table["rank"]) == [0, 1, 2]
    exact = {
        name: exact_terms(probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, scale)), x)["elbo"]
        for name, scale in (("worse", 0.7), ("best", 1.0))
    }
    difference = exact["best"] - exact["worse"]
    row = table.loc["worse"]
    assert row["elbo_diff"] == pytest.approx(difference.mean(), abs=4.9 * row["dse"])
    assert 9.7 * row["dse"] < difference.mean() and row["dse"] < 0.9 * row["se"]
    assert table.loc["best", "elbo_diff"] == 0 and "paired item by item" in str(result)
    with pytest.raises(TypeError, match="models: Expected a dict from name to Diffusion; got list"):
        probdiff.compare_models([make(), make()], x, key=jax.random.key(0))
    with pytest.raises(ValueError, match="models: Expected at least two; got 1"):
        probdiff.compare_models({"one": make()}, x, key=jax.random.key(0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two small runs on the moons, of different N."""
    folder = tmp_path_factory.mktemp("compare")
    paths = []
    for num_steps in (8, 12):
        path = folder / f"N{num_steps}"
        dataset = probdiff.datasets.load("moons")
        network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1)
        diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(num_steps), network, dataset.likelihood())
        run = probdiff.create_run(path, diffusion, {"data": "moons", "seed": 0})
        run.save(fit=probdiff.fit(diffusion, dataset.train, iterations=20, batch_size=16, progress=False))
        paths.append(str(path))
    return paths


def test_the_command(runs, capsys):
    arguments = ["compare", runs[0], "--num-draws", "4", "--estimators", "kl_uniform,kl_combined,trace"]
    assert cli.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert list(document["estimators"]) == ["kl_uniform", "kl_combined", "trace"] and "3/3" in captured.err
    opened = probdiff.open_run(runs[0])
    assert (opened.figures / "estimators.png").exists() and (opened.path / "estimators.nc").exists()
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "best for values" in text and "not from so few draws" in text


def test_what_cannot_be_written_is_shown(runs, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(runs[0], copy)
    shutil.rmtree(copy / "figures", ignore_errors=True)
    (copy / "figures").write_text("a file in the way")
    assert cli.main(["compare", str(copy), "--num-draws", "2", "--estimators", "kl_uniform, kl_marginal"]) == 2
    captured = capsys.readouterr()
    assert "best for values" in captured.out and "figures" in captured.err.splitlines()[-1]


def test_the_command_for_models(runs, capsys):
    assert cli.main(["compare", *runs, "--num-draws", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["models"]) == set(runs) and document["num_draws"] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--estimators", "trase"], "estimators: Expected names out of"),
        (["--num-draws", "1"], "--num-draws: Expected an integer of at least 2; got 1"),
        (["--num-draws", "0"], "--num-draws: Expected an integer of at least 2; got 0"),
    ],
)
def test_the_command_refuses(runs, options, message, capsys, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda *a, **k: pytest.fail("something was compiled"))
    assert cli.main(["compare", runs[0], *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_command_refuses_runs_that_cannot_be_compared(runs, tmp_path, capsys):
    assert cli.main(["compare", runs[0], f"{runs[0]}/"]) == 2
    assert "Expected different runs" in capsys.readouterr().err
    assert cli.main(["compare", *runs, "--estimators", "trace"]) == 2
    assert "--estimators: Expected one run; got 2" in capsys.readouterr().err
    other = tmp_path / "other"
    dataset = probdiff.datasets.load("circles")
    diffusion = probdiff.Diffusion(SCHEDULE, probdiff.MLP(2, key=jax.random.key(0), hidden=8), dataset.likelihood())
    run = probdiff.create_run(other, diffusion, {"data": "circles", "seed": 0})
    run.save(fit=probdiff.fit(diffusion, dataset.train, iterations=1, batch_size=4, progress=False))
    assert cli.main(["compare", runs[0], str(other)]) == 2
    assert "Expected the test data of" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "parameters.npz").write_bytes(b"")
    assert cli.main(["compare", str(tmp_path / "empty")]) == 2
    assert "a config.json without 'model'" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "none")]) == 2
    assert "run: Expected a run folder" in capsys.readouterr().err


def test_arviz_may_be_imported_first():
    """ArviZ leaves a half-loaded NumPyro behind, which ``import numpyro.distributions`` would load a second time."""
    code = "import arviz, probdiff, numpyro; numpyro.distributions.distribution"
    subprocess.run([sys.executable, "-c", code], check=True)
