"""``probdiff sample``."""

import json

import jax
import numpy as np
import pytest
from cli_runs import small_run, unmistakable_runs

import probdiff
from probdiff import cli, samplers

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make


@pytest.mark.long
def test_sample(capsys):
    path, _, _ = small_run()
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


def test_the_samplers_of_the_command_are_those_of_the_package():
    assert cli.SAMPLERS == tuple(samplers.SAMPLERS)


SAMPLE_ERRORS = {
    "sampler": (["--sampler", "ddpm"], "--sampler: invalid choice: 'ddpm' (choose from"),
    "no samples": (["--num-samples", "0"], "--num-samples: Expected an integer of at least 1; got 0"),
    "seed": (["--seed", "-1"], "--seed: Expected an integer of at least 0; got -1"),
    "no steps": (["--sampler", "ddim", "--steps", "0"], "--steps: Expected an integer of at least 1; got 0"),
    "ancestral": (["--steps", "5"], "--steps: Expected none for ancestral, which takes all steps; got 5"),
    "too many": (["--sampler", "ddim", "--steps", "9"], "steps: Expected a number of steps, 1 to 4, or increasing"),
    "suffix": (["--out", "samples.npz"], "out: Expected a file ending in .npy or .csv; got samples.npz"),
}


@pytest.mark.parametrize("case", SAMPLE_ERRORS)
def test_sample_refuses(case, capsys, patched):
    path, (options, message) = small_run()[0], SAMPLE_ERRORS[case]
    patched(samplers._draw_batch, lambda *arguments: pytest.fail("something was compiled"))
    assert cli.main(["sample", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("taken", ["mine.npy", "mine.png"])
def test_sample_overwrites_nothing(tmp_path, capsys, taken):
    (tmp_path / taken).write_text("mine")
    assert cli.main(["sample", str(small_run()[0]), "--out", str(tmp_path / "mine.npy")]) == 2
    assert f"out: Expected a new file; got {tmp_path / taken}, which exists" in capsys.readouterr().err
    assert (tmp_path / taken).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.long
def test_samples_are_of_the_trained_model(capsys, patched):
    """Their moments, against draws in Python."""
    bounds, _ = unmistakable_runs(patched)
    path = list(bounds)[1]
    assert cli.main(["sample", path, "--num-samples", "400", "--json"]) == 0
    run = probdiff.open_run(path)
    samples = [np.load(json.loads(capsys.readouterr().out)["samples"])]
    for diffusion in (run.diffusion, run.untrained.bind({})):
        samples.append(probdiff.samplers.SAMPLERS["ancestral"](diffusion, key=jax.random.key(7), num_samples=400))
    found, trained, initial = (np.concatenate([each, np.square(each)], 1) for each in samples)
    error = np.hypot(found.std(0), trained.std(0)) / 20
    assert np.all(np.abs(found.mean(0) - trained.mean(0)) <= 4.9 * error)
    assert np.any(np.abs(initial.mean(0) - trained.mean(0)) > 9.7 * error)
