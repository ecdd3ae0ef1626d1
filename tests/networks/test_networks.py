"""ε-networks: shapes, the noise level or the step they are told, dropout, and what takes a key."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probdiff
from probdiff._checks import is_trainable
from probdiff.networks.base import takes
from probdiff.oracles import GaussianOracle


def awake(network):
    """A network whose zero-initialised output is not zero."""
    return jax.tree.map(lambda a: a + 0.1 if is_trainable(a) else a, network)


@pytest.mark.long
@pytest.mark.parametrize("batch", [(), (5,), (3, 4)])
@pytest.mark.parametrize("harmonics", [0, 3])
def test_any_batch_shape(batch, harmonics):
    network = awake(probdiff.MLP(3, key=jax.random.key(0), hidden=8, num_harmonics=harmonics))
    z = jax.random.normal(jax.random.key(1), (*batch, 3))
    out = network(z, jnp.full(batch, 2.0))
    assert out.shape == z.shape
    np.testing.assert_allclose(out.reshape(-1, 3)[0], network(z.reshape(-1, 3)[0], jnp.asarray(2.0)), rtol=1e-4)


@pytest.mark.parametrize("build, dim", [(probdiff.MLP, 16), (probdiff.networks.ConvNet, (4, 4)), (probdiff.networks.UNet, (4, 4))])
def test_an_untrained_network_predicts_0(build, dim):
    """Whatever the input and the noise level: a fit begins at the bound of no noise predicted."""
    network = eqx.filter_jit(build(dim, key=jax.random.key(0), num_blocks=1))
    assert not np.any(network(jax.random.normal(jax.random.key(1), (2, 16)), jnp.array([-2.0, 3.0])))


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


def test_the_short_cut_of_covariates_is_a_regression():
    """Without its blocks it can be the exact network of data whose mean is linear in the covariates."""
    oracle = GaussianOracle([0.5, -0.3, 0.1], 0.2 * np.eye(3), [[2.0, 0.0], [0.5, -1.5], [0.3, 1.0]])
    schedule, n = probdiff.NoiseSchedule.from_betas([0.1, 0.2, 0.3]), 2
    alpha_bar = schedule.alpha_bar[n - 1]
    gain = np.sqrt(1 - alpha_bar) / (0.2 * alpha_bar + 1 - alpha_bar)
    network = probdiff.MLP(3, key=jax.random.key(0), hidden=8, num_harmonics=1, context_dim=2)
    gains = np.tile([gain, 0, 0, -np.sqrt(alpha_bar) * gain], 3)
    parts = lambda network: (network.skip.bias, network.regress.weight, network.regress.bias)  # noqa: E731
    network = eqx.tree_at(parts, network, (jnp.asarray(gains), jnp.asarray(oracle.slope), jnp.asarray(oracle.mean)))
    network = eqx.tree_at(lambda network: network.skip.weight, network, jnp.zeros_like(network.skip.weight))
    z, context = jax.random.normal(jax.random.key(1), (4, 3)), jax.random.normal(jax.random.key(2), (4, 2))
    found, exact = (probdiff.Diffusion(schedule, each, dim=3).given(context).predict(z, n) for each in (network, oracle.network(schedule)))
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_dropout_needs_the_key():
    network, z, n = awake(probdiff.MLP(2, key=jax.random.key(0), dropout=0.5)), jnp.ones((6, 2)), jnp.ones(6)
    np.testing.assert_array_equal(network(z, n), network(z, n))
    assert np.any(network(z, n, key=jax.random.key(1)) != network(z, n, key=jax.random.key(2)))


def test_everything_in_the_mlp_is_a_weight_or_a_constant_that_stays():
    network = probdiff.MLP(2, key=jax.random.key(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(network))
    assert probdiff.MLP(**network.arguments, key=jax.random.key(0)).arguments == network.arguments


def test_takes_key():
    assert takes(probdiff.MLP(2, key=jax.random.key(0)), "key")
    assert takes(lambda z, n, *, key=None: z, "key")
    assert not takes(lambda z, n: z, "key") and not takes(lambda z, n, **kwargs: z, "key")


def test_an_ensemble_is_the_mean_of_its_networks():
    """On a schedule that all are told, with a key of its own for each that takes one; its step KLs are at most the mean of theirs."""
    own = [awake(probdiff.MLP(2, key=jax.random.key(seed), hidden=8, num_blocks=1, dropout=0.5)) for seed in (0, 1)]
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


class OfOneExample(eqx.Module):
    """As equinox writes networks: z of shape (dim,), n of shape ()."""

    layer: eqx.nn.Linear
    dropout: eqx.nn.Dropout

    def __call__(self, z, n, *, key=None):
        return self.dropout(self.layer(jnp.concatenate([z, n[None] / 4.0])), key=key, inference=key is None)


def of_one_example(inputs=3):
    return OfOneExample(eqx.nn.Linear(inputs, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5))


def test_a_network_of_one_example_is_named_with_the_remedy():
    """Whether it fails on a batch or gives one result for all of it; inside of a head, too. It keeps its own error as the cause."""
    schedule, z = probdiff.cosine_schedule(4), jnp.ones((5, 2))
    message = r"network: Expected network\(z, n\) with z .* here \(5, 2\); got one for a single example, z of shape \(2,\): give probdiff.networks.batched"
    for network in (of_one_example(), probdiff.networks.VHead(of_one_example())):
        with pytest.raises(ValueError, match=message) as caught:
            probdiff.Diffusion(schedule, network, dim=2).predict_noise(z, 2)
        assert "oncatenat" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match=message):
        probdiff.Diffusion(schedule, lambda z, n: jnp.stack([z.sum(), z.max()]), dim=2).predict_noise(z, 2)
    with pytest.raises(ValueError, match=message):
        probdiff.fit(probdiff.Diffusion(schedule, of_one_example(), dim=2), np.random.default_rng(0).normal(size=(20, 2)), batch_size=5, progress=False)


def of_rows(z, n):
    """A network for one batch axis."""
    assert z.ndim == 2 and n.ndim == 1
    return 0.5 * z / n[:, None]


@pytest.mark.parametrize("network", [of_rows, jax.vmap(of_one_example())], ids=["rows", "vmap"])
def test_a_network_of_one_batch_axis_is_named_and_mapped(network):
    """It works where there is one axis; elsewhere it is refused with the remedy, which works with any number of axes."""
    schedule, z, n = probdiff.cosine_schedule(4), jax.random.normal(jax.random.key(1), (3, 5, 2)), jnp.full((3, 5), 2)
    model = probdiff.Diffusion(schedule, network, dim=2)
    expected = network(z.reshape(15, 2), n.reshape(15)).reshape(z.shape)
    np.testing.assert_allclose(model.predict_noise(z[0], n[0]), expected[0], rtol=1e-6)
    message = r"here \(3, 5, 2\); got one for one batch axis, z of shape \(rows, 2\): give probdiff.networks.batched"
    with pytest.raises(ValueError, match=message):
        model.predict_noise(z, n)
    mapped = probdiff.Diffusion(schedule, probdiff.networks.batched(network), dim=2)
    np.testing.assert_allclose(mapped.predict_noise(z, n), expected, rtol=1e-5)
    with pytest.raises(ZeroDivisionError):
        probdiff.Diffusion(schedule, probdiff.networks.batched(lambda z, n: z / (1 // 0)), dim=2).predict_noise(z, n)


def test_a_network_with_a_mistake_of_its_own_shows_that():
    """It is not taken for one of a single example, and its error is not wrapped."""
    schedule, z = probdiff.cosine_schedule(4), jnp.ones((5, 2))
    with pytest.raises(TypeError, match="oncatenat"):
        probdiff.Diffusion(schedule, of_one_example(4), dim=2).predict_noise(z, 2)
    with pytest.raises(ZeroDivisionError):
        probdiff.Diffusion(schedule, lambda z, n: z / (1 // 0), dim=2).predict_noise(z, 2)
    with pytest.raises(ValueError, match=r"Expected shape \(5, 2\), the shape of z; got \(5, 3\)"):
        probdiff.Diffusion(schedule, lambda z, n: jnp.zeros((*n.shape, 3)), dim=2).predict_noise(z, 2)


@pytest.mark.long
@pytest.mark.parametrize("batch", [(), (5,), (3, 4)])
def test_batched(batch):
    """Example by example; told the step or the noise level as the network is, with its parameters, and dropout for each example."""
    schedule, own = probdiff.cosine_schedule(4), of_one_example()
    network = probdiff.networks.batched(own)
    assert all(a is b for a, b in zip(jax.tree.leaves(network), jax.tree.leaves(own), strict=True))
    z, n = jax.random.normal(jax.random.key(1), (*batch, 2)), jnp.full(batch, 3, jnp.int32)
    model = probdiff.Diffusion(schedule, network, dim=2)
    found = model.predict_noise(z, n)
    assert found.shape == z.shape and model.is_told_step
    for z_i, found_i in zip(z.reshape(-1, 2), found.reshape(-1, 2)):
        np.testing.assert_allclose(found_i, own(z_i, jnp.asarray(3)), rtol=1e-5, atol=1e-6)
    kept = np.asarray(model.predict(jnp.ones((40, 2)), jnp.full(40, 2), jax.random.key(0)) != 0)
    assert 0.2 < kept.mean() < 0.8 and len(np.unique(kept, axis=0)) > 1
    level = probdiff.networks.batched(Level())
    assert level.dim == 2 and not level.is_told_step and network.dim is None
    np.testing.assert_allclose(probdiff.Diffusion(schedule, level).predict_noise(z, n)[..., 0], np.full(batch, schedule.log_snr[2]), rtol=1e-5)
