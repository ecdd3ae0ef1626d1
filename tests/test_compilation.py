"""The options of XLA."""

import os

import jax
import numpy as np
import pytest

import probdiff
from probdiff import _devices

LEVEL, WIDTH = "--xla_backend_optimization_level=", "--xla_cpu_prefer_vector_width="


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, f"{LEVEL}2 {WIDTH}512"),
        ("--xla_cpu_max_isa=AVX2", f"--xla_cpu_max_isa=AVX2 {LEVEL}2 {WIDTH}512"),
        (f"{LEVEL}3", f"{LEVEL}3 {WIDTH}512"),
        (f"{WIDTH}256 {LEVEL}3", f"{WIDTH}256 {LEVEL}3"),
    ],
)
def test_an_option_that_the_user_has_set_is_kept(monkeypatch, before, after):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if before is not None:
        monkeypatch.setenv("XLA_FLAGS", before)
    _devices.set_compiler_options()
    assert os.environ["XLA_FLAGS"] == after
    assert _devices.compiler_options() == {}


@pytest.fixture(params=["", f"{LEVEL}3 {WIDTH}256"])
def expected(monkeypatch, request):
    """The options that are given to XLA, with and without others in the environment."""
    monkeypatch.setenv("XLA_FLAGS", request.param)
    return {} if request.param else {"xla_backend_optimization_level": 2, "xla_cpu_prefer_vector_width": 512}


DIFFUSION = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=4, num_blocks=1))
X = np.zeros((4, 2)) + np.arange(4)[:, None]


def test_a_fit_in_python_is_compiled_with_the_options_of_the_commands(monkeypatch, expected):
    given, jit = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **options: given.append(options.get("compiler_options")) or jit(f, **options))
    probdiff.fit(DIFFUSION, X, iterations=1, batch_size=2, progress=False)
    assert [each for each in given if each is not None] == [expected] * 3


def test_a_comparison_in_python_is_compiled_with_the_options_of_the_commands(monkeypatch, expected):
    given, compile = [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self, *options: given.extend(options) or compile(self, *options))
    probdiff.compare_estimators(DIFFUSION, X, key=jax.random.key(0), num_draws=2, estimators=["kl_importance"])
    assert given == [expected] * 3  # of the learned probabilities, the values and the gradients
