"""A table of the user's through the commands: from a file with names to samples with names."""

import json

import jax
import numpy as np
import pandas as pd
import pytest
from cli_runs import small_networks  # noqa: F401 (a fixture)

import probdiff
from probdiff import cli, training
from probdiff.likelihoods import ColumnLikelihood
from probdiff.storage import create_run

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame({
    "size": RNG.normal(5, 2, 60),
    "tree": pd.Categorical(RNG.choice(["oak", "elm"], 60)),
    "age": RNG.integers(20, 60, 60),
})  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run made in Python, of a model that was not trained."""
    data = probdiff.datasets.split(FRAME, name="trees")
    network = probdiff.networks.ColumnHead(probdiff.MLP(4, key=jax.random.key(0), hidden=8, num_blocks=1), data.likelihood())
    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(4, 4.0, -3.0), network, data.likelihood())
    run = create_run(tmp_path_factory.mktemp("runs") / "trees", diffusion, data=data)
    run.save(fit=training.Fit(diffusion.bind({}), np.ones(3), np.zeros((0, 2)), None))
    return run


def test_the_data_of_a_run_keep_names_and_kinds(run):
    data = probdiff.open_run(run.path).data
    assert data.columns == ("size", "tree", "age") and data.describe() == probdiff.datasets.split(FRAME, name="trees").describe()
    assert isinstance(run.diffusion.likelihood, ColumnLikelihood) and run.diffusion.likelihood.columns == data.columns


@pytest.mark.long
def test_samples_have_names_and_labels(run, tmp_path, capsys):
    """In a .csv file, as of any table with names; as numbers in .npy, if asked for."""
    options = ["sample", str(run.path), "--num-samples", "30"]
    assert cli.main([*options, "--json"]) == 0
    path = json.loads(capsys.readouterr().out)["samples"]
    assert path == str(run.path / "samples" / "ancestral-1.csv")
    frame = pd.read_csv(path)
    assert list(frame) == ["size", "tree", "age"] and set(frame["tree"]) == {"oak", "elm"} and frame["age"].dtype.kind == "i"
    assert cli.main([*options, "--out", str(tmp_path / "mine.npy")]) == 0
    drawn = np.load(tmp_path / "mine.npy")
    np.testing.assert_allclose(drawn[:, 0], frame["size"], rtol=1e-6)
    assert [["elm", "oak"][int(code)] for code in drawn[:, 1]] == frame["tree"].tolist()


@pytest.mark.release
@pytest.mark.usefixtures("small_networks")
def test_a_table_is_fitted_and_inspected(tmp_path, capsys):
    """The columns are told before the fit and by inspect; the number of the row is no column."""
    FRAME.assign(tree=(FRAME["tree"] == "oak").astype(int)).set_index(pd.Index(RNG.permutation(60), name="id")).to_csv(tmp_path / "trees.csv")
    out = str(tmp_path / "run")
    fit = ["fit", "--out", out]
    given = ["--data", str(tmp_path / "trees.csv"), "--index", "id", "--num-steps", "4", "--iterations", "4", "--batch-size", "8"]
    assert cli.main([*fit, *given]) == 0
    text = capsys.readouterr().out
    columns = "continuous, with a density: size\n"
    assert columns in text and "2 categories (0, 1): tree" in text and "left out, as it numbers the rows: 'id'" in text
    assert "log-likelihood of independent columns" in text and "N = 4 steps in 4 dimensions" in text and "they agree" in text
    assert cli.main(["inspect", out]) == 0
    assert columns in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == ["loss.png", "pairs.png", "samples.png", "step_kl.png"]
    assert cli.main([*fit, "--resume", "--index", "size"]) == 2
    assert "--index: Expected id, as in the run to resume; got size" in capsys.readouterr().err


def test_a_small_table_is_validated_often_enough_to_stop_early(tmp_path, patched):
    """Twenty times in a fit that is short already: the best in validation is what is kept."""
    seen = {}

    def stop(diffusion, data, **options):
        seen.update(options)
        raise KeyboardInterrupt

    patched(training.fit, stop)
    FRAME.drop(columns="tree").to_csv(tmp_path / "trees.csv", index=False)
    assert cli.main(["fit", "--data", str(tmp_path / "trees.csv"), "--out", str(tmp_path / "run")]) == 130
    assert seen["iterations"] == 500 and seen["validate_every"] == 25
