"""The same network written in equinox, Flax NNX, Flax linen, Haiku and PyTorch: equal bounds, equal fits, and what each library has that is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import release_but
from test_diffusion import PUBLIC

import probdiff
from probdiff.datasets.planar import PLANAR
from probdiff.networks.base import takes

pytestmark = pytest.mark.long

HIDDEN, N = 16, 4
SCHEDULE = probdiff.log_snr_schedule(N, 4.0, -3.0)
X = np.random.default_rng(0).normal(size=(6, 2))
KEY = jax.random.key(0)


def weights(hidden=HIDDEN):
    """Of two layers, (inputs, outputs) and (outputs,) each."""
    rng = np.random.default_rng(1)
    return [(rng.normal(size=shape) / np.sqrt(shape[0]), 0.1 * rng.normal(size=shape[1])) for shape in ((3, hidden), (hidden, 2))]


def inputs(z, n):
    """z and the share of the chain, (rows, 3)."""
    return jnp.concatenate([z, n[..., None].astype(z.dtype) / N], -1)


def of_equinox(weights):
    class Net(eqx.Module):
        layers: list

        def __call__(self, z, n):
            first, second = (jax.vmap(layer) for layer in self.layers)
            return second(jax.nn.silu(first(inputs(z, n).reshape(-1, 3)))).reshape(z.shape)

    def layer(w, b):
        own = eqx.nn.Linear(*w.shape, key=KEY)
        return eqx.tree_at(lambda layer: (layer.weight, layer.bias), own, (jnp.asarray(w.T), jnp.asarray(b)))

    return Net([layer(w, b) for w, b in weights])


def of_nnx(weights):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self):
            self.first, self.second = (nnx.Linear(*w.shape, rngs=nnx.Rngs(0)) for w, _ in weights)

        def __call__(self, z, n):
            return self.second(jax.nn.silu(self.first(inputs(z, n))))

    net = Net()
    for layer, (w, b) in zip((net.first, net.second), weights):
        layer.kernel, layer.bias = nnx.Param(jnp.asarray(w)), nnx.Param(jnp.asarray(b))
    return net


def of_linen(weights):
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, z, n):
            return linen.Dense(2)(jax.nn.silu(linen.Dense(len(weights[0][1]))(inputs(z, n))))

    params = {name: {"kernel": w, "bias": b} for name, (w, b) in zip(("Dense_1", "Dense_0"), weights)}
    return probdiff.networks.from_apply(Net().apply, {"params": params})


def of_haiku(weights):
    haiku = pytest.importorskip("haiku")

    def net(z, n):
        return haiku.Linear(2)(jax.nn.silu(haiku.Linear(len(weights[0][1]))(inputs(z, n))))

    params = {name: {"w": w, "b": b} for name, (w, b) in zip(("linear_1", "linear"), weights)}
    return probdiff.networks.from_apply(haiku.without_apply_rng(haiku.transform(net)).apply, params)


def torch_module(weights, dtype=None):
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torch.nn.Linear(*w.shape, dtype=dtype) for w, _ in weights)

        def forward(self, z, n):
            return self.second(torch.nn.functional.silu(self.first(torch.cat([z, n[:, None].to(z.dtype) / N], -1))))

    net = Net()
    with torch.no_grad():
        for layer, (w, b) in zip((net.first, net.second), weights):
            layer.weight.copy_(torch.tensor(w.T))
            layer.bias.copy_(torch.tensor(b))
    return net.eval()


def of_torch(weights):
    torch = pytest.importorskip("torch")
    return probdiff.networks.from_torch(torch_module(weights, torch.float64 if jax.config.jax_enable_x64 else torch.float32))


TRAINED = {"equinox": of_equinox, "NNX": of_nnx, "linen": of_linen, "Haiku": of_haiku}
LIBRARIES = {**TRAINED, "PyTorch": of_torch}


def of(network, **options):
    return probdiff.Diffusion(SCHEDULE, network, dim=2, **options)


@pytest.mark.parametrize("dtype, tolerance", release_but([(np.float64, 1e-10)], [(np.float32, 1e-5), (np.float64, 1e-10)]))
@pytest.mark.parametrize("library", list(LIBRARIES)[1:])
def test_the_same_weights_give_the_same_terms(library, dtype, tolerance):
    """On common noise; as an ε-network, and in a head."""
    noise = np.random.default_rng(2).normal(size=(2, N, 6, 2)).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        for wrap in (lambda network: network, probdiff.networks.VHead):
            terms = [probdiff.elbo_terms(of(wrap(LIBRARIES[name](weights()))), X.astype(dtype), noise=noise) for name in ("equinox", library)]
            for own, other in zip(jax.tree.leaves(terms[0]), jax.tree.leaves(terms[1]), strict=True):
                assert own.dtype == other.dtype == dtype
                np.testing.assert_allclose(other, own, rtol=tolerance)


@pytest.mark.parametrize("library", release_but(list(TRAINED)[1:2], list(TRAINED)[1:]))
def test_moons_are_fitted_to_the_same_gap(library):
    """From the same weights on the same minibatches; the gap is that to the entropy of the data, and has a Monte Carlo error by the noise and the data."""
    data = PLANAR["moons"].sample(np.random.default_rng(0), 4000).astype(np.float32)
    train, held_out = data[:2000], data[2000:]
    schedule = probdiff.log_snr_schedule(20, 6.0, -4.0)

    def gap(name):
        model = probdiff.Diffusion(schedule, TRAINED[name](weights(32)), probdiff.NormalLikelihood.standardized(train), dim=2)
        fit = probdiff.fit(model, train, iterations=400, batch_size=64, learning_rate=1e-2, ema_decay=0.99, progress=False)
        found = [np.asarray(probdiff.elbo_terms(each.bind({}), held_out, key=KEY).elbo[0], np.float64) for each in (model, fit.diffusion)]
        return [PLANAR["moons"].oracle().log_prob(held_out) - elbo for elbo in found]

    (before, own), (_, other) = gap("equinox"), gap(library)
    error = own.std() / np.sqrt(len(own))
    print(f"gap of equinox {own.mean():.4f} ± {error:.4f}, of {library} {other.mean():.4f}, before {before.mean():.2f} nats")
    assert own.mean() < before.mean() / 4 and abs(own.mean() - other.mean()) < 0.1 * error


TORCH = {name for name in PUBLIC if name not in ("flow_log_prob", "flow_likelihood")}


@pytest.mark.parametrize("name", release_but(["ancestral", "elbo_terms", "iwae"], sorted(TORCH)))
def test_every_function_takes_a_module_of_pytorch(name):
    """And gives what it gives of the same network in equinox: bounds, estimators, samplers, programs."""
    there, here = (of(LIBRARIES[library](weights())).bind({}) for library in ("PyTorch", "equinox"))
    for found, expected in zip(*(jax.tree.leaves(PUBLIC[name](d)) for d in (there, here)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.release
def test_the_tables_and_comparisons_take_a_module_of_pytorch():
    model, x = of(of_torch(weights())), X.astype(np.float32)
    tree = probdiff.to_datatree(probdiff.diagnostics.compute_both_ways(model, x, key=KEY, num_draws=4).terms)
    assert np.isfinite(tree["posterior"]["elbo"]).all()
    comparison = probdiff.compare_estimators(model, x, key=KEY, num_draws=20, estimators=["trace", "kl_combined"])
    assert comparison.agree and np.isfinite(comparison.table["elbo"]).all()


def test_a_module_of_pytorch_is_asked_in_its_own_precision_and_for_a_context():
    torch = pytest.importorskip("torch")
    seen = []

    class Net(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))

        def forward(self, z, n, *, context):
            seen.append((z.dtype, n.dtype, context["shift"].dtype, context["label"].dtype))
            return self.scale * z + context["shift"] + context["label"][:, None]

    for dtype in (torch.float32, torch.float64):
        module = Net(dtype).eval()
        network = probdiff.networks.from_torch(module)
        assert takes(network, "context") and not takes(network, "key")
        context = {"shift": X.astype(np.float32), "label": np.arange(6)}
        given = of(network).given(context)
        found = jax.jit(lambda z, given=given: given.predict_noise(z, 2))(X)
        np.testing.assert_allclose(found, 1.5 * X + np.arange(6)[:, None], rtol=1e-6)
        assert found.dtype == np.float32 and set(seen) == {(dtype, torch.int64, dtype, torch.int64)}
        of_function = probdiff.networks.from_torch(module, lambda module, z, n, context: module(z, n, context=context))
        assert takes(of_function, "context") and not takes(probdiff.networks.from_torch(module, lambda module, z, n: z), "context")
        np.testing.assert_array_equal(of(of_function).given(context).predict_noise(X.astype(np.float32), 2), found)
        seen.clear()


def test_a_module_of_pytorch_in_training_mode_is_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"module: Expected one in evaluation mode, module.eval\(\); got training mode"):
        probdiff.networks.from_torch(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()))


@pytest.mark.release
def test_a_network_fitted_in_pytorch_is_audited():
    """Fitted by a loop without any of ours, on 17 × 17 cells of known probability."""
    torch = pytest.importorskip("torch")
    rng, levels = np.random.default_rng(0), 17
    cells = np.stack(np.meshgrid(np.arange(levels), np.arange(levels), indexing="ij"), -1).reshape(-1, 2)
    x0 = cells / 8 - 1
    probability = np.exp(-0.5 * np.einsum("ci,ij,cj->c", x0, np.linalg.inv([[0.16, 0.13], [0.13, 0.16]]), x0))
    probability /= probability.sum()
    draw = lambda size: cells[rng.choice(len(cells), size, p=probability)]  # noqa: E731
    schedule = probdiff.log_snr_schedule(20, 5.0, -4.0)
    module = torch_module(weights(64), torch.float32).train()
    optimiser, data = torch.optim.Adam(module.parameters(), 1e-2), torch.tensor(draw(4096) / 8 - 1, dtype=torch.float32)
    signal, noise = (torch.tensor(table, dtype=torch.float32) for table in (schedule.signal_scale, schedule.noise_scale))
    torch.manual_seed(0)
    for _ in range(1000):
        x, n = data[torch.randint(len(data), (128,))], torch.randint(1, 21, (128,))
        eps = torch.randn_like(x)
        loss = (module(signal[n - 1, None] * x + noise[n - 1, None] * eps, n * N / 20) - eps).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    module.eval()
    network = probdiff.networks.from_torch(module, lambda module, z, n: module(z, n * N / 20))
    diffusion = probdiff.Diffusion(schedule, network, probdiff.DiscretizedNormalLikelihood(levels), dim=2)
    found = probdiff.audit(diffusion, draw(500), key=KEY)
    entropy = -(probability * np.log2(probability)).sum() / 2
    print(f"{found.bits_per_dim.mean:.3f} ± {found.bits_per_dim.error:.3f} bits/dim, entropy {entropy:.3f}; {found.findings}")
    assert not found.findings and found.two_ways.agree and found.two_ways.detectable < 0.5
    assert 0 < found.bits_per_dim.error < 0.1
    assert -4 * found.bits_per_dim.error < found.bits_per_dim.mean - entropy < 1.0


def test_a_module_of_nnx_that_changes_as_it_is_called_is_refused_by_name():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, layer):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), layer])

        def __call__(self, z, n):
            for layer in self.layers:
                z = layer(z)
            return z

    statistics = "network: Expected a module of Flax NNX that has nnx.Param alone; got BatchStat at network.*layers.*mean: .*nnx.split.*from_apply"
    for use in (of, lambda network: of(probdiff.networks.VHead(network)), lambda network: of(lambda z, n: z).with_network(network)):
        dropout = Net(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match=r"network: Expected a module of Flax NNX without dropout; got Dropout at network.*layers.*1.*: module.eval\(\).*reseed"):
            use(dropout)
        dropout.eval()
        assert len(jax.tree.leaves(use(dropout).trainable())) == 2
        with pytest.raises(ValueError, match=statistics):
            use(Net(nnx.BatchNorm(2, rngs=nnx.Rngs(0))))
    module = Net(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    module.eval()
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)  # as the message says
    model = of(probdiff.networks.from_apply(lambda params, z, n: nnx.merge(graphdef, params, rest, copy=True)(z, n), params))
    assert len(jax.tree.leaves(model.trainable())) == 4
    np.testing.assert_allclose(model.predict_noise(X, 2), module(X.astype(np.float32), None), rtol=1e-5, atol=1e-6)


def test_a_module_of_nnx_with_dropout_is_trained_as_the_message_says():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self):
            self.linear, self.drop = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, z, n):
            return self.drop(self.linear(z))

    graphdef, params, rest = nnx.split(Net(), nnx.Param, ...)

    def apply(params, z, n, *, key=None):
        module = nnx.merge(graphdef, params, rest, copy=True)
        module.eval() if key is None else nnx.reseed(module, default=key)
        return module(z, n)

    model = of(probdiff.networks.from_apply(apply, params))
    fitted = probdiff.fit(model, X.astype(np.float32), iterations=2, batch_size=4, progress=False).diffusion
    assert np.any(fitted.network.args[0]["linear"]["kernel"][...] != params["linear"]["kernel"][...])
    z = jnp.ones((40, 2))
    assert 0.2 < (fitted.unbind().predict(z, 2, KEY) == 0).mean() < 0.8 and (fitted.predict(z, 2) != 0).all()


def test_a_module_of_pytorch_is_refused_with_the_remedy_and_any_precision_is_read():
    torch = pytest.importorskip("torch")
    module = torch.nn.Linear(2, 2).eval()
    with pytest.raises(TypeError, match=r"network: Expected a network of JAX; one of PyTorch as probdiff.networks.from_torch\(module\); got Linear"):
        of(module)
    half = of(probdiff.networks.from_torch(torch.nn.Linear(2, 2).eval().bfloat16(), lambda linear, z, n: linear(z)))
    assert half.predict_noise(X.astype(np.float32), 2).dtype == jnp.float32


def test_a_module_of_pytorch_gets_batches_as_small_as_it_likes():
    """As the documentation of ``from_torch`` says to write it."""
    torch = pytest.importorskip("torch")
    seen, module = [], torch.nn.Linear(2, 2).eval()

    def apply(module, z, n):
        seen.append(len(z))
        return module(z)

    pieces = lambda module, z, n: torch.cat([apply(module, a, b) for a, b in zip(z.split(4), n.split(4))])  # noqa: E731
    terms = [probdiff.elbo_terms(of(probdiff.networks.from_torch(module, each)), X, key=KEY, num_draws=3).elbo for each in (pieces, lambda linear, z, n: linear(z))]
    np.testing.assert_allclose(*terms, rtol=1e-5)
    assert max(seen) == 4


@pytest.mark.release
def test_dropout_of_linen_and_haiku_is_on_while_training_only():
    """As the documentation of ``from_apply`` says to write it."""
    linen, haiku = pytest.importorskip("flax.linen"), pytest.importorskip("haiku")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, z, n, dropped=False):
            return linen.Dropout(0.5)(linen.Dense(2)(z), deterministic=not dropped)

    def net(z, n, dropped=False):
        out = haiku.Linear(2)(z)
        return haiku.dropout(haiku.next_rng_key(), 0.5, out) if dropped else out

    module, transformed, z, n = Net(), haiku.transform(net), jnp.ones((20, 2)), jnp.ones(20, jnp.int32)
    for network in (
        probdiff.networks.from_apply(
            lambda params, z, n, *, key=None: module.apply(params, z, n, key is not None, rngs=None if key is None else {"dropout": key}), module.init(KEY, z, n)
        ),
        probdiff.networks.from_apply(lambda params, z, n, *, key=None: transformed.apply(params, key, z, n, key is not None), transformed.init(KEY, z, n)),
    ):
        model = of(network)
        dropped = np.asarray(model.predict(z, 2, KEY)) == 0
        assert 0.2 < dropped.mean() < 0.8 and np.all(model.predict(z, 2) != 0)
        assert probdiff.fit(model, X, iterations=2, batch_size=3, progress=False).skipped_updates == 0
