"""ε-networks: shapes, the noise level or the step they are told, dropout, and what takes a key."""

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
    out = network(z, jnp.full(batch, 2.0))
    assert out.shape == z.shape
    np.testing.assert_allclose(out.reshape(-1, 3)[0], network(z.reshape(-1, 3)[0], jnp.asarray(2.0)), rtol=1e-4)


def test_it_is_told_the_log_snr_of_the_schedule():
    network, z = awake(probdiff.MLP(2, key=jax.random.key(0), hidden=8)), jnp.ones(2)
    a = probdiff.NoiseSchedule.from_betas([0.1, 0.2, 0.3])
    b = probdiff.NoiseSchedule.from_betas([0.28, 0.3, 0.5])  # step 1 of b is as noisy as step 2 of a
    on_a, on_b = (probdiff.Diffusion(s, network) for s in (a, b))
    np.testing.assert_allclose(on_a.predict(z, 2), on_b.predict(z, 1), rtol=1e-5)
    np.testing.assert_allclose(on_a.predict(z, 2), network(z, jnp.asarray(np.log(0.72 / 0.28))), rtol=1e-5)
    assert np.abs(on_a.predict(z, 2) - on_b.predict(z, 2)).max() > 1e-4


class Level(probdiff.networks.AbstractNetwork):
    """The log-SNR that it is told, in every dimension."""

    dim = 2

    def __call__(self, z, log_snr):
        return jnp.broadcast_to(log_snr[..., None], z.shape)


@pytest.mark.parametrize("wrap", [lambda n: n, probdiff.networks.VHead, lambda n: probdiff.networks.Ensemble([n, n])])
def test_a_network_is_told_the_noise_level_and_a_callable_the_step(wrap):
    """Inside of a head or an ensemble, too; only the former can be asked between steps."""
    schedule, z = probdiff.cosine_schedule(6), jnp.zeros((3, 2))
    n = jnp.array([1, 4, 6])
    head = schedule.signal_scale[n - 1] if wrap is probdiff.networks.VHead else np.ones(3)
    for network, expected in ((Level(), schedule.log_snr[n - 1]), (lambda z, n: jnp.broadcast_to(n[..., None], z.shape), n)):
        model = probdiff.Diffusion(schedule, wrap(network), dim=2)
        np.testing.assert_allclose(model.predict_noise(z, n)[:, 0], head * expected, rtol=1e-5)
        assert model.is_told_step == (not isinstance(network, Level))
        if model.is_told_step:
            with pytest.raises(ValueError, match="network: Expected an AbstractNetwork, to be asked between steps; got a function"):
                model.predict_noise_at(z, 0.3)
        else:
            found = model.predict_noise_at(z, 0.3)
            np.testing.assert_allclose(found, 0.3 * (np.sqrt(1 / (1 + np.exp(-0.3))) if head[0] != 1 else 1), rtol=1e-5)


def test_dropout_needs_the_key():
    network, z, n = awake(probdiff.MLP(2, key=jax.random.key(0), dropout=0.5)), jnp.ones((6, 2)), jnp.ones(6)
    np.testing.assert_array_equal(network(z, n), network(z, n))
    assert np.any(network(z, n, key=jax.random.key(1)) != network(z, n, key=jax.random.key(2)))


def test_everything_in_the_mlp_is_a_weight_or_a_constant_that_stays():
    network = probdiff.MLP(2, key=jax.random.key(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(network))
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
    expected = np.mean([model.predict_noise(x, 3) for model in models], 0)
    np.testing.assert_allclose(together.predict_noise(x, 3), expected, rtol=1e-5)
    kls = [probdiff.elbo_terms(model, x, key=jax.random.key(3)).step_kl for model in (together, *models)]
    assert np.all(kls[0] <= np.mean(kls[1:], 0) + 1e-5)
    assert np.any(together.predict(x, 3, jax.random.key(4)) != together.predict(x, 3, jax.random.key(5)))
    other = probdiff.MLP(3, key=jax.random.key(0))
    for networks, got in (([], r"\[\]"), ([1], "1"), ([own[0], other], r"dimensions \[2, 3\]")):
        with pytest.raises(ValueError, match=f"networks: Expected .*{got}"):
            probdiff.networks.Ensemble(networks)
