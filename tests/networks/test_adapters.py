"""Networks of other libraries, by what needs none of them: functions of parameters, functions on the host, and what trains nothing."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO

import probdiff
from probdiff.networks.base import takes
from probdiff.networks.host import HostNetwork

KEY = jax.random.key(0)
SCHEDULE = probdiff.cosine_schedule(4)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 2)).astype(np.float32)
WEIGHTS = {"w": RNG.normal(size=(3, 2)).astype(np.float32), "b": jnp.full(2, 0.1), "steps": np.array([4])}


def apply(params, z, n):
    return jnp.concatenate([z, n[..., None] / params["steps"]], -1) @ params["w"] + params["b"]


def apply_with_all(params, z, n, *, key=None, context):
    kept = 1.0 if key is None else jax.random.bernoulli(key, 0.5, z.shape)
    return kept * apply(params, z, n) + context["shift"]


def of(network, **options):
    return probdiff.Diffusion(SCHEDULE, network, dim=2, **options)


def svi(diffusion):
    return SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), Trace_ELBO())


def begin(diffusion, **given):
    """The shapes of the parameters of an SVI that begins."""
    return svi(diffusion).optim.get_params(jax.eval_shape(svi(diffusion).init, KEY, X, **given).optim_state)


def test_the_parameters_given_to_from_apply_are_trained():
    """Those of NumPy, too, but integers are not; what is trained is what the function is given."""
    model = of(probdiff.networks.from_apply(apply, WEIGHTS))
    assert [leaf.shape for leaf in jax.tree.leaves(model.trainable())] == [(2,), (3, 2)]
    np.testing.assert_allclose(model.predict_noise(X, 3), apply(WEIGHTS, X, jnp.full(6, 3)), rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained = model.bind(svi(model).run(KEY, 2, X, progress_bar=False).params).network.args[0]
    assert np.all(trained["w"] != WEIGHTS["w"]) and np.all(trained["b"] != WEIGHTS["b"]) and trained["steps"] == 4
    np.testing.assert_allclose(of(probdiff.networks.from_apply(apply, trained)).predict_noise(X, 1), apply(trained, X, jnp.ones(6)), rtol=1e-5)


def test_from_apply_takes_a_key_and_a_context_by_name():
    network = probdiff.networks.from_apply(apply_with_all, WEIGHTS)
    assert takes(network, "key") and takes(network, "context")
    model, context = of(network), {"shift": RNG.normal(size=(6, 2)).astype(np.float32)}
    given = model.given(context)
    np.testing.assert_allclose(given.predict_noise(X, 3), apply(WEIGHTS, X, jnp.full(6, 3)) + context["shift"], rtol=1e-5)
    dropped = np.asarray(given.predict(X, 3, KEY)) == context["shift"]
    assert 0 < dropped.mean() < 1
    assert jax.tree.leaves(begin(model, context=context))


@pytest.mark.parametrize("wrap", [lambda n: n, probdiff.networks.VHead, lambda n: probdiff.networks.Ensemble([n]), probdiff.networks.batched])
def test_any_keywords_do_not_ask_for_a_key(wrap):
    """As those of ``module.apply`` of Flax linen, which hands them on to a module that has none."""

    def linen_apply(variables, *args, rngs=None, **kwargs):
        assert not kwargs, kwargs
        return apply(variables, *args)

    for network in (jax.tree_util.Partial(linen_apply, WEIGHTS), probdiff.networks.from_apply(linen_apply, WEIGHTS)):
        model = of(wrap(network))
        assert not model.is_conditional and jax.tree.leaves(begin(model))


def test_parameters_as_a_site_of_numpyro_are_refused_in_a_line():
    """In a program, where NumPyro's scan would fail without a word, and out of one; inside of a head, too."""

    def network(z, n):
        return eqx_module("net", probdiff.MLP(2, key=KEY, hidden=8, num_blocks=1))(z, n.astype(z.dtype))

    message = "network: Expected one that holds its parameters: .*from_apply.* got one with the NumPyro site 'net"
    for model in (of(network).bind({}), of(probdiff.networks.VHead(network)).bind({})):
        for use in (begin, functools.partial(probdiff.elbo_terms, x=X, key=KEY)):
            with pytest.raises(ValueError, match=message):
                use(model)


def test_a_network_without_anything_to_train_is_pointed_out():
    """When an SVI begins, be there something else to train or not; not where it is evaluated, nor of a bound model, nor of one that has parameters."""
    learned = probdiff.LearnedSchedule(4, 4.0, -3.0)
    closed = functools.partial(apply, WEIGHTS)
    message = "network: Expected something to train: .*from_apply.*; got a partial without any"
    for model in (of(closed), probdiff.Diffusion(learned, closed, dim=2)):
        with pytest.warns(UserWarning, match=message):
            begin(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            jax.eval_shape(functools.partial(Trace_ELBO().loss, param_map={}, model=model.model, guide=model.guide), KEY, x=X)
            begin(model.bind({}))
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=message):
        warnings.simplefilter("error", UserWarning)
        probdiff.fit(model, X, iterations=2, batch_size=3, progress=False)
    with pytest.raises(ValueError, match=r"diffusion: Expected something to train: .*from_apply.*; got a partial without parameters"):
        probdiff.fit(of(closed), X, iterations=2, batch_size=3, progress=False)


def on_host(z, n):
    assert isinstance(z, np.ndarray) and z.ndim == 2 and n.shape == z.shape[:1] and n.dtype == np.int32
    w, b = (np.asarray(WEIGHTS[name], z.dtype) for name in ("w", "b"))
    return np.concatenate([z, n[:, None] / z.dtype.type(4)], 1) @ w + b


def on_host_given(z, n, context):
    return np.stack([on_host(z, n) + context["shift"], np.repeat(context["label"][:, None], 2, 1)], -1)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_a_network_on_the_host_is_that_of_jax(dtype, tolerance):
    """With any batch axes, mapped over or not, compiled or not, and in the precision of the latents, though that is set for one thread only."""
    with jax.enable_x64(dtype == np.float64):
        weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), WEIGHTS)
        there, here = HostNetwork(on_host), functools.partial(apply, weights)
        z, n = jnp.asarray(RNG.normal(size=(2, 3, 2)), dtype), jnp.asarray(RNG.integers(1, 5, (2, 3)), jnp.int32)
        one_step = jnp.broadcast_to(n[0], (2, 3))
        for call, steps in (
            (there, n),
            (jax.jit(there), n),
            (jax.vmap(jax.vmap(there)), n),
            (lambda z, n: jax.vmap(there, (0, None))(z, n[0]), one_step),
            (lambda z, n: jax.lax.map(lambda each: there(*each), (z, n)), n),
        ):
            found = call(z, steps)
            assert found.dtype == dtype
            np.testing.assert_allclose(found, here(z, steps), rtol=tolerance, atol=tolerance)


def test_a_network_on_the_host_takes_a_context_and_predicts_as_much_as_it_likes():
    context = {"shift": jnp.asarray(RNG.normal(size=(2, 3, 2)), jnp.float32), "label": jnp.arange(6).reshape(2, 3)}
    z, n = jnp.asarray(RNG.normal(size=(2, 3, 2)), jnp.float32), jnp.full((2, 3), 2)
    network = HostNetwork(on_host_given)
    assert takes(network, "context") and not takes(network, "key") and not takes(HostNetwork(on_host), "context")
    found = network(z, n, context=context)
    np.testing.assert_allclose(found[..., 0], apply(WEIGHTS, z, n) + context["shift"], rtol=1e-5)
    np.testing.assert_array_equal(found[..., 1], np.repeat(context["label"][..., None], 2, -1))


@pytest.mark.long
def test_a_bound_and_a_sampler_of_a_network_on_the_host_are_those_of_jax():
    there, here = (of(network).bind({}) for network in (HostNetwork(on_host), probdiff.networks.from_apply(apply, WEIGHTS)))
    for figure in (lambda d: probdiff.elbo_terms(d, X, key=KEY).step_kl, lambda d: probdiff.samplers.ancestral(d, key=KEY, num_samples=5)):
        np.testing.assert_allclose(figure(there), figure(here), rtol=1e-4, atol=1e-5)


def test_a_gradient_of_a_network_on_the_host_is_refused_by_name():
    """Not taken for the mistake of a network of one example; what needs no gradient of it is trained around it."""
    model = of(HostNetwork(on_host))
    message = "network: Expected one that JAX can differentiate; .*twist.*from_apply"

    def update(diffusion):
        own = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), probdiff.AnalyticELBO(diffusion))
        return jax.eval_shape(lambda key: own.update(own.init(key, X), X), KEY)

    half = probdiff.inference.Inpainting(np.array([True, False]), X[0])
    learned = probdiff.Diffusion(probdiff.LearnedSchedule(4, 4.0, -3.0), model.network, dim=2)
    for use in (
        lambda: jax.grad(lambda z: model.predict_noise(z, 2).sum())(X),
        lambda: probdiff.flow.flow_log_prob(model, X[:2]),
        lambda: probdiff.inference.smc(model, half, key=KEY, num_particles=2, twist="tweedie"),
        lambda: update(learned),
    ):
        with pytest.raises(NotImplementedError, match=message):
            use()
    assert np.isfinite(probdiff.inference.smc(model, half, key=KEY, num_particles=2, twist="none").samples).all()
    update(of(model.network, reverse_variance="learned"))


def test_a_network_on_the_host_with_a_mistake_shows_it_in_a_line():
    """Before it is compiled, and as its own error."""
    for function, error, message in (
        (lambda z, n: z[0], ValueError, r"network\(z, n\): Expected shape \(2, …\) for z of shape \(2, 2\); got shape \(2,\)"),
        (lambda z, n: z[:, :1], ValueError, r"network\(z, n\): Expected shape \(6, 2\), the shape of z; got \(6, 1\)"),
        (lambda z, n: z / (1 // 0), ZeroDivisionError, "division"),
    ):
        with pytest.raises(error, match=message):
            of(HostNetwork(function)).predict_noise(X, 2)
