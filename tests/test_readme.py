"""The README's example runs as it stands there; its commands are the ones that CI runs; the scripts run."""

import re
import runpy
import sys
import warnings
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import long_but

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.long
def test_the_example_runs_as_it_stands():
    jax.config.update("jax_disable_most_optimizations", False)  # it computes more than it compiles
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    terms, result = names["terms"], names["result"]
    assert terms.step_kl.shape == (100, 49, 32) and terms.elbo.shape == (100, 32)
    jax.config.update("jax_disable_most_optimizations", True)
    assert names["drawn"].shape == (500, 2)
    assert result.losses[-10:].mean() < 0.2 * result.losses[:10].mean()
    np.testing.assert_allclose(terms.elbo.mean(), -result.losses[-10:].mean() / 32, rtol=0.2)


def test_each_command_is_one_line_of_a_code_block():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    assert len(blocks) == 2 and all(block.count("\n") == 1 for block in blocks)
    assert all(block.startswith("python3 -m venv .venv && ") for block in blocks)


@pytest.mark.long
def test_an_analysis_runs_in_a_notebook(tmp_path, monkeypatch):
    """The tables, cell by cell; what a cell ends with is shown in a few lines."""
    import nbclient
    import nbformat

    monkeypatch.chdir(tmp_path)
    cells = re.split(r"^# %%.*\n", (ROOT / "analyses" / "tables.py").read_text(), flags=re.M)[1:]
    shown = ["fitted['wine']", "both.terms", "probdiff.to_datatree(both.terms)", "tables['wine'].likelihood()"]
    shown += ["probdiff.fit(fitted['wine'], tables['wine'].train, iterations=2, progress=False)"]
    sources = ["import sys; sys.argv = ['tables.py', '--quick']", *cells, *shown]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for source, cell in zip(shown, notebook.cells[-len(shown) :]):
        (output,) = [each for each in cell.outputs if each.output_type == "execute_result"]
        assert output.data["text/plain"].count("\n") < 40, source
    assert "[tables.py]" in (ROOT / "analyses" / "README.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == 2


SCRIPTS = sorted(path.name for path in (ROOT / "analyses").glob("*.py") if path.name != "tables.py")


@pytest.mark.parametrize("name", long_but(["elbo_derivation.py", "samplers.py"], SCRIPTS))
def test_analyses_run_at_toy_size(name, tmp_path, monkeypatch, capsys):
    script = ROOT / "analyses" / name
    if name == "posterior_estimation.py":
        pytest.importorskip("sbibm_jax", reason="it needs the extra probdiff[frameworks]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--quick"])
    with warnings.catch_warnings():
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            jax.config.update("jax_enable_x64", False)
            plt.close("all")
    assert "nan" not in capsys.readouterr().out
    listed = (ROOT / "analyses" / "README.md").read_text()
    assert f"[{script.name}]" in listed
