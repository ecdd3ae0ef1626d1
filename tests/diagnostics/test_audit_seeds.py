"""``probdiff.audit`` on networks of several seeds, exact, briefly fitted and well fitted: nothing is named that is not there."""

import functools

import jax
import numpy as np
import pytest
from audit_networks import DIM, OPTIONS, ORACLE, RANGES, SCHEDULE, broken
from conftest import release_but

import probdiff

pytestmark = pytest.mark.long
BRIEFLY, WELL = 150, 4000
IN_THE_ARRAYS = ["coupled batch", "output not finite", "predicts no noise"]  # whatever the network is


@functools.cache
def network(iterations, seed):
    """A network that was fitted to the oracle's data, or the oracle's own for no iterations."""
    if not iterations:
        return ORACLE.network(SCHEDULE)
    mlp = probdiff.MLP(DIM, key=jax.random.key(seed), hidden=32, num_blocks=2)
    model = probdiff.Diffusion(SCHEDULE, mlp, probdiff.NormalLikelihood())
    x = ORACLE.sample(np.random.default_rng(1000 + seed), 4000).astype(np.float32)
    options = {"iterations": iterations, "learning_rate": 2e-3, "key": jax.random.key(seed), "progress": False}
    return probdiff.fit(model, x, **options).diffusion.network


def audited(iterations, seed, options=None, change=(1.0, 0.0)):
    x = ORACLE.sample(np.random.default_rng(seed), 256).astype(np.float32)
    model = broken(**({} if options is None else options), network=network(iterations, seed))
    return probdiff.audit(model, (x * change[0] + change[1]).astype(np.float32), key=jax.random.key(seed))


SOUND = [*((0, seed) for seed in range(20)), *((BRIEFLY, seed) for seed in range(20)), (WELL, 0), (WELL, 1)]


@pytest.mark.parametrize("iterations, seed", release_but(SOUND[:4], SOUND))
def test_nothing_is_named_on_a_sound_network(iterations, seed):
    found = audited(iterations, seed)
    assert not found.findings and abs(found.two_ways.z) < 4.9 and found.two_ways.common.agree


@pytest.mark.release
@pytest.mark.parametrize("fault", [fault for fault in OPTIONS if fault not in IN_THE_ARRAYS])
def test_a_fault_is_named_on_a_fitted_network(fault):
    names = [each.name for each in audited(WELL, 0, OPTIONS[fault]).findings]
    assert names == [fault.partition(":")[0]]


@pytest.mark.release
@pytest.mark.parametrize("change", ["half", "a shift", "not standardised"])
def test_another_range_is_named_on_a_fitted_network(change):
    found = audited(WELL, 0, change=RANGES[change])
    assert [each.name for each in found.findings] == ["range of the data"]
