"""The documentation: pages in Markdown, the scripts of analyses/ as a gallery with what they found, and a reference from the docstrings."""

import inspect
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jupytext
import nbformat

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import probdiff  # noqa: E402

project = "probdiff"
author = "The probdiff developers"
copyright = author
version = release = probdiff.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "results", "README.md"]
html_theme = "pydata_sphinx_theme"
html_title = "probdiff"
html_theme_options = {"show_prev_next": True, "navigation_with_keys": False, "header_links_before_dropdown": 7, "show_toc_level": 2}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {page: [] for page in ("start", "theory", "why", "notebooks/*")}
html_show_sourcelink = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the scripts, and every block of code; the site shows figures that are stored
copybutton_prompt_text = ">>> |\\.\\.\\. "
copybutton_prompt_is_regexp = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autosummary_generate = False  # the pages are written below, a page for each namespace
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
nitpicky = False
suppress_warnings = ["config.cache", "myst.header", "ref.python"]

# The namespaces in the order of the theory, with a description.
NAMESPACES = {
    "probdiff": "The names that are used most.",
    "probdiff.chain": "The two Markov chains: schedules, the forward chain in closed form, reverse kernels and variances.",
    "probdiff.chain.score": "Noise and score.",
    "probdiff.networks": "Networks and heads.",
    "probdiff.likelihoods": "Likelihoods p(x | z₁).",
    "probdiff.programs": "The NumPyro programs, by a scan over the steps or parallel in them.",
    "probdiff.elbo": "The terms of the bound, its estimators, importance weighting, score matching.",
    "probdiff.flow": "The probability flow.",
    "probdiff.training": "Fitting by SVI, and the optimiser.",
    "probdiff.samplers": "Samplers.",
    "probdiff.inference": "A fitted model as a likelihood of its context, and as a prior with evidence.",
    "probdiff.diagnostics": "Agreement of the two ways, comparisons, the decomposition of the gap, audits, DataTrees for ArviZ.",
    "probdiff.plots": "Figures.",
    "probdiff.oracles": "Distributions that are known exactly, with their exact networks.",
    "probdiff.datasets": "Data, splits, covariates.",
    "probdiff.presets": "The models and options of `probdiff fit`.",
    "probdiff.storage": "Run folders and checkpoints.",
    "probdiff.cli": "The command line, for programs that run a command themselves.",
}

# What the public constants are.
CONSTANTS = {
    "probdiff.ESTIMATORS": "Every estimator of the bound by its name: ``ESTIMATORS[name](diffusion, **options)`` is the pair ``(guide, elbo)`` for ``SVI``. An entry of your own is known to ``fit``, ``compare_estimators`` and the commands.",
    "probdiff.programs.PARAMS": "The name of the ``param`` site that holds the parameters of a model in its programs, and the key of ``SVI``'s parameters.",
    "probdiff.datasets.NAMES": "The names that :func:`probdiff.datasets.load` and ``probdiff fit --data`` take in place of a file.",
    "probdiff.datasets.PLANAR": "The two-dimensional sets by name, whose density and exact ε-network are known.",
}


def public_names(module: ModuleType) -> list[str]:
    """The public names that a module has, in its own order; a module without a list of them has those that it defines."""
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return [name for name in names if not isinstance(getattr(module, name), ModuleType)]


def namespace_module(namespace: str) -> ModuleType:
    """The module of a namespace."""
    return probdiff.plots if namespace == "probdiff.plots" else import_module(namespace)


def directive(kind: str, module: str) -> list[str]:
    """The lines that make a module known to references, or the one in which names without a prefix are looked up."""
    return ["```{eval-rst}", f".. py:{kind}:: {module}", "```", ""]


def readable(text: str) -> list[str]:
    """The lines of a page for the docstring of a module: equations and lists of files as they are typed, tables as Markdown, the rest as reStructuredText."""
    lines = []
    for block in re.split(r"\n\n(?=\S)|\n\n(?= {4})", text):
        if block.startswith("|"):
            lines += [block.replace("``", "`"), ""]
        elif block.startswith("    "):
            plain = re.sub(r":\w+:`~?([^`]*)`", r"\1", inspect.cleandoc(block))
            lines += ["```text", plain, "```", ""]
        elif not block.startswith("Imports "):
            lines += ["```{eval-rst}", block, "```", ""]
    return lines


def sources() -> dict[str, dict[str, str]]:
    """For each namespace the docstrings of the modules in it that define public names and say more than a sentence, by module."""
    found: dict[str, dict[str, str]] = {namespace: {} for namespace in NAMESPACES}
    for namespace in NAMESPACES:
        module = namespace_module(namespace)
        defining = [getattr(getattr(module, name), "__module__", None) for name in public_names(module)]
        for name in dict.fromkeys([module.__name__, *(each for each in defining if each and each.startswith("probdiff"))]):
            home = max((each for each in NAMESPACES if f"{name}.".startswith(f"{each}.")), key=len)
            home = "probdiff.plots" if name == "probdiff.diagnostics.plots" else home
            text = inspect.getdoc(sys.modules[name]) or ""
            if "\n\n" in text and name != "probdiff":
                found[home][name] = text
    return found


def write_reference(folder: Path) -> None:
    """A page for each namespace, with every public name of it that is on no page before, and what its modules say of sources and conventions."""
    everyday = {id(getattr(probdiff, name)): name for name in public_names(probdiff)}
    said = sources()
    for namespace, purpose in NAMESPACES.items():
        module = namespace_module(namespace)
        lines = [f"# `{namespace}`", "", *directive("module", namespace), purpose, ""]
        own = said[namespace].pop(module.__name__, "").partition("\n\n")[2]
        lines += readable(own)
        for name in public_names(module):
            value = getattr(module, name)
            if namespace != "probdiff" and id(value) in everyday:
                lines += [f"- `{everyday[id(value)]}`: see [the names that are used most](probdiff.md)", ""]
                continue
            if not callable(value):
                about = "A dict with the keys " + ", ".join(f"``{key}``" for key in value) + "." if isinstance(value, dict) else f"``{value!r}``"
                lines += ["```{eval-rst}", f".. py:data:: {name}", f"   :module: {namespace}", "", f"   {CONSTANTS[f'{namespace}.{name}']} {about}", "```", ""]
                continue
            kind = "class" if inspect.isclass(value) else "function"
            lines += ["```{eval-rst}", f".. auto{kind}:: {namespace}.{name}"]
            lines += (["   :members:", "   :show-inheritance:"] if kind == "class" else []) + ["```", ""]
        lines += ["## Sources and conventions", ""] if said[namespace] else []
        for name, text in said[namespace].items():
            lines += [f"### `{name}`", "", *directive("module", name), *directive("currentmodule", namespace), *readable(text)]
        (folder / f"{namespace}.md").write_text("\n".join(lines))
    listed = "\n".join(NAMESPACES)
    (folder / "index.md").write_text(f"# Reference\n\nEvery public name, with types, shapes, units and an example.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n")


def write_gallery(folder: Path) -> None:
    """A page for each script: its first cell, its stored results, then the script."""
    titles = {}
    for script in sorted((ROOT / "analyses").glob("*.py")):
        notebook = jupytext.read(script, fmt="py:percent")
        if not (notebook.cells and notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")):
            continue
        found = DOCS / "results" / f"{script.stem}.md"
        if found.exists():
            notebook.cells.insert(1, nbformat.v4.new_markdown_cell(f"## Results\n\n{found.read_text()}"))
            notebook.cells.insert(2, nbformat.v4.new_markdown_cell(f"## The script\n\n`python analyses/{script.name}`; `--quick` runs it at toy size."))
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
        nbformat.write(notebook, folder / f"{script.stem}.ipynb")
        titles[script.stem] = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
    first = ["elbo_derivation", "noise_and_score", "samplers"]
    order = first + [stem for stem in titles if stem not in first]
    figures = [next(iter(sorted((DOCS / "figures").glob(f"{stem}*.png"))), None) for stem in order]
    pictures = [f"[![{titles[stem]}](../figures/{figure.name})]({stem}.ipynb)\n\n*{titles[stem]}*" for stem, figure in zip(order, figures) if figure]
    lines = ["# Gallery", "", "Runnable scripts, one question each.", "", "```{toctree}", ":maxdepth: 1", "", *order, "```", ""]
    (folder / "index.md").write_text("\n".join([*lines, *("\n\n".join(pictures).splitlines())]) + "\n")


for name, write in (("reference", write_reference), ("gallery", write_gallery)):
    shutil.rmtree(DOCS / name, ignore_errors=True)
    (DOCS / name).mkdir()
    write(DOCS / name)


def mend_back_links(app, pagename, templatename, context, doctree) -> None:
    """In the sources: links back to the reference by the name that an object has there. viewcode gives all objects of a module the prefix of the first."""
    if pagename.startswith("_modules/"):
        context["body"] = re.sub(r"(reference/(probdiff\.[\w.]+)\.html#)(?!\2\.)probdiff\.", r"\1\2.", context["body"])


def setup(app) -> None:
    """Connect what is mended."""
    app.connect("html-page-context", mend_back_links)
