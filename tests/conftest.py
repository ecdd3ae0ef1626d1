"""Shared fixtures: float64, other parts in the place of the package's, and the check that every Monte Carlo test uses.

Most of the time of the tests is compilation, of programs that run for milliseconds. So XLA compiles them without its
optimisations, and all processes of a run share what was compiled.
"""

import functools
import gc
import importlib.util
import inspect
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="probdiff-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import equinox as eqx
import hypothesis
import jax
import numpy as np
import pytest

import probdiff
from probdiff.chain.reverse import NoiseMoments, SampledStep

# The same examples in every run: a failure is always that of the change at hand.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

for _name in probdiff.__all__:
    getattr(probdiff, _name)  # A test can then forbid to compile without forbidding an import.

gc.freeze()  # what was imported stays
gc.disable()  # going through all that JAX has traced takes long

Z_MAX = 4.9
COMPILED = type(eqx.filter_jit(lambda: None))


@functools.cache
def own_part(name):
    """The script of that name in docs/own_parts, as a module; what it adds to the estimators is taken out again."""
    path = Path(__file__).parent.parent / "docs" / "own_parts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"own_{name}", path)
    module = importlib.util.module_from_spec(spec)
    before = dict(probdiff.ESTIMATORS)
    spec.loader.exec_module(module)
    module.added = {name: probdiff.ESTIMATORS.pop(name) for name in set(probdiff.ESTIMATORS) - set(before)}
    return module


@pytest.fixture(scope="module")
def own_estimator():
    """The estimator of docs/own_parts is among the others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, estimator in own_part("estimator").added.items():
            patch.setitem(probdiff.ESTIMATORS, name, estimator)
        yield


def long_but(quick, cases, release=()):
    """``cases`` for parametrize: those in ``quick`` always run, those in ``release`` before a release, the others are among the long proofs."""
    cases, quick, release = list(cases), list(quick), list(release)
    unknown = [each for each in quick + release if each not in cases]
    assert not unknown, f"not among the cases: {unknown}"
    marks = {True: pytest.mark.release, False: pytest.mark.long}
    return [
        pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=[] if each in quick else marks[each in release])
        for each in cases
    ]


def release_but(kept, cases):
    """``cases`` for parametrize: those that are not in ``kept`` run before a release."""
    cases = list(cases)
    return long_but(kept, cases, [each for each in cases if each not in kept])


def forget():
    """Forget what was compiled, when it has come to take half of the 65 530 memory maps of a process."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def forget_after_a_module():
    yield
    forget()


@pytest.fixture
def float64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


def modules_of_the_package():
    """The modules of the package that are loaded."""
    return [module for name, module in list(sys.modules.items()) if f"{name}.".startswith("probdiff.")]


def places(wanted):
    """Where the loaded modules of the package and their classes hold something ``wanted``: (holder, name, value)."""
    holders = {id(module): module for module in modules_of_the_package()}
    for module in list(holders.values()):
        for value in vars(module).values():
            if inspect.isclass(value) and f"{value.__module__}.".startswith("probdiff."):
                holders[id(value)] = value
    found = []
    for holder in holders.values():
        # (What a class says of an attribute may be a wrapper around the function.)
        values = [(name, getattr(holder, name, None)) for name in list(vars(holder))]
        found += [(holder, name, value) for name, value in values if wanted(value)]
    return found


def compile_anew(monkeypatch):
    """Make anew what the package keeps compiled by ``eqx.filter_jit``, which is found by its function."""

    def again(function):
        return eqx.filter_jit(lambda *args, **kwargs: function(*args, **kwargs))

    new = {}
    for holder, name, compiled in places(lambda value: isinstance(value, COMPILED)):
        monkeypatch.setattr(holder, name, new.setdefault(id(compiled), again(compiled.__wrapped__)))


def patcher(monkeypatch):
    """A function that puts a replacement in the place of a function or a method, wherever the package has it.

    It is found under whatever name, but not in tables. Of several replacements of the same function, the last counts.
    """
    found = {}

    def patch(function, replacement):
        if function not in found:
            found[function] = places(lambda value: value is function)
            assert found[function], f"no loaded module of the package has {function}"
        for holder, name, _ in found[function]:
            monkeypatch.setattr(holder, name, replacement)

    return patch


def set_constant(monkeypatch, name, value):
    """Set a constant in every module of the package that has one of that name."""
    held = [module for module in modules_of_the_package() if name in vars(module)]
    assert held, f"no loaded module of the package has {name}"
    for module in held:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def compiled_anew(monkeypatch):
    """What the package keeps compiled is made anew: it has no bug from before, and keeps none for later."""
    compile_anew(monkeypatch)


@pytest.fixture
def patched(monkeypatch):
    """A function ``patched(function, replacement)``; see :func:`patcher`."""
    return patcher(monkeypatch)


@pytest.fixture
def constant(monkeypatch):
    """A function ``constant(name, value)``; see :func:`set_constant`."""
    return lambda name, value: set_constant(monkeypatch, name, value)


def sampled_step(eps, eps_hat, n):
    """Latents in which there is the noise ``eps`` and ``eps_hat`` is predicted, for the KL of a Gaussian step."""
    return SampledStep(None, eps, n, None, NoiseMoments(eps, 0.0), eps_hat, None)


def assert_mean(draws, expected, power=None):
    """Assert that the mean over axis 0 is within 4.9 standard errors of ``expected``.

    ``power``: the discrepancy that the test exists to catch; 9.7 standard errors must be smaller.
    """
    draws = np.asarray(draws, np.float64)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    z = np.abs(draws.mean(0) - expected) / error
    assert np.all(z <= Z_MAX), f"z = {z.max():.2f}"
    if power is not None:
        assert np.all(9.7 * error < power), f"9.7 standard errors are {9.7 * error.max():.3g}, not below {power}"
