"""Conditional models p(x | c): rows of x and c stay together, in every function that takes data or makes them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pandas as pd
import pytest
from conftest import assert_mean, release_but
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO

import probdiff
from probdiff.elbo.variance_reduction import PosteriorNoise
from probdiff.oracles import GaussianOracle, exact_log_prob, exact_terms
from probdiff.programs import ParallelPrograms

SCHEDULE = probdiff.log_snr_schedule(16, 7.0, -5.0)
ORACLE = GaussianOracle([0.5, -0.3], [[0.06, 0.02], [0.02, 0.03]], [[2.0, 0.0], [0.5, -1.5]])
EXACT = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE), reverse_variance="forward").bind({})
RNG = np.random.default_rng(0)
C = RNG.normal(size=(40, 2)).astype(np.float32)
X = ORACLE.sample(RNG, len(C), C).astype(np.float32)
KEY = jax.random.key(0)


def tree_network(z, n, *, context):
    """A network of one's own, which takes a tree: labels and numbers."""
    return 0.9 * z + context["age"][..., None] - 0.1 * context["kind"][..., None] + 0 * n[..., None]


TREE = {"kind": np.arange(40) % 3, "age": C[:, 0]}
OF_TREE = probdiff.Diffusion(SCHEDULE, tree_network, dim=2).bind({})

EVALUATIONS = {
    "elbo_terms": lambda d, x, **c: probdiff.elbo_terms(d, x, **c, key=KEY, num_draws=2).elbo[0],
    "reduced": lambda d, x, **c: probdiff.elbo_terms(d, x, **c, key=KEY, num_draws=2, reduce=True).elbo.mean,
    "data_set_elbo": lambda d, x, **c: probdiff.elbo.random_steps.data_set_elbo(d, x, **c, key=KEY).elbo,
    "path_elbo": lambda d, x, **c: probdiff.elbo.path_elbo(d, x, **c, key=KEY, num_draws=2)[0],
    "iwae": lambda d, x, **c: probdiff.iwae(d, x, **c, key=KEY, num_particles=2)[0],
    "flow_likelihood": lambda d, x, **c: probdiff.flow_likelihood(d, x, **c, key=KEY, num_draws=2).log_prob[0],
    "score": lambda d, x, **c: probdiff.chain.score.score(d, jnp.asarray(x), 4, **c)[:, 0],
    "compute_both_ways": lambda d, x, **c: probdiff.diagnostics.compute_both_ways(d, x, **c, key=KEY, num_draws=2).path[0],
}
KINDS = {"array": (EXACT, C), "tree": (OF_TREE, TREE)}
ARRAYS = [(name, "array") for name in ("elbo_terms", "data_set_elbo", "iwae", "flow_likelihood", "compute_both_ways")]


@pytest.mark.long
@pytest.mark.parametrize("name, kind", release_but([*ARRAYS, ("elbo_terms", "tree")], itertools.product(EVALUATIONS, KINDS)))
def test_a_context_counts_and_a_model_given_one_is_a_model(name, kind):
    """``context=c`` is ``model.given(c)``; other rows of it are another number."""
    model, context = KINDS[kind]
    evaluate = EVALUATIONS[name]
    found = evaluate(model, X, context=context)
    assert found.shape == (40,)
    np.testing.assert_array_equal(evaluate(model.given(context), X), found)
    turned = jax.tree.map(lambda leaf: np.roll(leaf, 1, 0), context)
    assert np.all(evaluate(model, X, context=turned) != found)


@pytest.mark.parametrize("name", ["elbo_terms", "data_set_elbo", "path_elbo", "flow_likelihood"])
def test_pieces_of_the_data_keep_their_context(name, constant):
    """What is computed in one piece, and in pieces of a few rows."""
    if name == "data_set_elbo":
        big = np.concatenate([X] * 5), np.concatenate([C] * 5)  # of more than one block
        found = EVALUATIONS[name](EXACT, big[0], context=big[1]).reshape(5, 40).mean(0)
        expected = exact_terms(EXACT, X, context=C)["elbo"]
        assert np.abs(found - expected).max() < 4 and abs((found - expected).mean()) < 0.3
        return
    whole = EVALUATIONS[name](EXACT, X, context=C)
    for limit in ("MOST_NUMBERS", "HIDDEN_VALUES", "MOST_INPUTS", "FEWEST_INPUTS", "EVALUATIONS"):
        constant(limit, 64)
    np.testing.assert_allclose(EVALUATIONS[name](EXACT, X, context=C), whole, rtol=2e-4, atol=2e-4)


@pytest.mark.long
def test_the_flow_has_the_density_of_each_row(float64):
    """Of Gaussian data given c, z_1 is Gaussian of the mean of its row."""
    z = jnp.asarray(X, float)
    base = SCHEDULE.alpha_bar[-1]

    def exact_base(context):
        mean = np.sqrt(base) * ORACLE.mean_given(context)
        return lambda z_end: [
            numpyro.distributions.MultivariateNormal(m, base * ORACLE.covariance + (1 - base) * np.eye(2)).log_prob(each) for m, each in zip(mean, z_end)
        ]

    level = probdiff.Diffusion(SCHEDULE, LevelGaussian()).bind({})
    found = probdiff.flow.flow_log_prob(level, z, context=C, base=exact_base(C))
    first = SCHEDULE.alpha_bar[0]
    marginal = GaussianOracle(np.sqrt(first) * ORACLE.mean, first * ORACLE.covariance + (1 - first) * np.eye(2), np.sqrt(first) * ORACLE.slope)
    np.testing.assert_allclose(found, marginal.log_prob(X, C), atol=1e-3)


class LevelGaussian(probdiff.networks.AbstractNetwork):
    """The exact network of ORACLE, told the noise level."""

    dim: int = 2

    def __call__(self, z, log_snr, *, context):
        signal, noise = (jax.nn.sigmoid(sign * log_snr)[..., None, None] for sign in (1, -1))
        mean = ORACLE.mean + context @ ORACLE.slope.T
        residual = z - jnp.sqrt(signal[..., 0]) * mean
        covariance = signal * ORACLE.covariance + noise * jnp.eye(2)
        return jnp.sqrt(noise[..., 0]) * jnp.linalg.solve(covariance, residual[..., None])[..., 0]


SAMPLERS = {
    "predictive": lambda d, c, key: Predictive(d.model, num_samples=1)(key, None, context=c)["x"][0],
    "ancestral": lambda d, c, key: probdiff.samplers.ancestral(d, context=c, key=key),
    "ddim": lambda d, c, key: probdiff.samplers.ddim(d, context=c, key=key, eta=1.0),
    "langevin": lambda d, c, key: probdiff.samplers.annealed_langevin(d, context=c, key=key, num_updates=5),
    "ode": lambda d, c, key: probdiff.samplers.probability_flow(d, context=c, key=key, steps=20),
    "sandwich": lambda d, c, key: probdiff.sandwich(d, context=c, key=key, num_particles=1).x,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_sample_for_each_row(name, constant):
    """Each is drawn about the mean of its row, which varies by several standard deviations of what is drawn; in batches of 64, where there are batches."""
    constant("EVALUATIONS", 1)
    sampler, context = SAMPLERS[name], np.repeat(C[:3], 300, 0)
    found = np.asarray(sampler(EXACT, context, KEY)).reshape(3, 300, 2)
    spread = np.sqrt(np.diag(ORACLE.covariance))
    np.testing.assert_allclose(found.mean(1), ORACLE.mean_given(C[:3]), atol=0.35 * spread.max())
    np.testing.assert_allclose(found.std(1), np.broadcast_to(spread, (3, 2)), rtol=0.3)


def test_the_sandwich_holds_of_each_row(float64):
    found = probdiff.sandwich(EXACT, context=C, key=KEY, num_particles=[1, 20])
    exact = exact_log_prob(EXACT, found.x, context=C)
    lower, upper = ((side[20] - exact) for side in (found.lower, found.upper))
    assert lower.mean() < 3 * lower.std() / np.sqrt(40) and upper.mean() > -3 * upper.std() / np.sqrt(40)
    assert abs(lower.mean()) < 0.2 and abs(upper.mean()) < 0.2


def network(context_dim=2):
    return probdiff.MLP(2, key=jax.random.key(1), hidden=32, num_blocks=1, context_dim=context_dim)


@pytest.mark.parametrize("elbo", release_but([None, "trace"], [None, "trace", "kl_combined"]))
def test_minibatches_of_a_fit_keep_rows_together(elbo):
    """The data are their context, but for little noise: a fit whose minibatches mix rows up cannot know that."""
    x = (C + 0.05 * RNG.normal(size=C.shape)).astype(np.float32)
    model = probdiff.Diffusion(probdiff.log_snr_schedule(8, 6.0, -4.0), network())
    options = {"iterations": 400 if elbo == "trace" else 600, "batch_size": 16, "learning_rate": 5e-3, "elbo": elbo, "progress": False}
    held_out = {"validation": x[:20], "validation_context": C[:20], "validate_every": 200}
    fit = probdiff.fit(model, x, context=C, **held_out, **options)
    own, other = (
        np.asarray(probdiff.elbo_terms(fit.diffusion, x, context=c, key=KEY, num_draws=4).elbo).mean() for c in (C, np.roll(C, 1, 0))
    )
    assert own > other + 10 and own > -1.5, (own, other)
    assert fit.validation[-1, 1] > -1.5


@pytest.mark.long
def test_subsampled_by_numpyros_plate():
    """``plate(subsample_size=)`` around neither program, but for its rows: those of x and of c, scaled to the whole."""
    model = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE)).bind({})

    def program(name):
        def run(x, c):
            with numpyro.plate("rows", len(x), subsample_size=8) as rows:
                pass
            getattr(model, name)(x[rows], num_data=len(x), context=c[rows])

        return run

    def loss(c):
        draw = jax.jit(jax.vmap(lambda key: Trace_ELBO().loss(key, {}, program("model"), program("posterior_guide"), jnp.asarray(X), c)))
        return -np.asarray(draw(jax.random.split(KEY, 4000)), float)

    assert_mean(loss(jnp.asarray(C)), exact_terms(model, X, context=C)["elbo"].sum(), power=40.0)


@pytest.mark.release
def test_both_encodings_agree():
    given = {"context": C}
    parallel = ParallelPrograms(EXACT)
    found = []
    for programs in (EXACT, parallel):
        path = handlers.trace(handlers.seed(EXACT.posterior_guide, 3)).get_trace(X, **given)["z"]["value"]
        traces = [
            handlers.trace(handlers.seed(handlers.substitute(program, {"z": path}), 0)).get_trace(X, **given)
            for program in (programs.model, programs.posterior_guide)
        ]
        found.append([np.asarray(trace["z"]["fn"].log_prob(path)).sum() for trace in traces])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_posterior_noise_is_of_the_same_context(float64):
    """With labels, z_n comes from the data of its own label, as if they were all there were."""
    labels = jnp.arange(6) % 2
    x = jnp.asarray(X[:6], float)

    def labelled(z, n, *, context):
        return z * (0.5 + 0.1 * context[..., None]) + 0 * n[..., None]

    model = probdiff.Diffusion(SCHEDULE, labelled, dim=2).given(labels)
    objective = probdiff.AnalyticELBO(model, "uniform", points="batch")
    z, n = jnp.asarray(RNG.normal(size=(3, 6, 2))), jnp.full((3, 6), 5)
    weight = jnp.array([1.0, 1.0, 0.0, 0.0, 2.0, 0.0])
    found = objective._known_noise(x, weight, labels)(SCHEDULE, z, n)
    rows = np.array([0, 2, 4])
    own = PosteriorNoise(x[rows], jnp.log(weight[rows]))(SCHEDULE, z[:, [0, 4]], n[:, [0, 4]])
    np.testing.assert_allclose(found.mean[:, [0, 4]], own.mean, rtol=1e-10)
    np.testing.assert_allclose(found.variance[:, [0, 4]], own.variance, rtol=1e-8)
    # (The label of the other rows has a datum that counts, and the last has none of its own: it may be anything but NaN.)
    assert np.isfinite(found.mean).all() and np.isfinite(found.variance).all()


@pytest.mark.long
def test_the_parameters_are_not_the_context():
    """What is given is not trained, and a model is the same model whatever it is given."""
    model = probdiff.Diffusion(SCHEDULE, network())
    given = model.given(C)
    assert jax.tree.structure(given.trainable()) == jax.tree.structure(model.trainable())
    assert given.is_like(model) and "conditional" in repr(model) and "given 40 contexts" in repr(given)
    svi = SVI(given.model, given.guide, optax.adam(1e-2), Trace_ELBO())
    result = svi.run(KEY, 2, X, progress_bar=False)
    np.testing.assert_array_equal(given.bind(result.params).context, C)
    assert model.bind(result.params).context is None


@pytest.mark.long
def test_models_with_and_without_are_compared_on_the_same_data():
    plain = probdiff.Diffusion(SCHEDULE, GaussianOracle([0.5, -0.3], np.eye(2)).network(SCHEDULE)).bind({})
    found = probdiff.compare_models({"given": EXACT, "plain": plain}, X, context=C, key=KEY)
    assert list(found.table.index) == ["given", "plain"]
    expected = exact_terms(EXACT, X, context=C)["elbo"]
    assert abs((found.elbo["given"] - expected).mean()) < 1


@pytest.mark.long
def test_estimators_are_compared_and_agree():
    found = probdiff.compare_estimators(EXACT, X[:8], context=C[:8], key=KEY, num_draws=200, estimators=["trace", "kl_marginal", "kl_combined"])
    assert found.agree
    exact = exact_terms(EXACT, X[:8], context=C[:8])["elbo"].mean()
    assert np.all(np.abs(found.table["elbo"] - exact) < 5 * found.table["se"])


@pytest.mark.release
def test_the_gap_is_taken_apart_given_a_context(float64):
    """The gap of the exact network is irreducible: the network adds nothing."""
    many, context = np.tile(X.astype(float), (100, 1)), np.tile(C, (100, 1))
    found = probdiff.diagnostics.gap_decomposition(EXACT, ORACLE, many, context=context, key=KEY)
    assert found.network.mean == pytest.approx(0, abs=1e-12)
    gap = (ORACLE.log_prob(X, C) - exact_terms(EXACT, X, context=C)["elbo"]).mean()
    assert abs(found.gap.mean - gap) < 0.1  # of other rows of the context it is hundreds


def test_the_datatree_has_the_context():
    for model, context in ((EXACT, C), (OF_TREE, TREE)):
        terms = probdiff.elbo_terms(model, X, context=context, key=KEY, num_draws=2)
        tree = probdiff.to_datatree(terms)
        back = probdiff.diagnostics.from_datatree(tree).context
        constants = tree["constant_data"].dataset
        if model is EXACT:
            np.testing.assert_array_equal(constants["context"].values, C)
            np.testing.assert_array_equal(back, C)
        else:
            np.testing.assert_array_equal(constants["context[kind]"].values, TREE["kind"])
            np.testing.assert_array_equal(back["context[age]"], TREE["age"])


MODEL = probdiff.Diffusion(SCHEDULE, network())
WITHOUT = probdiff.Diffusion(SCHEDULE, network(None))
REFUSED = {
    "missing": (MODEL, None, ValueError, "context: Expected an array, or a tree of arrays, with a row for each datum: the network takes context=; got None"),
    "too long": (MODEL, np.concatenate([C, C]), ValueError, "context: Expected as many rows as there are data, 40; got 80 rows"),
    "one row": (MODEL, C[:1], ValueError, "context: Expected as many rows as there are data, 40; got 1 rows"),
    "NaN": (MODEL, np.where(C == C[3, 1], np.nan, C), ValueError, r"context: Expected finite values; got nan at index \[3, 1\]"),
    "too wide": (MODEL, np.ones((40, 3)), ValueError, r"context: Expected an array of shape \(datum, 2\), as the network has context_dim=2; got shape \(40, 3\)"),
    "one axis": (MODEL, C[:, 0], ValueError, r"got shape \(40,\)"),
    "a tree for an array": (MODEL, TREE, ValueError, r"context: Expected an array of shape \(datum, 2\).*got dict"),
    "to a model without": (WITHOUT, C, ValueError, "context: Expected None, for a network that takes no context=; got a ndarray"),
    "a second one": (MODEL.given(C), C, ValueError, "context: Expected None, for a model that was given one; got a ndarray"),
    "empty": (MODEL, C[:0], ValueError, "context: Expected at least one row; got none"),
    "no array": (MODEL, {}, ValueError, "context: Expected an array, or a tree of arrays.*got no array"),
    "a number": (MODEL, 1.0, TypeError, "context: Expected an array, or a tree of arrays.*got float"),
    "a list": (MODEL, [1.0] * 40, TypeError, "context: Expected an array.*: np.array makes one of a list; got a list"),
    "labels in a column": (MODEL, pd.Series(["a"] * 40), TypeError, "context: Expected columns of numbers; probdiff.datasets.split.*got String in column"),
    "words": (MODEL, np.array(["a"] * 40), TypeError, "context: Expected numbers; got dtype <U1"),
    "of different length": (OF_TREE, {"kind": TREE["kind"], "age": C[:3, 0]}, ValueError, r"context: Expected arrays of equally many rows; got \[3, 40\] rows"),
}
USES = {
    "elbo_terms": lambda d, c: probdiff.elbo_terms(d, X, context=c, key=KEY),
    "fit": lambda d, c: probdiff.fit(d, X, context=c, iterations=2, progress=False),
    "svi": lambda d, c: SVI(d.model, d.guide, optax.adam(1e-3), Trace_ELBO()).init(KEY, X, context=c),
    "analytic": lambda d, c: SVI(d.model, d.guide, optax.adam(1e-3), probdiff.AnalyticELBO(d)).init(KEY, X, context=c),
    "parallel": lambda d, c: handlers.seed(ParallelPrograms(d).model, 0)(X, context=c),
    "path_elbo": lambda d, c: probdiff.elbo.path_elbo(d, X, context=c, key=KEY, num_draws=1),
    "flow": lambda d, c: probdiff.flow_likelihood(d, X, context=c, key=KEY),
    "compare": lambda d, c: probdiff.compare_estimators(d, X, context=c, key=KEY, num_draws=2),
    "data_set_elbo": lambda d, c: probdiff.elbo.random_steps.data_set_elbo(d, X, context=c, key=KEY),
    "samples": lambda d, c: probdiff.samplers.ddim(d, context=c, key=KEY, num_samples=40),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("use", USES)
def test_what_is_refused(case, use, monkeypatch):
    model, context, error, message = REFUSED[case]
    if use == "samples" and case in ("too long", "one row"):
        error, message = ValueError, "context: Expected 40 rows, for as many draws; got (80|1) rows"
    if use == "fit" and case == "a second one":
        message = "diffusion: Expected a model that was given no context"
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("something was compiled"))
    with pytest.raises(error, match=message):
        USES[use](model, context)


def test_the_context_of_validation_is_refused_by_its_name():
    with pytest.raises(ValueError, match="^validation_context: Expected .*got None"):
        probdiff.fit(MODEL, X, context=C, validation=X, iterations=2, progress=False)
    with pytest.raises(ValueError, match="^validation_context: Expected as many rows as there are data, 3; got 40 rows"):
        probdiff.fit(MODEL, X, context=C, validation=X[:3], validation_context=C, iterations=2, progress=False)
    with pytest.raises(ValueError, match="^validation_context: Expected None without validation data"):
        probdiff.fit(MODEL, X, context=C, validation_context=C, iterations=2, progress=False)


def test_a_fit_of_a_model_that_was_given_a_context_says_where_it_goes():
    with pytest.raises(ValueError, match="diffusion: Expected a model that was given no context: pass it to fit as context="):
        probdiff.fit(MODEL.given(C), X, iterations=2, progress=False)


@pytest.mark.release
def test_a_fit_is_resumed_with_the_same_context_only(tmp_path):
    checkpoint = probdiff.storage.Checkpoint(tmp_path / "state.eqx")
    options = {"iterations": 4, "batch_size": 8, "validate_every": 2, "progress": False, "checkpoint": checkpoint}
    probdiff.fit(MODEL, X, context=C, **options)
    with pytest.raises(ValueError, match="context: Expected .*, as in the fit of the checkpoint"):
        probdiff.fit(MODEL, X, context=C[::-1], **options)
