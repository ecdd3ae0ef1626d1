"""ε-networks: shapes, the step they are told, dropout, and what takes a key."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probdiff
from probdiff._checks import is_trainable
from probdiff.networks.base import takes_key


def awake(network):
    """A network whose zero-initialised output is not zero."""
    return jax.tree.map(lambda a: a + 0.1 if is_trainable(a) else a, network)


@pytest.mark.parametrize("batch", [(), (5,), (3, 4)])
@pytest.mark.parametrize("harmonics", [0, 3])
def test_any_batch_shape(batch, harmonics):
    network = awake(probdiff.MLP(3, key=jax.random.key(0), hidden=8, num_harmonics=harmonics))
    z = jax.random.normal(jax.random.key(1), (*batch, 3))
    n = jnp.full(batch, 2, jnp.int32)
    out = network(z, n)
    assert out.shape == z.shape
    np.testing.assert_allclose(out.reshape(-1, 3)[0], network(z.reshape(-1, 3)[0], jnp.int32(2)), rtol=1e-4)


def test_it_is_told_the_log_snr_of_the_schedule():
    network, z = awake(probdiff.MLP(2, key=jax.random.key(0), hidden=8)), jnp.ones(2)
    a = probdiff.NoiseSchedule.from_betas([0.1, 0.2, 0.3])
    b = probdiff.NoiseSchedule.from_betas([0.28, 0.3, 0.5])  # step 1 of b is as noisy as step 2 of a
    on_a, on_b = (probdiff.Diffusion(s, network).network for s in (a, b))
    np.testing.assert_allclose(on_a(z, jnp.int32(2)), on_b(z, jnp.int32(1)), rtol=1e-5)
    assert np.abs(on_a(z, jnp.int32(2)) - on_b(z, jnp.int32(2))).max() > 1e-4
    assert np.abs(network(z, jnp.int32(2)) - network(z, jnp.int32(9))).max() > 1e-4


def test_dropout_needs_the_key():
    network, z, n = awake(probdiff.MLP(2, key=jax.random.key(0), dropout=0.5)), jnp.ones((6, 2)), jnp.ones(6, int)
    np.testing.assert_array_equal(network(z, n), network(z, n))
    assert np.any(network(z, n, key=jax.random.key(1)) != network(z, n, key=jax.random.key(2)))


def test_everything_in_the_mlp_is_a_weight_or_a_constant_that_stays():
    network = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0))).network
    trained = eqx.filter(network, is_trainable)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trained))
    assert trained.embed.schedule is None and trained.dropout.p is None
    assert probdiff.MLP(**network.arguments, key=jax.random.key(0)).arguments == network.arguments


def test_takes_key():
    assert takes_key(probdiff.MLP(2, key=jax.random.key(0)))
    assert takes_key(lambda z, n, *, key=None: z) and takes_key(lambda z, n, **kwargs: z)
    assert not takes_key(lambda z, n: z)


def test_an_ensemble_is_the_mean_of_its_networks():
    """On a schedule that all are told, with a key of its own for each that takes one; its step KLs are at most the mean of theirs."""
    own = [awake(probdiff.MLP(2, key=jax.random.key(seed), hidden=8, dropout=0.5)) for seed in (0, 1)]
    schedule, x = probdiff.cosine_schedule(6), jax.random.normal(jax.random.key(2), (5, 2))
    models = [probdiff.Diffusion(schedule, network, dim=2).bind({}) for network in (*own, lambda z, n: z)]
    together = probdiff.Diffusion(schedule, probdiff.networks.Ensemble([*own, lambda z, n: z])).bind({})
    n = jnp.full(5, 3)
    expected = np.mean([model.network(x, n) for model in models], 0)
    np.testing.assert_allclose(together.network(x, n), expected, rtol=1e-5)
    kls = [probdiff.elbo_terms(model, x, key=jax.random.key(3)).step_kl for model in (together, *models)]
    assert np.all(kls[0] <= np.mean(kls[1:], 0) + 1e-5)
    dropped = together.network(x, n, key=jax.random.key(4))
    assert np.any(dropped != together.network(x, n, key=jax.random.key(5)))
    other = probdiff.MLP(3, key=jax.random.key(0))
    for networks, got in (([], r"\[\]"), ([1], "1"), ([own[0], other], r"dimensions \[2, 3\]")):
        with pytest.raises(ValueError, match=f"networks: Expected .*{got}"):
            probdiff.networks.Ensemble(networks)
