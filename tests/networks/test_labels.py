"""Labels, dropped contexts and guidance, against what is computed by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_mean, release_but
from numpyro.infer import Predictive

import probdiff
from probdiff.networks import CategoricalHead, ContextDropout, Embedding, unconditional
from probdiff.oracles import GaussianOracle

KEY = jax.random.key(0)
SCHEDULE = probdiff.log_snr_schedule(8, 6.0, -5.0)
RNG = np.random.default_rng(0)
LABELS = np.array([2, 0, 1, 1, 0])
X = RNG.normal(size=(5, 2)).astype(np.float32)


class Echo(eqx.Module):
    """Predicts its context, plus what is 0."""

    weight: jax.Array = eqx.field(default_factory=lambda: jnp.ones(2))
    dim: int = 2
    context_dim: int = 2

    def __call__(self, z, n, *, context):
        return self.weight * context + 0 * z


def mlp(**options):
    network = probdiff.MLP(2, key=jax.random.key(1), hidden=16, num_blocks=1, **{"context_dim": 3} | options)
    return jax.tree.map(lambda leaf: leaf + 0.1, network)  # its last layer is 0 otherwise


def labelled(network, num_labels=3):
    return Embedding(network, num_labels, key=jax.random.key(2))


@pytest.mark.parametrize("wrap", [lambda n: n, ContextDropout], ids=["alone", "dropout"])
def test_an_embedding_is_a_matrix_product_with_one_hot_rows(wrap):
    network = labelled(wrap(mlp()))
    model = probdiff.Diffusion(SCHEDULE, network).bind({})
    vectors = np.eye(3, dtype=np.float32)[LABELS] @ np.asarray(network.vectors)
    plain = probdiff.Diffusion(SCHEDULE, mlp()).bind({})
    found, expected = (probdiff.elbo_terms(d, X, context=c, key=KEY) for d, c in ((model, LABELS), (plain, vectors)))
    np.testing.assert_allclose(found.elbo, expected.elbo, rtol=1e-5)
    one = model.given(LABELS[:1]).predict_noise(jnp.asarray(X[:1]), 3)
    np.testing.assert_allclose(one, plain.given(vectors[:1]).predict_noise(jnp.asarray(X[:1]), 3), rtol=1e-5)


REFUSED = {
    "floats": (LABELS.astype(float), TypeError, r"context: Expected labels 0 … 2, integers of shape \(datum,\); got dtype float"),
    "booleans": (LABELS > 0, TypeError, "got dtype bool"),
    "a label too many": (LABELS + 1, ValueError, r"context: Expected labels 0 … 2.*got \[3\] at index \[0\]"),
    "a negative label": (LABELS - 1, ValueError, r"got \[-1\] at index \[1\]"),
    "one axis too many": (LABELS[:, None], ValueError, r"got shape \(5, 1\)"),
    "a tree": ({"label": LABELS}, ValueError, "got dict"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("wrap", [lambda n: n, probdiff.networks.VHead], ids=["alone", "head"])
def test_what_is_no_label_is_refused(case, wrap):
    context, error, message = REFUSED[case]
    model = probdiff.Diffusion(SCHEDULE, wrap(labelled(mlp())))
    with pytest.raises(error, match=message):
        probdiff.elbo_terms(model, X, context=context, key=KEY)
    model.given(np.roll(LABELS, 1))


@pytest.mark.long
def test_labels_that_are_traced_are_not_looked_at():
    model = probdiff.Diffusion(SCHEDULE, labelled(mlp())).bind({})
    found = jax.jit(lambda c: model.given(c).predict_noise(jnp.asarray(X), 3))(LABELS)
    np.testing.assert_allclose(found, model.given(LABELS).predict_noise(jnp.asarray(X), 3), rtol=1e-5)


def test_a_context_is_dropped_with_its_probability_and_that_of_each_latent_by_itself():
    network = eqx.tree_at(lambda n: n.null, ContextDropout(Echo(), probability=0.3), jnp.array([5.0, 7.0]))
    model = probdiff.Diffusion(SCHEDULE, network)
    context = RNG.normal(size=(4000, 2)).astype(np.float32)
    found = np.asarray(model.given(context).predict(jnp.zeros((3, 4000, 2)), 2, KEY))
    dropped = np.all(found == [5.0, 7.0], -1)
    np.testing.assert_array_equal(found[~dropped], np.broadcast_to(context, found.shape)[~dropped])
    assert_mean(dropped.ravel(), 0.3, power=0.05)
    for other in (np.roll(dropped, 1, 0), np.roll(dropped, 1, 1)):
        assert_mean((dropped & other).ravel(), 0.09, power=0.05)
    again = np.asarray(model.given(context).predict(jnp.zeros((3, 4000, 2)), 2, jax.random.key(1)))
    assert np.any(again != found)


def test_evaluation_drops_nothing():
    """Without a key; all have the null where there is no context."""
    network = eqx.tree_at(lambda n: n.null, ContextDropout(Echo(), probability=0.9), jnp.array([5.0, 7.0]))
    z, n, context = jnp.zeros((6, 2)), jnp.full(6, 2), jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32)
    np.testing.assert_array_equal(network(z, jnp.zeros(6), n=n, context=context), context)
    np.testing.assert_array_equal(network(z, jnp.zeros(6), n=n), np.broadcast_to([5.0, 7.0], (6, 2)))


def test_the_null_is_learned_and_only_where_it_is_used():
    def gradient(probability):
        model = probdiff.Diffusion(SCHEDULE, ContextDropout(mlp(dropout=0.2), probability=probability)).given(np.ones((5, 3)))
        loss = eqx.filter_grad(lambda m: jnp.square(m.predict(jnp.asarray(X), 3, KEY)).sum())
        return np.asarray(loss(model).network.null)

    assert np.all(gradient(0.9) != 0) and np.all(gradient(0.0) == 0)


def alone(network):
    return network


def categorical(network):
    return CategoricalHead(network, 5)


@pytest.mark.long
@pytest.mark.parametrize("head", release_but([alone], [alone, probdiff.networks.VHead, categorical]))
def test_the_unconditional_model_has_the_null_everywhere(head):
    """It takes no context, and what is around the dropout stays."""
    inner = mlp(outputs=5) if isinstance(head(Echo()), CategoricalHead) else mlp()
    dropout = eqx.tree_at(lambda n: n.null, ContextDropout(inner), jnp.array([0.3, -0.2, 0.5]))
    likelihood, x = (None, X) if inner.outputs is None else (probdiff.DiscretizedNormalLikelihood(5), LABELS[:, None] + np.array([[0, 1]]))
    model = probdiff.Diffusion(SCHEDULE, head(labelled(dropout)), likelihood).bind({})
    without = model.with_network(unconditional(model.network))
    assert model.is_conditional and not without.is_conditional
    by_hand = probdiff.Diffusion(SCHEDULE, head(inner), likelihood).bind({})
    null = np.broadcast_to(np.asarray(dropout.null), (5, 3))
    found, expected = probdiff.elbo_terms(without, x, key=KEY), probdiff.elbo_terms(by_hand, x, context=null, key=KEY)
    np.testing.assert_allclose(found.elbo, expected.elbo, rtol=1e-5)
    given = model.given(LABELS)  # also of a model that was given a context
    still = given.with_network(unconditional(given.network)).predict_noise(jnp.asarray(X), 3)
    np.testing.assert_allclose(still, without.predict_noise(jnp.asarray(X), 3), rtol=1e-5)


ORACLE = GaussianOracle([0.5, -0.3], [[0.06, 0.02], [0.02, 0.03]], [[1.0], [-0.5]])
# Of a context that is standard normal.
MARGINAL = GaussianOracle(ORACLE.mean, ORACLE.covariance + ORACLE.slope @ ORACLE.slope.T)


class Exact(eqx.Module):
    """The exact network of ORACLE, and where the second number of its context is 1, that of MARGINAL."""

    given: eqx.Module = eqx.field(default_factory=lambda: ORACLE.network(SCHEDULE))
    without: eqx.Module = eqx.field(default_factory=lambda: MARGINAL.network(SCHEDULE))
    dim: int = 2
    context_dim: int = 2

    def __call__(self, z, n, *, context):
        return jnp.where(context[..., 1:] == 1, self.without(z, n), self.given(z, n, context=context[..., :1]))


EXACT = probdiff.Diffusion(
    SCHEDULE, eqx.tree_at(lambda n: n.null, ContextDropout(Exact()), jnp.array([0.0, 1.0])), reverse_variance="forward"
).bind({})
C = np.array([[1.5, 0.0]])


def chain(weight):
    """Mean and covariance of x under the guided reverse chain, which is linear."""
    given, without = EXACT.network.network.given, EXACT.network.network.without
    mean, covariance = np.zeros(2), np.eye(2)
    for n in range(SCHEDULE.num_steps, 0, -1):
        i = n - 1
        gain = (1 + weight) * given.weight[i] - weight * without.weight[i]
        offset = (1 + weight) * (given.bias[i] + given.context_weight[i] @ C[0, :1]) - weight * without.bias[i]
        per_eps, root = SCHEDULE.beta[i] / np.sqrt(1 - SCHEDULE.alpha_bar[i]), np.sqrt(SCHEDULE.alpha[i])
        matrix = (np.eye(2) - per_eps * gain) / root
        mean = matrix @ mean - per_eps * offset / root
        covariance = matrix @ covariance @ matrix.T + SCHEDULE.beta[i] * np.eye(2)
    return mean, covariance


@pytest.mark.parametrize("weight", [-1, 0, 0.5, 2.0])
def test_guided_samples_have_the_mean_and_the_covariance_of_the_linear_chain(weight, float64):
    """Those of a weight above 0 are not of ORACLE: its mean lies elsewhere."""
    x = probdiff.samplers.ancestral(probdiff.samplers.guided(EXACT, weight), context=np.tile(C, (20_000, 1)), key=KEY)
    mean, covariance = chain(weight)
    assert_mean(x, mean, power=0.1)
    assert_mean((x - mean)[:, :, None] * (x - mean)[:, None], covariance, power=0.15)
    if weight == 2:
        assert np.abs(mean - ORACLE.mean_given(C[0, :1])).max() > 0.05


SAMPLERS = {
    **{name: lambda d, c, draw=draw: draw(d, context=c, key=KEY) for name, draw in probdiff.samplers.SAMPLERS.items()},
    "predictive": lambda d, c: Predictive(d.model, num_samples=1)(KEY, None, context=c)["x"][0],
}


@pytest.mark.long
@pytest.mark.parametrize("name", release_but(["ancestral", "predictive"], SAMPLERS))
def test_every_sampler_takes_a_guided_model(name):
    """With weight 0 it is the model; with another its mean goes the way of the guided chain."""
    context = np.repeat(C, 100, 0)
    plain, same, guided = (np.asarray(SAMPLERS[name](d, context)) for d in (EXACT, *(probdiff.samplers.guided(EXACT, w) for w in (0, 2.0))))
    np.testing.assert_allclose(same, plain, atol=1e-3)
    way = chain(2.0)[0] - chain(0)[0]
    assert (guided - plain).mean(0) @ way > 0.2 * way @ way


@pytest.mark.release
def test_a_run_with_labels_comes_back(tmp_path):
    """The wrappers inside of a head, with the parameters of all of them: the same predictions, with a context and without."""
    likelihood = probdiff.DiscretizedNormalLikelihood(5)
    x, labels = RNG.integers(0, 5, (60, 2)).astype(np.int32), RNG.integers(0, 3, 60)
    network = CategoricalHead(labelled(ContextDropout(mlp(outputs=5), probability=0.2)), 5)
    model = probdiff.Diffusion(SCHEDULE, network, likelihood)
    run = probdiff.storage.create_run(tmp_path / "run", model)
    fit = probdiff.fit(model, x, context=labels, iterations=20, batch_size=16, checkpoint=run.checkpoint, progress=False)
    run.save(fit=fit)
    opened = probdiff.open_run(tmp_path / "run").diffusion
    assert np.any(np.asarray(fit.diffusion.network.network.network.null) != 0)
    z = jnp.asarray(RNG.normal(size=(60, 2)), jnp.float32)
    for change in (lambda d: d.given(labels), lambda d: d.with_network(unconditional(d.network)), lambda d: probdiff.samplers.guided(d, 1.0).given(labels)):
        np.testing.assert_array_equal(*(change(d).predict_noise(z, 3) for d in (opened, fit.diffusion)))


@pytest.mark.release
def test_one_fit_is_a_conditional_and_an_unconditional_model():
    """Two groups, at −2 and at 2: given the label one of them, without both."""
    labels = RNG.integers(0, 2, 2000)
    x = (4.0 * labels[:, None] - 2 + 0.3 * RNG.normal(size=(2000, 2))).astype(np.float32)
    network = labelled(ContextDropout(probdiff.MLP(2, key=KEY, hidden=32, context_dim=4), probability=0.3), 2)
    model = probdiff.Diffusion(probdiff.log_snr_schedule(32, 7.0, -6.0), network, probdiff.NormalLikelihood.standardized(x))
    fitted = probdiff.fit(model, x, context=labels, iterations=1500, learning_rate=4e-3, progress=False).diffusion
    given = probdiff.samplers.ancestral(fitted, context=np.repeat([0, 1], 500), key=KEY).reshape(2, 500, 2)
    np.testing.assert_allclose(given.mean(1), [[-2, -2], [2, 2]], atol=0.2)
    without = fitted.with_network(unconditional(fitted.network))
    drawn = probdiff.samplers.ancestral(without, key=KEY, num_samples=500)
    right = drawn[:, 0] > 0
    assert 0.4 < right.mean() < 0.6 and np.abs(np.abs(drawn).mean() - 2) < 0.2
    own, other = (np.asarray(probdiff.elbo_terms(d, x[:500], context=c, key=KEY).elbo).mean() for d, c in ((fitted, labels[:500]), (without, None)))
    assert np.log(2) - 0.15 < own - other < np.log(2) + 0.5
