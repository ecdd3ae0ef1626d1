"""``probdiff posterior``."""

import json

import jax
import numpy as np
import pytest
from cli_runs import small_run, unmistakable_runs

import probdiff
from probdiff import cli, inference
from probdiff.cli import posterior as posterior_module
from probdiff.cli.posterior import read_observation

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make


def half_of_an_image(path):
    """The upper half of a digit, and NaN."""
    image = probdiff.datasets.load("digits").test[0].astype(float)
    image[32:] = np.nan
    np.save(path, image.reshape(8, 8))
    return image


@pytest.mark.release
def test_half_of_an_image(tmp_path, capsys, monkeypatch):
    run, titles, draw = small_run()[0], [], posterior_module.plot_samples
    monkeypatch.setattr(posterior_module, "plot_samples", lambda *given: titles.extend(ax.get_title() for ax in draw(*given).axes) or draw(*given))
    image = half_of_an_image(tmp_path / "half.npy")
    assert cli.main(["posterior", str(run), "--observe", str(tmp_path / "half.npy"), "--particles", "8", "--runs", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    with np.load(document["posterior"]) as file:
        found = dict(file)
    assert found["samples"].shape == (16, 64) and found["log_weights"].shape == (16,) and found["ess"].shape == (4,)
    np.testing.assert_array_equal(found["samples"][:, :32], np.broadcast_to(image[:32], (16, 32)))
    assert document["log_evidence"] == pytest.approx(float(found["log_evidence"])) and document["ess"] == pytest.approx(found["ess"].tolist())
    assert (run / "posteriors" / "posterior-1.png").stat().st_size > 5_000
    assert [title.split(" (")[0] for title in titles] == ["observed pixels", "samples of the posterior"]
    opened = probdiff.open_run(run).diffusion
    mask = np.arange(64) < 32
    expected = inference.smc(
        opened, inference.Inpainting(mask, np.where(mask, image, 0).astype(int)), key=jax.random.key(0), num_particles=8, num_runs=2
    )
    assert document["log_evidence"] == pytest.approx(expected.log_evidence) and document["log_evidence_error"] == pytest.approx(expected.log_evidence_error)


def test_a_linear_observation_and_a_table(tmp_path, capsys, patched):
    bounds, _ = unmistakable_runs(patched)
    run = next(iter(bounds))
    linear = {"matrix": np.array([[1.0, 2.0]]), "y": np.array([0.5]), "scale": np.array(0.3)}
    np.savez(tmp_path / "linear.npz", **linear)
    options = ["--particles", "16", "--runs", "1", "--twist", "none", "--seed", "3"]
    assert cli.main(["posterior", run, "--observe", str(tmp_path / "linear.npz"), *options]) == 0
    text = capsys.readouterr().out
    fitted = probdiff.open_run(run).diffusion
    expected = inference.smc(fitted, inference.LinearGaussian(**linear), key=jax.random.key(3), num_particles=16, twist="none")
    assert f"log p(y) of the model: {expected.log_evidence:.4f} nats" in text and "16 particles in 1 run, 2 dimensions" in text
    (tmp_path / "row.csv").write_text("a,b\n0.25,\n")
    assert cli.main(["posterior", run, "--observe", str(tmp_path / "row.csv"), "--particles", "8", "--json"]) == 0
    with np.load(json.loads(capsys.readouterr().out)["posterior"]) as file:
        np.testing.assert_allclose(file["samples"][:, 0], 0.25)


def test_columns_are_found_by_their_names(tmp_path):
    x = np.arange(12.0).reshape(6, 2)
    dataset = probdiff.datasets.Dataset("table", x, x, x, columns=("height", "weight"))
    for text in ("height,weight\n,70\n", "weight,height\n70,\n", "age,weight\n3,70\n"):
        (tmp_path / "row.csv").write_text(text)
        observation = read_observation(tmp_path / "row.csv", dataset)
        assert observation.mask.tolist() == [False, True] and observation.values[1] == 70.0, text
    (tmp_path / "row.csv").write_text("age,size\n3,70\n")
    with pytest.raises(ValueError, match="--observe: Expected some of the columns height, weight; got age, size"):
        read_observation(tmp_path / "row.csv", dataset)


REFUSED = {
    "no file": (["--observe", "nowhere.npz"], "--observe: Expected a .npz file with matrix, y and scale"),
    "no observation": ([], "the following arguments are required: --observe"),
    "a twist": (["--observe", "half.npy", "--twist", "tweedy"], "--twist: invalid choice: 'tweedy'"),
    "no particles": (["--observe", "half.npy", "--particles", "0"], "--particles: Expected an integer of at least 1; got 0"),
    "too few values": (["--observe", "few.npy"], "--observe: Expected 64 values, of one datum; got shape (3,)"),
    "everything": (["--observe", "all.npy"], "mask: Expected at least one hidden coordinate"),
    "nothing": (["--observe", "none.npy"], "mask: Expected at least one observed coordinate"),
    "half a level": (["--observe", "half_level.npy"], "--observe: Expected levels, which are integers; got [0.5]"),
    "off the grid": (["--observe", "off.npy"], "x: Expected levels 0 … 16; got 99"),
    "a context": (["--observe", "half.npy", "--context", "7"], "--context: Expected none, for a model without; got 7"),
    "text": (["--observe", "text.csv"], "--observe: Expected numbers, and NaN or nothing where nothing is known; got text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path, capsys, monkeypatch, patched):
    run, (options, message) = str(small_run()[0].resolve()), REFUSED[case]
    monkeypatch.chdir(tmp_path)
    image = half_of_an_image("half.npy")
    files = {"few": np.ones(3), "all": np.ones(64), "none": np.full(64, np.nan), "half_level": np.where(np.isnan(image), image, 0.5), "off": np.where(np.isnan(image), image, 99)}
    for name, array in files.items():
        np.save(f"{name}.npy", array)
    (tmp_path / "text.csv").write_text("a,b\nred,1\n")
    patched(inference.particles._steps, lambda *arguments: pytest.fail("something was compiled"))
    assert cli.main(["posterior", run, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_twists_of_the_command_are_those_of_the_package():
    assert cli.TWISTS == tuple(inference.twists.TWISTS)
