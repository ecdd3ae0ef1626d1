"""Every estimator, by the public list: unbiased in value and gradient, exact where it can be enumerated, drop-in in SVI."""

import functools
import warnings
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from conftest import Z_MAX, assert_mean, long_but, own_part, release_but
from numpyro.infer import SVI

import probdiff
from probdiff.chain.forward import prior_kl
from probdiff.chain.reverse import GaussianKernel, weighted_error
from probdiff.elbo import analytic as excess
from probdiff.elbo import steps as proposal
from probdiff.elbo import variance_reduction as noise_module
from probdiff.elbo.objective import LEARNED
from probdiff.elbo.variance_reduction import LinearControl, RowNoise
from probdiff.networks.base import predict_noise
from probdiff.oracles import GaussianMixture, GaussianOracle, exact_terms
from probdiff.programs.sites import PARAMS

pytestmark = [pytest.mark.usefixtures("own_estimator"), pytest.mark.xdist_group("estimators")]  # its tests share what is costly to make

N = 10
SCHEDULE = probdiff.log_snr_schedule(N, 4.0, -1.0)
GAUSSIAN = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
MIXTURE = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.4]], [[[0.2, 0.1], [0.1, 0.3]], [[0.4, 0.0], [0.0, 0.1]]])
GIVEN = GaussianOracle(GAUSSIAN.mean, GAUSSIAN.covariance, [[0.9, -0.2, 0.0], [0.3, 0.5, -0.8]])
X = np.array([[0.1, -0.2], [1.5, 0.4], [-0.7, -1.0]])
CONTEXT = np.array([[1.0, 0.0, -1.0], [-0.5, 2.0, 0.3], [0.2, -1.1, 1.5]])
OWN = [*own_part("estimator").added]  # a user's, with those of the package
NAMES = sorted(probdiff.ESTIMATORS) + OWN
DRAWS = {"one": 150_000, "all": 30_000}


class Tilted(eqx.Module):
    """An exact network made wrong by two parameters: its scale and a shift that grows with n."""

    scale: jax.Array
    shift: jax.Array
    network: Callable

    def __call__(self, z, n):
        return self.scale * self.network(z, n) + self.shift * n.astype(z.dtype)[..., None] / N


class TiltedGiven(Tilted):
    """The same of a conditional model."""

    def __call__(self, z, n, *, context):
        return self.scale * self.network(z, n, context=context) + self.shift * n.astype(z.dtype)[..., None] / N


class TiltedBoth(Tilted):
    """The same, and the second output that predicts the variance β_n."""

    def __call__(self, z, n):
        return jnp.stack([super().__call__(z, n), jnp.ones_like(z)], -1)


class Variances(probdiff.networks.VarianceHead):
    """Of a network whose parameters are read through the head."""

    scale = property(lambda self: self.network.scale)
    shift = property(lambda self: self.network.shift)


def make(oracle=GAUSSIAN, **kwargs):
    exact = oracle.network(SCHEDULE) if oracle is GIVEN else probdiff.Diffusion(SCHEDULE, oracle.network(SCHEDULE)).predict_noise  # by the step
    predicted = kwargs.get("reverse_variance") == "predicted"
    network = (TiltedGiven if oracle is GIVEN else TiltedBoth if predicted else Tilted)(jnp.array(0.8), jnp.array(0.1), exact)
    network = Variances(network) if predicted else network
    return probdiff.Diffusion(SCHEDULE, network, **kwargs)


def beside_data(diffusion, times=1):
    """What is given beside X, so many times over."""
    return {"context": jnp.tile(jnp.asarray(CONTEXT), (times, 1))} if diffusion.is_conditional else {}


def learn(diffusion, elbo, updates=200):
    """What the estimator has learned after some updates on other draws, by site."""
    state = getattr(elbo, "initial_state", {})
    if state:
        many = jnp.tile(jnp.asarray(X), (20, 1))

        def update(state, key):
            given = beside_data(diffusion, 20)
            return elbo.loss_with_mutable_state(key, state, diffusion.model, elbo.guide, many, **given)["mutable_state"], None

        state = jax.jit(lambda s: jax.lax.scan(update, s, jax.random.split(jax.random.key(11), updates))[0])(state)
    return state


def draw(name, diffusion, **options):
    """Draws of the bound of X and of its gradient in the two parameters, shape (draw, 3)."""
    guide, elbo = probdiff.ESTIMATORS[name](diffusion, **options)
    learned = learn(diffusion, elbo)
    own = diffusion.trainable()

    def one(key):
        def bound(scale, shift):
            params = eqx.tree_at(lambda d: (d.network.scale, d.network.shift), own, (scale, shift))
            given = beside_data(diffusion)
            return -elbo.loss(key, {"diffusion$params": params, **learned}, diffusion.model, guide, jnp.asarray(X), **given)

        value, gradient = jax.value_and_grad(bound, (0, 1))(own.network.scale, own.network.shift)
        return jnp.stack([value, *gradient])

    size = DRAWS["all" if getattr(elbo, "evaluations", N) == N else "one"]
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=1000))(jax.random.split(jax.random.key(1), size)))


@functools.cache
def drawn(name, oracle, reverse_variance):
    return draw(name, make(oracle, reverse_variance=reverse_variance))


def exact(reverse_variance, oracle=GAUSSIAN):
    """Bound of X and its gradient by the closed form of the linear-Gaussian chain and central differences."""

    def bound(scale, shift):
        linear = oracle.network(SCHEDULE, scale)
        network = eqx.tree_at(lambda net: net.bias, linear, linear.bias + shift * np.arange(1, N + 1)[:, None] / N)
        diffusion = probdiff.Diffusion(SCHEDULE, network, reverse_variance=reverse_variance)
        return exact_terms(diffusion, X, context=CONTEXT if oracle is GIVEN else None)["elbo"].sum()

    s, b, h = 0.8, 0.1, 1e-5
    slopes = [bound(s + h, b) - bound(s - h, b), bound(s, b + h) - bound(s, b - h)]
    return np.array([bound(s, b), *(slope / (2 * h) for slope in slopes)])


# The discrepancies to catch, in nats and nats per unit of the parameter: each bug of the list below makes one at least.
POWER = np.array([0.5, 3.0, 3.0])


CASES = [(name, "posterior", GAUSSIAN) for name in NAMES] + [(name, "forward", GAUSSIAN) for name in ("trace", "kl_path", "kl_combined")]
CONDITIONAL = [(name, "posterior", GIVEN) for name in NAMES]
# One of each kind: paths with log densities and with KL divergences, one step and all. The others differ in steps, noise and control alone.
PREDICTED = [(name, "predicted", GAUSSIAN) for name in ("trace", "kl_path", "kl_marginal", "kl_combined")]
QUICK = [case for case in CASES + CONDITIONAL if (case[2] is GAUSSIAN and case[0] not in OWN) or case[0] in ("trace", "kl_combined")]
QUICK += [("kl_combined", "predicted", GAUSSIAN)]


EVERY = CASES + CONDITIONAL + PREDICTED


@pytest.mark.parametrize(
    "name, reverse_variance, oracle", long_but(QUICK, EVERY, [case for case in EVERY if case not in QUICK and (case[0] not in OWN or case[2] is GIVEN)])
)
def test_value_and_gradient_against_the_closed_form(name, reverse_variance, oracle, float64):
    known = "forward" if reverse_variance == "predicted" else reverse_variance  # as β_n is what is predicted
    assert_mean(drawn(name, oracle, reverse_variance), exact(known, oracle), power=POWER)


@pytest.mark.long
@pytest.mark.parametrize("name", release_but(["kl_combined"], NAMES))
def test_every_pair_agrees_on_a_mixture(name, float64):
    draws = drawn(name, MIXTURE, "posterior")
    error = draws.std(0) / np.sqrt(len(draws))
    assert np.all(9.7 * error < POWER)
    for other in NAMES[: NAMES.index(name)]:
        others = drawn(other, MIXTURE, "posterior")
        z = (draws.mean(0) - others.mean(0)) / np.hypot(error, others.std(0) / np.sqrt(len(others)))
        assert np.abs(z).max() <= Z_MAX, f"{name} against {other}: {z}"


def _clip_first_variance(self, schedule):
    return np.concatenate([schedule.posterior_variance[1:2], schedule.posterior_variance[1:]])


def _swapped(self, schedule):
    ratio = self.variance(schedule)[1:] / schedule.posterior_variance[1:]
    return np.concatenate([[0.0], (ratio - 1 - np.log(ratio)) / 2])


def _index_off_by_one(network, z, log_snr, n, key=None, context=None):
    return network(z, jnp.maximum(n - 1, 1))


def _all_but_last(self, key, size, num_steps, probability=None):
    n = jnp.broadcast_to(jnp.arange(1, num_steps)[:, None], (num_steps - 1, size))
    return n, jnp.ones(n.shape)


def _one_step_fewer(self, key, size, num_steps, probability=None):
    n = jax.random.randint(key, (1, size), 1, num_steps)
    return n, jnp.full(n.shape, num_steps - 1.0)


def _mean_for_sum(weight, n, noise, eps_hat):
    return weighted_error(weight, n, noise, eps_hat) / eps_hat.shape[-1]


BUGS = {
    "index off by one": ("kl_marginal", predict_noise, _index_off_by_one, "posterior"),
    "N - 1 for N": ("kl_uniform", proposal.OneStep.draw, _one_step_fewer, "posterior"),
    "last KL dropped": ("kl_marginal", proposal.AllSteps.draw, _all_but_last, "posterior"),
    "prior dropped": ("kl_marginal", prior_kl, lambda schedule, x0: 0 * x0[..., 0], "posterior"),
    "clipped variance at n = 1": ("kl_marginal", GaussianKernel.variance, _clip_first_variance, "posterior"),
    "swapped KL": ("kl_marginal", GaussianKernel.constant, _swapped, "forward"),
    "mean for sum": ("kl_marginal", weighted_error, _mean_for_sum, "posterior"),
}


@pytest.mark.long
@pytest.mark.parametrize("bug", long_but(["N - 1 for N", "swapped KL"], BUGS))
def test_deliberate_bugs_are_seen(bug, float64, patched):
    """With the bug in, the test above fails; the closed form does not have it."""
    name, right, wrong, reverse_variance = BUGS[bug]
    expected = exact(reverse_variance)
    patched(right, wrong)
    draws = draw(name, make(reverse_variance=reverse_variance))
    with pytest.raises(AssertionError, match="z = "):
        assert_mean(draws, expected, power=POWER)


# Each kind of steps, and each noise with and without a control variate.
@pytest.mark.long
@pytest.mark.parametrize(
    "steps, control, noise",
    [
        ("uniform", None, "independent"),
        ("stratified", None, "antithetic"),
        ("importance", "linear", "independent"),
        ("stratified_importance", "linear", "antithetic"),
    ],
)
def test_one_step_estimators_enumerated(steps, control, noise, float64, patched):
    """The estimator's own output for every n, with its own p_n and fixed noise, adds up to that of all steps."""
    diffusion, x = make(), jnp.asarray(X[:1])
    eps = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2)))
    signs = jnp.array([1.0, -1.0]) if noise == "antithetic" else jnp.ones(1)
    patched(RowNoise.__call__, lambda self, rows: signs[rows % self.copies, None, None] * eps)
    elbo = probdiff.AnalyticELBO(diffusion, steps, noise=noise, control=control)
    learned = learn(diffusion, elbo)
    drawn_step = proposal.OneStep.draw

    def forced(n):
        probability = []

        def draw_n(self, key, size, num_steps, probabilities=None):
            keys = jax.random.split(jax.random.key(0), 5000)
            step, inverse = (a.ravel() for a in jax.vmap(lambda k: drawn_step(self, k, 1, num_steps, probabilities))(keys))
            probability.append(1 / inverse[jnp.argmax(step == n)])
            return jnp.full((1, size), n), jnp.full((1, size), 1 / probability[-1])

        patched(drawn_step, draw_n)
        return -elbo.loss(jax.random.key(5), learned, diffusion.model, elbo.guide, x), probability[-1]

    bound, probability = jax.jit(lambda n: jax.lax.map(forced, n))(jnp.arange(1, N + 1))
    total = bound @ probability
    assert probability.sum() == pytest.approx(1, rel=1e-12)
    everything = probdiff.AnalyticELBO(diffusion, "all", noise=noise)
    expected = -everything.loss(jax.random.key(5), {}, diffusion.model, diffusion.guide, x)
    if control is not None:
        patched(drawn_step, drawn_step)
        rows = elbo._sampled_terms(diffusion, x, x, jnp.ones(1), jax.random.key(5), learned.get(LEARNED))
        n = jnp.arange(1, N + 1)[:, None]
        for sign in signs:
            noise_n = jnp.broadcast_to(sign * eps, (N, 1, 2))
            z = diffusion.sampled_step(x, x, n, noise_n).z
            expected += (rows.coefficient @ rows.control.value(z, n, noise_n)).sum() / len(signs)
        expected -= rows.control.expected(rows.coefficient, x).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-12)


@pytest.mark.long
def test_control_variate_by_quadrature(float64):
    """Its expectation at any x0, Gauss-Hermite over eps: exact for a quadratic."""
    diffusion, x0 = make(), jnp.asarray(X)
    control = LinearControl(diffusion, x0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    eps = jnp.asarray(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 1, 2)) + jnp.zeros((1, 3, 1))
    mass = jnp.asarray(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    coefficient = jnp.asarray(np.random.default_rng(0).normal(size=N))
    total = 0.0
    for k in range(1, N + 1):
        n = jnp.full(eps.shape[:2], k)
        z = diffusion.sampled_step(x0, x0, n, eps).z
        total += coefficient[k - 1] * mass @ control.value(z, n, eps)
    np.testing.assert_allclose(control.expected(coefficient, x0), total, rtol=1e-10)


def test_control_variate_is_the_best_linear_prediction(float64):
    """On Gaussian data of these moments it is the excess of the oracle's network."""
    diffusion, x0 = make(), jnp.asarray(X)
    covariance = np.cov(X.T, bias=True) + 1e-9 * np.eye(2)
    network = GaussianOracle(X.mean(0), covariance).network(SCHEDULE)
    n, eps = jnp.array([[1, 4, N]]), jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 2)))
    z = diffusion.sampled_step(x0, x0, n, eps).z
    squared = jnp.square(eps - network(z, n)).sum(-1)
    expected = diffusion.kernel.kl_weight(SCHEDULE)[np.asarray(n) - 1] * squared
    np.testing.assert_allclose(LinearControl(diffusion, x0).value(z, n, eps), expected, rtol=1e-6)


def test_posterior_noise_by_brute_force(float64):
    points, z, n = jnp.asarray(X), jnp.asarray([[[0.3, 0.1], [1.0, -2.0]]]), jnp.array([[5, 9]])
    moments = noise_module.PosteriorNoise(points)(SCHEDULE, z, n)
    for k in range(2):
        signal = np.sqrt(SCHEDULE.alpha_bar[n[0, k] - 1])
        noise = np.sqrt(1 - signal**2)
        eps = (np.asarray(z[0, k]) - signal * X) / noise
        weight = scipy.stats.norm.pdf(eps).prod(1)
        weight /= weight.sum()
        mean = weight @ eps
        np.testing.assert_allclose(moments.mean[0, k], mean, rtol=1e-10)
        np.testing.assert_allclose(moments.variance[0, k], weight @ (eps**2) - mean**2, rtol=1e-9)


class GivenNoise(probdiff.elbo.AbstractNoise):
    """The same noise for all terms and data."""

    eps: jax.Array
    copies = 1

    def draw(self, key, schedule, x0):
        return lambda rows: jnp.full((len(rows), *x0.shape), self.eps)


def test_the_posterior_target_of_a_batch_has_the_gradient_of_the_bound_by_quadrature(float64):
    """Whatever the data: the expected value and gradient of each are integrals over the noise, of smooth functions of one variable."""
    x, schedule = jnp.array([[-0.5], [0.1], [1.2]]), probdiff.log_snr_schedule(6, 4.0, -4.0)
    network = Tilted(jnp.array(1.2), jnp.array(0.3), GaussianOracle([0.2], [[0.4]]).network(schedule))
    diffusion = probdiff.Diffusion(schedule, network)
    nodes = jnp.linspace(-11, 11, 441)
    weight = scipy.stats.norm.pdf(nodes) * float(nodes[1] - nodes[0])

    def integrated(points):
        def loss(params, eps):
            elbo = probdiff.AnalyticELBO(diffusion, "all", noise=GivenNoise(eps), points=points)
            return elbo.loss(jax.random.key(0), {PARAMS: params}, diffusion.model, diffusion.guide, x)

        each = jax.vmap(jax.value_and_grad(loss), (None, 0))(diffusion.trainable(), nodes)
        return each[0], [weight @ leaf for leaf in jax.tree.leaves(each)]

    (of_batch, batch), (of_each, each) = integrated("batch"), integrated(None)
    assert np.abs(of_batch - of_each).max() > 1  # for one noise the two differ
    np.testing.assert_allclose(batch, each, rtol=1e-12)


@pytest.mark.long
def test_posterior_target_of_a_whole_set(float64):
    """Minibatches from the set, the target over all of it: the mean over the set."""
    diffusion = make()
    data = GAUSSIAN.sample(np.random.default_rng(0), 40)
    guide, elbo = probdiff.ESTIMATORS["kl_posterior_target"](diffusion, points=data)

    def one(key):
        batch_key, key = jax.random.split(key)
        batch = jnp.asarray(data)[jax.random.randint(batch_key, (5,), 0, 40)]
        return -elbo.loss(key, getattr(elbo, "initial_state", {}), diffusion.model, guide, batch) / 5

    draws = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 20_000))
    whole = probdiff.elbo_terms(diffusion, data, key=jax.random.key(4), num_draws=2000).elbo.mean()
    assert_mean(draws, whole, power=1.0)


@pytest.mark.release
def test_what_is_learned_lowers_the_variance(float64):
    """Learned probabilities, control variate, and all of it, for values."""
    schedule = probdiff.log_snr_schedule(40, 8.0, -4.0)
    diffusion = probdiff.Diffusion(schedule, MIXTURE.network(schedule))
    x = jnp.asarray(GAUSSIAN.sample(np.random.default_rng(0), 64))

    def variance(name):
        _, elbo = probdiff.ESTIMATORS[name](diffusion, **({} if name == "kl_uniform" else {"adapt_to": "value"}))
        learned = learn(diffusion, elbo)
        losses = jax.jit(jax.vmap(lambda k: elbo.loss(k, learned, diffusion.model, elbo.guide, x)))
        return float(losses(jax.random.split(jax.random.key(2), 2000)).var())

    values = {name: variance(name) for name in ("kl_uniform", "kl_importance", "kl_controlled", "kl_combined")}
    assert values["kl_importance"] < 0.7 * values["kl_uniform"], values
    assert values["kl_controlled"] < 0.7 * values["kl_uniform"], values
    assert values["kl_combined"] < 0.5 * min(values["kl_importance"], values["kl_controlled"]), values


@pytest.mark.long
def test_the_proposal_is_proportional_to_the_root_mean_square(float64):
    diffusion = make()
    elbo = probdiff.AnalyticELBO(diffusion, "importance", adapt_to="value")
    learned = learn(diffusion, elbo, updates=600)
    p = np.asarray(elbo._learner.probability(learned[LEARNED], "value", jnp.zeros(N)))
    assert p.sum() == pytest.approx(1) and np.all(p >= proposal.UNIFORM_SHARE / N)
    terms = probdiff.elbo_terms(diffusion, X, key=jax.random.key(0), num_draws=4000)
    ideal = np.sqrt(np.square(terms.step_kl).mean((0, 2)))
    np.testing.assert_allclose(p[1:] / p[1:].sum(), ideal / ideal.sum(), rtol=0.15)


@pytest.mark.parametrize("draw", [proposal.independent_uniforms, proposal.stratified_uniforms])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("size, num_steps", [(1, 1), (4, 3), (7, 10)])
def test_steps_have_their_probability_at_every_place_of_the_batch(draw, learned, size, num_steps):
    keys = jax.random.split(jax.random.key(0), 20_000)
    p = np.arange(1.0, num_steps + 1) / np.arange(1, num_steps + 1).sum() if learned else np.full(num_steps, 1 / num_steps)
    given = jnp.asarray(p) if learned else None
    n, inverse = jax.vmap(lambda key: proposal.OneStep(draw, learned).draw(key, size, num_steps, given))(keys)
    n, inverse = np.asarray(n)[:, 0], np.asarray(inverse)[:, 0]
    np.testing.assert_allclose(inverse, 1 / p[n - 1], rtol=1e-5)
    for place in range(size):
        counts = np.bincount(n[:, place], minlength=num_steps + 1)
        assert counts[0] == 0 and len(counts) == num_steps + 1
        assert num_steps == 1 or scipy.stats.chisquare(counts[1:], p * len(keys)).pvalue > 1e-6


def test_stratified_steps_cover_the_chain_evenly():
    keys = jax.random.split(jax.random.key(0), 200)
    draw = proposal.OneStep(proposal.stratified_uniforms).draw
    n = np.asarray(jax.vmap(lambda key: draw(key, 40, 20)[0][0])(keys))
    assert all(np.bincount(row, minlength=21)[1:].min() >= 1 and np.bincount(row).max() <= 3 for row in n)


def small(num_steps=12):
    return probdiff.Diffusion(
        probdiff.log_snr_schedule(num_steps, 4.0, -4.0), probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1)
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "name, num_particles",
    release_but(
        [("mean_field", 1), ("kl_combined", 3)],
        [*((name, 1) for name in NAMES if name != "kl_combined"), ("kl_combined", 3)],
    ),
)
def test_every_estimator_drops_into_svi(name, num_particles):
    diffusion = small()
    x = jnp.asarray(GAUSSIAN.sample(np.random.default_rng(0), 16), jnp.float32)
    guide, elbo = probdiff.ESTIMATORS[name](diffusion, num_particles=num_particles)
    svi = SVI(diffusion.model, guide, optax.adam(1e-2), elbo)
    result = svi.run(jax.random.key(0), 150, x, progress_bar=False)
    assert np.all(np.isfinite(result.losses)) and result.losses[-50:].mean() < 0.8 * result.losses[:3].mean()
    state = result.state.mutable_state
    learns = bool(getattr(elbo, "initial_state", {}))
    assert (state is not None) == learns
    if learns:
        # After many updates of 16 terms each, the decayed count is near 16 / (1 - decay) times 1 - decay^updates.
        expected = 16 * (1 - proposal.DECAY**150) / (1 - proposal.DECAY)
        assert state[LEARNED]["visits"].sum() == pytest.approx(expected, rel=0.25)


@pytest.mark.long
def test_without_the_guide_it_says_that_it_learns_nothing():
    diffusion, x = small(), jnp.zeros((4, 2))
    elbo = probdiff.AnalyticELBO(diffusion, "importance")
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), elbo)
    with pytest.warns(UserWarning, match="learns nothing.*objective.guide"):
        state, loss = jax.jit(lambda x: svi.update(svi.init(jax.random.key(0), x), x))(x)
    assert np.isfinite(loss) and state.mutable_state is None
    svi = SVI(diffusion.model, elbo.guide, optax.adam(1e-3), elbo)

    def update_and_evaluate(x):
        state, _ = svi.update(svi.init(jax.random.key(0), x), x)
        return state.mutable_state, svi.evaluate(state, x)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learned, _ = jax.eval_shape(update_and_evaluate, x)  # it is traced that warns
        assert LEARNED in learned


@pytest.mark.long
def test_an_update_leaves_the_old_state_as_it_was():
    diffusion, x = small(), jnp.ones((4, 2))
    guide, elbo = probdiff.ESTIMATORS["kl_combined"](diffusion)
    svi = SVI(diffusion.model, guide, optax.adam(1e-3), elbo)
    state = jax.jit(svi.init)(jax.random.key(0), x)
    jax.jit(svi.update)(state, x)
    assert state.mutable_state[LEARNED]["visits"].sum() == 0


@pytest.mark.long
def test_what_is_learned_is_in_the_checkpoint(tmp_path):
    diffusion = small()
    x = GAUSSIAN.sample(np.random.default_rng(0), 64).astype(np.float32)

    def run(iterations, name):
        return probdiff.fit(
            diffusion,
            x,
            iterations=iterations,
            batch_size=16,
            learning_rate=optax.adam(1e-2),
            elbo=probdiff.ESTIMATORS["kl_combined"](diffusion)[1],
            checkpoint=probdiff.storage.Checkpoint(tmp_path / name),
            validate_every=10,
            progress=False,
        ).state

    run(20, "halved.npz")
    resumed, whole = run(40, "halved.npz"), run(40, "whole.npz")
    assert whole.svi.mutable_state[LEARNED]["visits"].sum() > 0
    a, b = (jax.tree.leaves((s.svi.optim_state, s.svi.mutable_state)) for s in (resumed, whole))
    assert len(a) > 7 and all(np.array_equal(first, second) for first, second in zip(a, b))


@pytest.mark.long
def test_the_coefficient_is_the_best_there_is(float64):
    """E[term · control] / E[control²] of each step, by direct sampling."""
    diffusion = make()
    elbo = probdiff.AnalyticELBO(diffusion, "uniform", control="linear")
    learned = learn(diffusion, elbo, updates=600)[LEARNED]
    x, control = jnp.asarray(X), LinearControl(diffusion, jnp.asarray(X))
    n = jnp.broadcast_to(jnp.arange(1, N + 1)[:, None, None], (N, 4000, 3)).reshape(-1, 3)
    eps = jax.random.normal(jax.random.key(0), (*n.shape, 2))
    step = diffusion.sampled_step(x, x, n, eps)
    term = excess.BoundTerm()(diffusion, step)
    value = control.value(step.z, n, eps)
    best = (term * value).reshape(N, -1).mean(1) / (value**2).reshape(N, -1).mean(1)
    np.testing.assert_allclose(elbo._learner.coefficient(learned), best, rtol=0.1)
