"""Shared fixtures: float64, and the check that every Monte Carlo test uses.

Most of the time of the tests is compilation, of programs that run for milliseconds. So XLA compiles them without its optimisations,
and all processes of a run share what was compiled.
"""

import gc
import os
import tempfile

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

from probdiff import flow
from probdiff import samplers as sampling
from probdiff.diagnostics import gap as ledger
from probdiff.elbo import terms as elbo

# The same examples in every run: a failure is always that of the change at hand.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

gc.freeze()  # what was imported stays
gc.disable()  # going through all that JAX has traced takes long

Z_MAX = 4.9


@pytest.fixture(autouse=True, scope="module")
def forget():
    """After each module forget what was compiled: it takes memory maps, of which a process may have 65 530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def float64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compiled_anew(monkeypatch):
    """What the package keeps compiled is made anew for the test: it has no bug from before, and keeps none for later."""

    def again(function):
        return eqx.filter_jit(lambda *args, **kwargs: function(*args, **kwargs))

    for module in (elbo, flow, ledger, sampling):
        for name, value in list(vars(module).items()):
            if isinstance(value, type(elbo._evaluate)):
                monkeypatch.setattr(module, name, again(value.__wrapped__))


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
