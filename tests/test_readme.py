"""The examples of README and documentation run as they stand there; the README's commands are the ones that CI runs; the scripts run."""

import re
import runpy
import sys
import warnings
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import forget, long_but

import probdiff

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(path):
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.S | re.M)


def run(path):
    """Run the blocks of a page one after the other; what they have left."""
    names = {}
    for block in blocks(path):
        exec(compile(block, str(path), "exec"), names)
    plt.close("all")
    return names


@pytest.mark.release
def test_the_examples_of_the_first_steps_run_as_they_stand():
    names = run(ROOT / "docs" / "start.md")
    terms, result = names["terms"], names["result"]
    assert terms.step_kl.shape == (20, 19, 32) and terms.elbo.shape == (20, 32)
    assert names["drawn"].shape == (500, 2)
    assert result.losses[-10:].mean() < 0.2 * result.losses[:10].mean()
    np.testing.assert_allclose(terms.elbo.mean(), -result.losses[-10:].mean() / 32, rtol=0.2)


PAGES = [path for path in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")]) if blocks(path) and path.name != "start.md"]


DEAR_PAGES = [path for path in PAGES if path.stem in ("arviz", "conditional", "data", "devices", "estimators", "foreign", "priors", "score")]


@pytest.mark.long
@pytest.mark.parametrize("path", long_but([ROOT / "docs" / "theory.md"], PAGES, DEAR_PAGES), ids=lambda path: path.stem)
def test_the_blocks_of_a_page_run(path):
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        run(path)


@pytest.mark.release
def test_the_notebook_for_a_class_runs(monkeypatch, tmp_path):
    import nbclient
    import nbformat

    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "diffusion_in_forty_minutes.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()


def test_every_link_of_the_pages_leads_somewhere():
    """Links between files of the repository; the gallery and the reference are written when the site is built."""
    missing, names = [], {path.stem for path in (ROOT / "analyses").glob("*.py")} | {"index"}
    for path in [*ROOT.glob("*.md"), ROOT / "analyses" / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")]:
        if {"gallery", "reference", "_build"} & set(path.parts):
            continue
        prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
            generated = re.search(r"gallery/(\w+)\.ipynb$|(gallery|reference)/index\.md$", target)
            there = generated[1] in names if generated and generated[1] else generated or target.startswith("http") or (path.parent / target).exists()
            missing += [] if there else [f"{path.relative_to(ROOT)}: {target}"]
    assert not missing


def test_the_parts_of_a_user_are_short_and_shown():
    page = (ROOT / "docs" / "guides" / "own_parts.md").read_text()
    for path in (ROOT / "docs" / "own_parts").glob("*.py"):
        assert f"literalinclude}} ../own_parts/{path.name}" in page and path.read_text().count("\n") < 40


def test_every_finding_is_of_a_script():
    stems = {path.stem for path in (ROOT / "analyses").glob("*.py")}
    assert {path.stem for path in (ROOT / "docs" / "results").glob("*.md")} <= stems
    assert README.count("\n") <= 120


def test_the_citation_is_of_this_version():
    (version,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert version == probdiff.__version__


def test_each_command_is_one_line_of_a_code_block():
    commands = re.findall(r"```sh\n(.*?)```", README, re.S)
    assert len(commands) == 2 and all(command.count("\n") == 1 for command in commands)
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)


@pytest.mark.release
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


SCRIPTS = sorted(path.name for path in (ROOT / "analyses").glob("*.py"))
ALWAYS = ["elbo_derivation.py", "samplers.py"]
DEAR = ["arviz_examples.py", "benchmark.py", "classification.py", "conditional.py", "crash.py", "crossing.py", "efficiency.py", "fitted_evidence.py"]
DEAR += ["flow_likelihood.py", "image_options.py", "images.py", "inpainting.py", "inverse_problems.py", "likelihood.py", "mutations.py"]
DEAR += ["noise_and_score.py", "posterior_estimation.py", "prior_in_a_program.py", "schedules.py", "tables.py"]


@pytest.mark.long
@pytest.mark.parametrize("name", long_but(ALWAYS, SCRIPTS, DEAR))
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
            forget()  # a script compiles hundreds of programs
    assert "nan" not in capsys.readouterr().out
    listed = (ROOT / "analyses" / "README.md").read_text()
    assert f"[{script.name}]" in listed
