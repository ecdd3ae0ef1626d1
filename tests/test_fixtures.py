"""The fixtures that put something else in the place of a part of the package: everywhere, and for one test only."""

import jax
import numpy as np
import pytest
from conftest import COMPILED, compile_anew, patcher, places, release_but, set_constant

import probdiff
from probdiff.networks.base import predict_noise
from probdiff.oracles import GaussianOracle

KEY = jax.random.key(0)
ORACLE = GaussianOracle([0.0, 0.0], 0.25 * np.eye(2))
X = ORACLE.sample(np.random.default_rng(0), 3).astype(np.float32)
SCHEDULE = probdiff.log_snr_schedule(3, 4.0, -3.0)
MODEL = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.9), reverse_variance="optimal", dim=2)

HALF = probdiff.inference.Inpainting(np.array([True, False]), X[0])

# By the name of what is compiled: a figure that comes out of it.
FIGURES = {
    "_evaluate": lambda: probdiff.elbo_terms(MODEL, X, key=KEY).elbo,
    "_to_base": lambda: probdiff.flow.flow_log_prob(MODEL, X),
    "_draw_batch": lambda: probdiff.samplers.ddim(MODEL, key=KEY, num_samples=2),
    "_squared_error": lambda: probdiff.elbo.optimal_variance(MODEL, X, key=KEY).kernel.reverse_variance.squared_error,
    "_steps": lambda: probdiff.inference.smc(MODEL, HALF, key=KEY, num_particles=4).samples,
    "_network_cost": lambda: probdiff.diagnostics.gap_decomposition(MODEL, ORACLE, X, key=KEY).network_per_step,
}


def wrong_noise(*arguments, **options):
    return predict_noise(*arguments, **options) / 2


@pytest.mark.long
@pytest.mark.parametrize("name", release_but(["_evaluate", "_draw_batch"], FIGURES))
def test_what_was_compiled_with_a_bug_is_not_used_afterwards(name):
    """Nor is, with the bug, what was compiled before; without the fixture it would be."""
    figure = FIGURES[name]
    right = np.asarray(figure())
    with pytest.MonkeyPatch.context() as patch:
        patcher(patch)(predict_noise, wrong_noise)
        np.testing.assert_array_equal(figure(), right)
        compile_anew(patch)
        assert np.abs(figure() - right).max() > 1e-3
    np.testing.assert_array_equal(figure(), right)


def test_there_is_a_figure_for_each_folder_that_has_something_compiled():
    folders = {}
    for _, _, compiled in places(lambda value: isinstance(value, COMPILED)):
        function = compiled.__wrapped__
        folders.setdefault(function.__module__.rpartition(".")[0], set()).add(function.__name__)
    assert len(folders) > 1 and all(names & set(FIGURES) for names in folders.values()), folders


def test_a_function_is_replaced_wherever_the_package_has_it(patched):
    held = places(lambda value: value is predict_noise)
    assert len(held) > 2
    for replacement in (wrong_noise, abs):
        patched(predict_noise, replacement)
        assert all(getattr(holder, name) is replacement for holder, name, _ in held)


def test_a_method_is_replaced_in_its_class(patched):
    patched(probdiff.NoiseSchedule.__repr__, lambda self: "a schedule")
    patched(probdiff.NormalLikelihood.encode, lambda self, x: "encoded")
    assert repr(SCHEDULE) == "a schedule" and MODEL.likelihood.encode(X) == "encoded"


def test_a_constant_is_set_wherever_the_package_has_it(constant):
    constant("PARAMS", "other")
    held = places(lambda value: isinstance(value, str) and value == "other")
    assert len(held) > 1 and {name for _, name, _ in held} == {"PARAMS"}


def test_what_the_package_does_not_have_is_refused(patched, constant):
    with pytest.raises(AssertionError, match="has <function wrong_noise"):
        patched(wrong_noise, predict_noise)
    with pytest.raises(AssertionError, match="has NO_CONSTANT"):
        constant("NO_CONSTANT", 1)


def test_afterwards_everything_is_as_before():
    before = {(id(holder), name): value for holder, name, value in places(callable)}
    with pytest.MonkeyPatch.context() as patch:
        compile_anew(patch)
        patcher(patch)(probdiff.NoiseSchedule.__repr__, repr)
        set_constant(patch, "PARAMS", "other")
    assert {(id(holder), name): value for holder, name, value in places(callable)} == before
