"""The bounds of the same data under several contexts: their differences and the labels, against closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import Z_MAX, assert_mean

import probdiff
from probdiff.diagnostics import compare_contexts, contexts
from probdiff.diagnostics.classification import TERMS
from probdiff.diagnostics.contexts import PILOT
from probdiff.oracles import GaussianOracle, exact_terms

KEY = jax.random.key(0)
ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]], [[0.5, 0.0], [0.2, -0.4]])
SCHEDULE = probdiff.log_snr_schedule(40, 7.0, -5.0)
EXACT = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE, 0.9), reverse_variance="forward").bind({})
RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.normal(size=(2, 60, 2)).astype(np.float32)
X = ORACLE.sample(RNG, 60, FIRST).astype(np.float32)
LABELS = np.array([[0.0, 0.0], [2.5, 0.0], [0.0, 2.5], [-1.5, -1.0]], np.float32)


def exact_bounds(x, labels=LABELS, model=EXACT):
    """The bound of each datum under each label, shape (datum, label)."""
    return np.stack([exact_terms(model, x, context=np.tile(label, (len(x), 1)))["elbo"] for label in labels], 1)


SHORT = probdiff.log_snr_schedule(5, 5.0, -4.0)  # of which all steps are taken
MODELS = {
    "random steps": EXACT,
    "all steps": probdiff.Diffusion(SHORT, ORACLE.network(SHORT, 0.9), reverse_variance="posterior").bind({}),
}


@pytest.mark.parametrize("name, draws, power", [("random steps", 100, 2.0), ("all steps", 400, 5.5)])
def test_the_difference_is_that_of_the_closed_form(name, draws, power):
    """Each datum's, and the mean; to an error that the noise of one bound, were it not the same in both, would be far above."""
    model = MODELS[name]
    found = compare_contexts(model, X, FIRST, SECOND, key=KEY, num_draws=draws)
    first, second = (exact_terms(model, X, context=c)["elbo"] for c in (FIRST, SECOND))
    assert_mean(found.draws, first - second, power=power)
    assert_mean(found.draws.mean(1), (first - second).mean(), power=power / 10)
    np.testing.assert_allclose(found.difference, found.draws.mean(0))
    np.testing.assert_allclose(found.error, found.draws.std(0, ddof=1) / np.sqrt(draws))
    assert found.estimate.monte_carlo_error < found.estimate.error
    evaluations = 2 * draws * (5 if name == "all steps" else 32)
    assert found.num_evaluations == (evaluations if name == "all steps" else evaluations + 2 * 32 * PILOT / 60)
    assert repr(found).startswith("ContextDifference of 60 data: ") and f"{found.num_evaluations:.0f} network evaluations" in repr(found)


def test_the_other_way_round_is_minus_the_difference_and_of_itself_it_is_nothing():
    found, turned, same = (compare_contexts(EXACT, X, *pair, key=KEY) for pair in ((FIRST, SECOND), (SECOND, FIRST), (FIRST, FIRST)))
    np.testing.assert_allclose(turned.draws, -found.draws, rtol=1e-3, atol=1e-3)
    assert np.all(same.draws == 0)


@pytest.mark.long
def test_learned_steps_are_better_than_steps_that_are_all_alike(patched):
    """The probabilities are those of where the contexts differ: with a learner that learns nothing the error is larger."""
    wide = probdiff.log_snr_schedule(200, 25.0, -15.0)
    model = probdiff.Diffusion(wide, ORACLE.network(wide, 0.9), reverse_variance="forward").bind({})
    learned = compare_contexts(model, X, FIRST, SECOND, key=KEY, num_draws=30)
    patched(contexts._learned, lambda learner, learned, *_: learned)
    guessed = compare_contexts(model, X, FIRST, SECOND, key=KEY, num_draws=30)
    assert np.square(learned.error).mean() < 0.5 * np.square(guessed.error).mean()


def test_the_posterior_is_bayes_rule_on_the_bounds():
    """Where nothing is dropped, the log-odds are those of the closed form, with their prior."""
    prior = np.array([1.0, 2.0, 3.0, 0.5])
    found = probdiff.classify(EXACT, X[:20], LABELS, prior=prior, key=KEY, num_evaluations=16_000, error_level=0)
    expected = scipy.special.softmax(exact_bounds(X[:20]) + np.log(prior), 1)
    np.testing.assert_allclose(found.posterior, expected, atol=0.08)
    np.testing.assert_allclose(found.posterior.sum(1), 1)
    assert not found.is_decided.any() and np.all(found.num_evaluations == 16_000 + TERMS * len(LABELS))
    clear = np.diff(np.sort(expected, 1)[:, -2:], axis=1)[:, 0] > 0.2
    np.testing.assert_array_equal(found.label[clear], expected.argmax(1)[clear])
    assert repr(found) == f"Classification of 20 data among 4 labels: 0 decided, {16_000 + TERMS * 4} network evaluations a datum"


def test_labels_are_dropped_early_and_rightly():
    """At a level of 1 %, of 400 data; those that are not decided lie between two labels."""
    labels = RNG.integers(0, 4, 400)
    x = ORACLE.sample(RNG, 400, LABELS[labels]).astype(np.float32)
    found = probdiff.classify(EXACT, x, LABELS, key=KEY, num_evaluations=1000)
    bounds = exact_bounds(x)
    best = bounds.argmax(1)
    wrong = found.label != best
    assert wrong[found.is_decided].sum() <= 0.01 * 400 + Z_MAX * 2
    assert found.is_decided.mean() > 0.5 and found.num_evaluations.max() <= 1000 + TERMS * 4
    assert found.num_evaluations[found.is_decided].mean() < 400
    margin = np.diff(np.sort(bounds, 1)[:, -2:], axis=1)[:, 0]
    assert margin[~found.is_decided].mean() < 0.3 * margin.mean()
    # The error that is said is the error that is made.
    excess = (wrong - found.error).sum()
    assert abs(excess) < Z_MAX * np.sqrt((found.error * (1 - found.error)).sum() + 1)


@pytest.mark.long
def test_data_of_several_blocks_and_one_datum_alone(constant):
    """The noise of a datum is its own: it is that of its number."""
    labels = range(3)
    model = probdiff.Diffusion(SCHEDULE, eqx.tree_at(lambda n: n.vectors, labelled(), jnp.asarray(LABELS[:3]))).bind({})
    whole = probdiff.classify(model, X, labels, key=KEY, num_evaluations=1200, error_level=0)
    constant("DATA_AT_ONCE", 25)
    constant("PAIRS_AT_ONCE", 7)
    pieces = probdiff.classify(model, X, labels, key=KEY, num_evaluations=1200, error_level=0)
    np.testing.assert_allclose(pieces.posterior, whole.posterior, atol=0.4)
    np.testing.assert_array_equal(pieces.num_evaluations, whole.num_evaluations)
    expected = scipy.special.softmax(exact_bounds(X, LABELS[:3]), 1)
    np.testing.assert_allclose(pieces.posterior, expected, atol=0.3)
    one = probdiff.classify(model, X[:1], labels, key=KEY, num_evaluations=1200, error_level=0)
    np.testing.assert_allclose(one.posterior, expected[:1], atol=0.3)


class Vector(eqx.Module):
    """The exact network, which says how wide its context is."""

    exact: eqx.Module = eqx.field(default_factory=lambda: ORACLE.network(SCHEDULE, 0.9))
    dim: int = 2
    context_dim: int = 2

    def __call__(self, z, n, *, context):
        return self.exact(z, n, context=context)


def labelled():
    return probdiff.networks.Embedding(Vector(), 3, key=KEY)


@pytest.mark.long
def test_labels_that_say_the_same_are_never_decided():
    model = probdiff.Diffusion(SCHEDULE, eqx.tree_at(lambda n: n.vectors, labelled(), jnp.ones((3, 2)))).bind({})
    found = probdiff.classify(model, X[:5], range(3), key=KEY, num_evaluations=100)
    np.testing.assert_allclose(found.posterior, 1 / 3)
    assert not found.is_decided.any() and np.all(found.error == 1) and np.all(found.label == 0)


@pytest.mark.long
def test_a_kernel_whose_kl_is_sampled():
    """The extra noise of its terms is common, too."""
    levels = 5

    def logits(z, n, *, context):
        return context[..., None, :] + jnp.zeros((*z.shape, levels))

    head = probdiff.networks.CategoricalHead(logits, levels)
    kernel = probdiff.chain.MixtureKernel(levels)
    model = probdiff.Diffusion(SHORT, head, probdiff.DiscretizedNormalLikelihood(levels), kernel=kernel, dim=2).bind({})
    labels = np.log(np.array([[0.6, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.6]])).astype(np.float32)
    x = np.array([[0, 0], [4, 4], [0, 4], [1, 2]])
    found = probdiff.classify(model, x, labels, key=KEY, num_evaluations=8_000, error_level=0)
    # (Of independent dimensions the mixture kernel has no gap.)
    expected = scipy.special.softmax(labels[:, x].sum(-1).T, 1)
    np.testing.assert_allclose(found.posterior, expected, atol=0.08)
