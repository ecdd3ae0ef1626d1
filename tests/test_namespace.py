"""The namespace: what ``import probdiff`` gives, and what it does not import yet."""

import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import subprocess
import sys

import pytest

import probdiff

FOUND = pkgutil.walk_packages(probdiff.__path__, "probdiff.")
PACKAGES = [probdiff, *(importlib.import_module(found.name) for found in FOUND if found.ispkg)]
HEAVY = ("jax", "jaxlib", "numpy", "numpyro", "equinox", "scipy", "sklearn", "matplotlib", "arviz", "xarray", "tqdm")


def python(*arguments):
    environment = os.environ | {"PYTHONPATH": os.path.dirname(probdiff.__path__[0])}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("statement", [
    "import probdiff",
    "import probdiff.cli",
    "from probdiff.cli import main; main(['--help'])",
    "from probdiff.cli import main; main(['fit', '--help'])",
    "from probdiff.cli import main; main(['--version'])",
])  # fmt: skip
def test_nothing_heavy_is_imported(statement):
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit as end:\n    assert not end.code\n"
    out = python("-c", code + f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])")
    assert out.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("module", ["probdiff", "probdiff.cli"])
def test_the_version(module):
    assert python("-m", module, "--version") == f"probdiff {probdiff.__version__}\n" == f"probdiff {importlib.metadata.version('probdiff')}\n"


@pytest.mark.parametrize("name", probdiff.__all__)
def test_a_name_is_there(name):
    """Under the name that it has where it is defined; the dicts have none."""
    value = getattr(probdiff, name)
    assert getattr(value, "__name__", name).rpartition(".")[2] == name


@pytest.mark.long
def test_every_name_is_found_from_a_fresh_start():
    code = "from probdiff import *\nimport probdiff\nprint(sorted(set(probdiff.__all__) - set(globals())))"
    assert python("-c", code) == "[]\n"


def test_only_the_names_are_offered_for_completion():
    assert dir(probdiff) == sorted([*probdiff.__all__, "__version__"]) and len(set(probdiff.__all__)) == len(probdiff.__all__)


def test_there_are_few_everyday_names():
    modules = [name for name in probdiff.__all__ if inspect.ismodule(getattr(probdiff, name))]
    assert len(probdiff.__all__) - len(modules) <= 27


def test_an_unknown_name_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="module 'probdiff' has no attribute 'difusion'"):
        probdiff.difusion  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'difusion' from 'probdiff'"):
        exec("from probdiff import difusion")


def test_a_name_can_be_replaced_and_comes_back(monkeypatch):
    right = probdiff.sandwich
    with monkeypatch.context() as patch:
        patch.setattr(probdiff, "sandwich", None)
        assert probdiff.sandwich is None
    assert probdiff.sandwich is right


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_function_hides_a_module(package):
    for found in pkgutil.iter_modules(package.__path__):
        if found.name == "__main__":
            continue
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        assert getattr(package, found.name) is module
        if package is probdiff and found.name in probdiff.__all__:
            assert probdiff.__getattr__(found.name) is module  # also where it was not imported before


def test_no_public_function_takes_parameters():
    """``Diffusion.bind`` is the only door for those of a model; ``from_apply`` makes a network of those of another library."""
    places = [probdiff, *(module for name in probdiff.__all__ if inspect.ismodule(module := getattr(probdiff, name)))]
    functions = {f for place in places for name, f in vars(place).items() if inspect.isfunction(f) and name[0] != "_"}
    functions |= {f for _, f in inspect.getmembers(probdiff.elbo.AnalyticELBO, inspect.isfunction) if f.__module__.startswith("probdiff")}
    assert len(functions) > 60
    assert [f.__qualname__ for f in functions if "params" in inspect.signature(f).parameters] == ["from_apply"]
