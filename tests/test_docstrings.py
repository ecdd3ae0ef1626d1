"""The docstrings: the examples of every public name run, its types are there, and it begins with what it is about."""

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
import tempfile

import matplotlib.pyplot as plt
import pytest
from conftest import long_but

import probdiff

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FOUND = [found.name for found in pkgutil.walk_packages(probdiff.__path__, "probdiff.") if not found.name.endswith("__main__")]
MODULES = {name: importlib.import_module(name) for name in ["probdiff", *FOUND]}
PRONOUNS = {"it", "its", "that", "their", "theirs", "they", "those", "what", "whatever", "which"}


def examples(module):
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


OPTIONAL = {"probdiff.networks.host": "torch"}  # the library that an example needs, which may not be installed
WITH_EXAMPLES = [name for name, module in MODULES.items() if examples(module)]
QUICK = [
    "probdiff.chain.forward",
    "probdiff.chain.score",
    "probdiff.datasets",
    "probdiff.elbo.estimate",
    "probdiff.elbo.terms",
    "probdiff.likelihoods.normal",
    "probdiff.oracles.closed_form",
]


# Which take seconds each.
DEAR = [
    "probdiff.chain.predicted",
    "probdiff.diagnostics.agreement",
    "probdiff.diagnostics.audit_result",
    "probdiff.diagnostics.common_paths",
    "probdiff.diagnostics.compare_estimators",
    "probdiff.diagnostics.compare_models",
    "probdiff.diagnostics.datatree",
    "probdiff.diagnostics.estimator_comparison",
    "probdiff.diagnostics.findings",
    "probdiff.diagnostics.gap",
    "probdiff.diagnostics.plots",
    "probdiff.elbo.analytic",
    "probdiff.elbo.importance",
    "probdiff.elbo.random_steps",
    "probdiff.elbo.sampled_terms",
    "probdiff.elbo.score_matching",
    "probdiff.elbo.steps",
    "probdiff.elbo.variance_reduction",
    "probdiff.flow",
    "probdiff.inference.likelihood",
    "probdiff.inference.missing",
    "probdiff.inference.particles",
    "probdiff.inference.twists",
    "probdiff.inference.two_sided",
    "probdiff.networks.context",
    "probdiff.networks.convnet",
    "probdiff.networks.host",
    "probdiff.networks.level_heads",
    "probdiff.networks.unet",
    "probdiff.oracles.networks",
    "probdiff.programs.parallel",
    "probdiff.samplers",
    "probdiff.storage.checkpoint",
    "probdiff.training.fitting",
    "probdiff.training.optimiser",
]


@pytest.mark.long
@pytest.mark.parametrize("name", long_but(QUICK, WITH_EXAMPLES, DEAR))
def test_the_examples_run(name, capsys, monkeypatch, tmp_path):
    """Each in a namespace of its own, as a reader would copy it; nothing is printed that it does not show."""
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in examples(MODULES[name]):
        test.globs = {"__name__": "__main__"}
        runner.run(test)
    plt.close("all")
    assert runner.failures == 0, capsys.readouterr().out
    assert not capsys.readouterr().err


def public(place=probdiff):
    """Every public function and class by the name that it is defined under, from the namespaces."""
    names = getattr(place, "__all__", None)
    if names is None:  # a namespace that is one module
        names = [name for name, value in vars(place).items() if name[0] != "_" and getattr(value, "__module__", "") == place.__name__]
    found = {}
    for value in (getattr(place, name) for name in names):
        if inspect.ismodule(value):
            found |= public(value)
        elif inspect.isclass(value) or inspect.isfunction(value):
            found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


PUBLIC = public()


def test_every_public_name_has_an_example():
    assert len(PUBLIC) > 150
    assert not [name for name, value in PUBLIC.items() if ">>> " not in (value.__doc__ or "")]


# Modules whose names are defined by this package: data, results, files, figures, commands, and interfaces for parts of one's own.
OWN = """cli datasets datasets.covariates datasets.dataset diagnostics.agreement diagnostics.audit_result diagnostics.common_paths diagnostics.compare_estimators
    diagnostics.compare_models diagnostics.contexts diagnostics.datatree diagnostics.estimator_comparison diagnostics.findings diagnostics.gap diagnostics.plots elbo.estimate
    elbo.variance_reduction inference.observations inference.posterior likelihoods.base likelihoods.categorical likelihoods.columns likelihoods.normal
    networks.adapters networks.base networks.context networks.host networks.unet oracles.closed_form presets programs.parallel storage.checkpoint
    storage.run training.fitting training.loop""".split()


def test_every_public_name_has_a_source():
    """The paper, in its own docstring or in that of its module, which its page of the reference has too."""
    cited = re.compile(r"Sources?\b|arXiv:|doi:")

    def has_source(value):
        return any(cited.search(each.__doc__ or "") for each in (value, sys.modules[value.__module__]))

    without = {name for name, value in PUBLIC.items() if not has_source(value)}
    assert not {name for name in without if sys.modules[PUBLIC[name].__module__].__name__.removeprefix("probdiff.") not in OWN}
    assert {PUBLIC[name].__module__.removeprefix("probdiff.") for name in without} == set(OWN)


def functions(name, value):
    """A public function itself; of a class, its constructor and the public methods and properties that it defines, by name."""
    if inspect.isfunction(value):
        return {name: value}
    found = {}
    for key, member in vars(value).items():
        if key[0] == "_" and key not in ("__init__", "__call__"):
            continue
        if isinstance(member, property):
            member = member.fget
        member = getattr(member, "__func__", getattr(member, "method", member))  # of class methods, and of modules of equinox
        if inspect.isfunction(member) and member.__module__ != "typing":
            found[f"{name}.{key}"] = inspect.unwrap(member)
    return found


def has_types(name, function):
    """Whether all parameters, but for the instance or the class, and the result are annotated."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if name not in PUBLIC and parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    return signature.return_annotation is not signature.empty and all(each.annotation is not each.empty for each in parameters)


def test_every_public_function_and_method_has_its_types():
    found = {name: functions(name, value) for name, value in PUBLIC.items()}
    assert sum(map(len, found.values())) > 350
    assert not [name for name, own in found.items() if not all(has_types(*each) for each in own.items())]


def test_docstrings_begin_with_what_they_are_about():
    """Not with a pronoun, which points to somewhere else."""
    found = {}
    for name, value in PUBLIC.items():
        found |= {name: value} | functions(name, value)
    first = {name: (inspect.getdoc(value) or "").split(maxsplit=1)[:1] for name, value in found.items()}
    assert not [name for name, words in first.items() if words and words[0].strip(".,:;").lower() in PRONOUNS]
