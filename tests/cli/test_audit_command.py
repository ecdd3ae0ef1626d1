"""``probdiff audit``."""

import json
from pathlib import Path

import jax
import pytest
from cli_runs import unmistakable_runs

import probdiff
import probdiff.cli.audit  # before another test replaces what it imports
from probdiff import cli

pytestmark = pytest.mark.xdist_group("cli")  # its tests share what is costly to make
FEW = ["--num-items", "16", "--num-draws", "2"]


def test_the_audit_of_a_run_is_that_of_its_test_data(capsys, patched):
    path = Path(next(iter(unmistakable_runs(patched)[0])))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert cli.main(["audit", str(path), "--json", *FEW]) == 0
    document = json.loads(capsys.readouterr().out)
    assert cli.main(["audit", str(path), *FEW]) == 0
    text = capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    run = probdiff.open_run(path)
    found = probdiff.audit(run.diffusion, run.data.test[:16], key=jax.random.key(0), num_draws=2)
    assert document == json.loads(json.dumps(found.to_dict())) and text == f"{found}\n"
    assert document["num_items"] == 16 and document["elbo"]["mean"] == pytest.approx(found.elbo.mean)


@pytest.mark.parametrize("options, message", [(["--num-items", "1"], "--num-items: Expected 2 to"), (["--num-draws", "1"], "--num-draws: Expected an integer of at least 2; got 1")])
def test_what_cannot_be_audited_is_refused_in_a_line(options, message, capsys, patched):
    assert cli.main(["audit", next(iter(unmistakable_runs(patched)[0])), *options]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


SCRIPT = """
import jax.numpy as jnp, probdiff
apply = lambda params, z, n: params["scale"] * z
network = probdiff.networks.from_apply(apply, {"scale": jnp.array(0.5)})
model = probdiff.Diffusion(probdiff.cosine_schedule(8), network, dim=2)
"""


def test_a_network_from_elsewhere_is_audited_by_its_script(tmp_path, capsys):
    """On the test split of the data that are named; the model is the one of that name."""
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    assert cli.main(["audit", f"{script}:model", "--data", "moons", "--json", *FEW]) == 0
    document = json.loads(capsys.readouterr().out)
    names = {}
    exec(SCRIPT, names)
    found = probdiff.audit(names["model"], probdiff.datasets.load("moons").test[:16], key=jax.random.key(0), num_draws=2)
    assert document == json.loads(json.dumps(found.to_dict()))


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("mine.py:model", [], "--data: Expected the data of model, a name or a file as for probdiff fit; got none"),
        ("mine.py:network", ["--data", "moons"], "mine.py:network: Expected a Diffusion named network in mine.py; got Partial"),
        ("mine.py:modle", ["--data", "moons"], "Expected a Diffusion named modle in mine.py; got nothing of that name"),
        ("nothing.py:model", ["--data", "moons"], "No such file or directory"),
        ("runs/digits", ["--data", "moons"], "--data: Expected none with a run, which has its own data; got moons"),
    ],
)
def test_a_script_that_does_not_suit_is_refused_in_a_line(model, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCRIPT)
    assert cli.main(["audit", model, *options]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1
