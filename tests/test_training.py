"""The SVI loop: it learns, resumes bit for bit, averages parameters, and keeps the best."""

import warnings
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import long_but, release_but, set_constant
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from tqdm import tqdm

import probdiff
from probdiff import training
from probdiff.oracles import GaussianOracle, LinearNetwork, exact_terms
from probdiff.programs.sites import PARAMS
from probdiff.training.minibatches import Minibatches

ORACLE = GaussianOracle([1.0, -2.0], [[2.0, 0.8], [0.8, 0.5]])


@pytest.fixture(autouse=True)
def short_validation(constant):
    constant("VALIDATION_ROWS", 2**12)


def make(num_steps=20, **kwargs):
    network = probdiff.MLP(2, key=jax.random.key(0), hidden=32, num_blocks=1, **kwargs)
    schedule = probdiff.log_snr_schedule(num_steps, 5.0, -5.0)
    likelihood = probdiff.NormalLikelihood.standardized(ORACLE.sample(np.random.default_rng(1), 1000))
    return probdiff.Diffusion(schedule, network, likelihood, reverse_variance="forward")


X = ORACLE.sample(np.random.default_rng(0), 4000).astype(np.float32)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.release
def test_a_fit_reaches_the_best_bound_and_does_not_pass_it():
    """On Gaussian data the best bound is known: the fit comes within 0.05 nats, and below it by its error at most."""
    fit = probdiff.fit(make(), X, iterations=3000, batch_size=256, learning_rate=5e-3, progress=False)
    assert fit.losses.shape == (3000,) and np.all(np.isfinite(fit.losses))
    x = ORACLE.sample(np.random.default_rng(2), 4000).astype(np.float32)
    oracle = GaussianOracle(
        fit.diffusion.likelihood.encode(jnp.asarray(ORACLE.mean)),
        ORACLE.covariance / np.outer(fit.diffusion.likelihood.scale, fit.diffusion.likelihood.scale),
    )
    best = probdiff.Diffusion(
        fit.diffusion.schedule, oracle.network(fit.diffusion.schedule), fit.diffusion.likelihood, "forward"
    )
    terms = probdiff.elbo_terms(fit.diffusion, x, key=jax.random.key(3), num_draws=40, reduce=True)
    excess = exact_terms(best, x)["elbo"] - np.asarray(terms.elbo.mean)
    error = np.sqrt(np.sum(terms.elbo.variance) / 40) / len(x)
    assert error < 0.005
    assert -4.9 * error < excess.mean() < 0.05


@pytest.mark.long
@pytest.mark.parametrize("elbo", [Trace_ELBO(), *(pytest.param(each, marks=pytest.mark.release) for each in (TraceMeanField_ELBO(), None))])
def test_any_numpyro_objective(elbo):
    fit = probdiff.fit(make(5), X[:200], iterations=30, batch_size=64, elbo=elbo, progress=False)
    assert fit.losses[-5:].mean() < fit.losses[:5].mean()


@pytest.mark.release
def test_loss_is_nats_per_datum():
    diffusion = make(5)
    losses = [
        probdiff.fit(diffusion, X, iterations=20, batch_size=b, learning_rate=1e-9, progress=False).losses.mean()
        for b in (50, 500)
    ]
    bound = probdiff.elbo_terms(diffusion, X[:500], key=jax.random.key(0), num_draws=5).elbo.mean()
    np.testing.assert_allclose(losses, -bound, rtol=0.1)


class Interrupt:
    """A checkpoint that saves in memory, and is interrupted at some save."""

    def __init__(self, at=None):
        self.state, self.saves, self.at = None, 0, at

    def load(self, template):
        return self.state

    def save(self, state):
        self.state, self.saves = state, self.saves + 1
        if self.saves == self.at:
            raise KeyboardInterrupt


@pytest.mark.long
def test_a_resumed_fit_is_the_uninterrupted_one_bit_for_bit():
    arguments = dict(iterations=70, batch_size=32, validation=X[:50], validate_every=20, progress=False)
    whole = probdiff.fit(make(dropout=0.2), X, **arguments)
    checkpoint = Interrupt(at=2)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(dropout=0.2), X, checkpoint=checkpoint, **arguments)
    assert len(checkpoint.state.losses) == 40
    resumed = probdiff.fit(make(dropout=0.2), X, checkpoint=checkpoint, **arguments)
    assert np.array_equal(whole.losses, resumed.losses) and np.array_equal(whole.validation, resumed.validation)
    assert same(whole.diffusion, resumed.diffusion)
    keys = [jax.random.key_data(f.state.svi.rng_key) for f in (whole, resumed)]
    assert np.array_equal(*keys) and same(whole.state.svi.optim_state, resumed.state.svi.optim_state)


def test_the_bar_of_a_resumed_fit_counts_its_own_updates(monkeypatch):
    """Its rate and the time that is left are not those of updates before."""
    seen = []

    class Bar(tqdm):
        def update(self, n):
            seen.append((self.initial, self.n, self.last_print_n))
            super().update(n)

    monkeypatch.setattr(training.fitting, "tqdm", Bar)
    checkpoint, arguments = Interrupt(at=2), dict(iterations=70, batch_size=32, validation=X[:50], validate_every=20)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(dropout=0.2), X, checkpoint=checkpoint, **arguments)
    seen.clear()
    probdiff.fit(make(dropout=0.2), X, checkpoint=checkpoint, **arguments)
    assert seen[0] == (40, 40, 40)


@pytest.mark.long
def test_ctrl_c_saves_the_iterations_since_the_last_checkpoint(patched):
    checkpoint, chunks = Interrupt(), []
    advance = training.loop.Loop.advance

    def interrupted(self, *arguments):
        chunks.append(1)
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return advance(self, *arguments)

    patched(advance, interrupted)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(5), X, iterations=1000, checkpoint=checkpoint, progress=False)
    assert len(checkpoint.state.losses) == 200


def test_a_fit_with_minutes_ends_with_its_time(monkeypatch, patched):
    """Five seconds are compiled and a tenth is an update: there is time for 550 in a minute, whether it is interrupted or not, and for as many as the rest in another leg."""
    now, advance, spent, checkpoint = [0.0], training.loop.Loop.advance, [], Interrupt(at=2)
    monkeypatch.setattr(training.clock, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def timed(self, state, count):
        now[0] += 0.1 * count + (0 if len(state.losses) else 5)
        spent.append(float(optax.tree_utils.tree_get(state.svi.optim_state, "spent")))
        return advance(self, state, count)

    patched(advance, timed)
    arguments = dict(batch_size=8, validate_every=150, checkpoint=checkpoint, progress=False)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(5), X, minutes=1, **arguments)
    now[0] = 1e6  # in between nothing is counted
    fit = probdiff.fit(make(5), X, minutes=1, **arguments)
    assert len(fit.losses) == 550
    # Of the first hundred, in which it was compiled, nothing is learned; after 150 there is time for 400 more.
    np.testing.assert_allclose(spent[:4], [0, 0, 0, 100 / 400], atol=1e-3)
    np.testing.assert_allclose(optax.tree_utils.tree_get(fit.state.svi.optim_state, "spent"), 1, atol=1e-3)
    assert np.all(np.diff(spent) >= 0)
    assert len(probdiff.fit(make(5), X, minutes=1, **arguments).losses) == 550
    assert len(probdiff.fit(make(5), X, minutes=2, **arguments).losses) == 1150
    for bad, message in (
        ({"minutes": 0}, "minutes: Expected a positive number; got 0"),
        ({"minutes": 1, "iterations": 5}, "iterations: Expected none with minutes; got 5"),
        ({"minutes": 1, "learning_rate": optax.adam(1e-3)}, "learning_rate: Expected a number, with minutes"),
        ({"iterations": 2000}, "minutes: Expected 2.0, as in the fit of the checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            probdiff.fit(make(5), X, **arguments | bad)


def test_the_learning_rate_of_a_pace_is_the_cosine_of_so_many_updates():
    """At a steady pace: that of a fit of so many iterations, with the same warm-up."""
    count, optimiser = 2000, training.optimiser.scale_by_pace(0.5)
    state = optax.tree_utils.tree_set(optimiser.init({"x": jnp.zeros(())}), pace=1 / count)
    step = jax.jit(lambda state: optimiser.update({"x": jnp.ones(())}, state))
    rates = []
    for _ in range(count):
        change, state = step(state)
        rates.append(-float(change["x"]))
    n = np.arange(count)
    np.testing.assert_allclose(rates, 0.5 * np.minimum(1, n / training.optimiser.WARM_UP) * np.cos(np.pi * n / count / 2) ** 2, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 1, 9, 5), (6, 4, 3, 3)])
def test_the_update_of_a_convolution_has_its_singular_vectors_and_the_size_of_adams(shape):
    """It is a matrix from what it sees to its outputs, whether these are the last axis or, as in equinox, the first."""
    update = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sides = (shape[0], -1) if shape[0] >= shape[-1] else (-1, shape[-1])
    changed = training.orthogonalised_convolutions().update(jnp.asarray(update), None)[0]
    old, new = (np.asarray(array, np.float64).reshape(sides) for array in (update, changed))
    left, _, right = np.linalg.svd(old, full_matrices=False)
    values = left.T @ new @ right.T / (0.2 * np.sqrt(max(old.shape)))
    np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-4)
    assert np.all((np.diag(values) > 0.65) & (np.diag(values) < 1.25))


def test_only_convolutions_decay():
    optimiser = training.optimiser.build_optimiser(0.1, 50, 0.9)
    start = {str(ndim): jnp.ones((2,) * ndim) for ndim in range(5)}
    slope = jax.tree.map(jnp.zeros_like, start)
    params, state = start, optimiser.init(start)
    for _ in range(50):
        updates, state = optimiser.update(slope, state, params)
        params = optax.apply_updates(params, updates)
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 50)
    kept = np.prod([1 - training.optimiser.WEIGHT_DECAY * rate(t) for t in range(50)])
    np.testing.assert_allclose(params.pop("4"), kept, rtol=1e-5)
    assert kept < 0.7 and all(np.all(value == 1) for value in params.values())


@pytest.mark.release
def test_the_default_objective_knows_the_minibatch_where_the_kl_has_a_closed_form():
    gaussian = make(5)
    network = probdiff.networks.CategoricalHead(probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, outputs=3), 3)
    mixture = probdiff.Diffusion(
        gaussian.schedule, network, probdiff.DiscretizedNormalLikelihood(3), kernel=probdiff.chain.MixtureKernel(3)
    )
    for diffusion, points, data in ((gaussian, "batch", X), (mixture, None, np.random.default_rng(0).integers(0, 3, (50, 2)))):
        elbo = probdiff.AnalyticELBO(diffusion, "stratified_importance", points=points)
        losses = [probdiff.fit(diffusion, data, iterations=3, batch_size=8, elbo=e, progress=False).losses for e in (None, elbo)]
        assert np.array_equal(*losses)


@pytest.mark.release
def test_a_fit_that_was_begun_with_adam_goes_on():
    """As were those of before: the optimiser now keeps the same numbers."""
    plain = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 4, 40))
    arguments = dict(iterations=40, batch_size=16, validate_every=20, progress=False)
    checkpoint = Interrupt(at=1)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(5), X, checkpoint=checkpoint, learning_rate=plain, **arguments)
    then = checkpoint.state
    template = training.loop.Loop(make(5), X, None, Minibatches(len(X), 16, None), training.optimiser.build_optimiser(1e-3, 40, 0.999), None, None).init(jax.random.key(0), {})
    leaves = jax.tree.leaves(then.svi)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in jax.tree.leaves(template.svi)]
    svi = jax.tree.unflatten(jax.tree.structure(template.svi), leaves)
    checkpoint.state = then._replace(svi=svi, settings=then.settings | {"iterations": 40, "learning_rate": 1e-3})
    fit = probdiff.fit(make(5), X, checkpoint=checkpoint, **arguments)
    assert np.array_equal(fit.losses[:20], then.losses) and fit.state.svi.optim_state[0] == 40
    assert np.all(np.isfinite(fit.losses))


def test_parameter_ema_averages_parameters():
    optimiser = optax.chain(optax.sgd(0.1), training.parameter_ema(0.9))
    params, average = jnp.array(1.0), 1.0
    state = optimiser.init(params)
    for t in range(1, 200):
        updates, state = optimiser.update(jnp.cos(params * t), state, params)
        params = optax.apply_updates(params, updates)
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * float(params)
    np.testing.assert_allclose(state[1].ema_params, average, rtol=1e-5)
    assert abs(average - float(params)) > 1e-3


@pytest.mark.long
def test_the_best_parameters_in_validation_are_the_result():
    """A learning rate that ruins the model late: the result is what did best before."""
    spoil = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda t: jnp.where(t < 60, -1e-2, -1.0)))
    fit = probdiff.fit(
        make(5),
        X,
        iterations=120,
        batch_size=64,
        learning_rate=spoil,
        validation=X[:200],
        validate_every=20,
        ema_decay=0.5,
        progress=False,
    )
    assert fit.validation[:, 1].argmax() < 3 and fit.validation[-1, 1] < fit.validation[:, 1].max() - 1
    assert float(fit.state.best_bound) == pytest.approx(fit.validation[:, 1].max(), rel=1e-6)
    bound = probdiff.elbo_terms(fit.diffusion, X[:200], key=jax.random.key(0), num_draws=3).elbo.mean()
    assert bound > fit.validation[-1, 1] + 1


class Line(eqx.Module):
    """The network w z, of one parameter."""

    weight: jax.Array

    def __call__(self, z, n):
        return self.weight * z


class Slope(Trace_ELBO):
    """Not a bound but a slope: the parameter falls by what the optimiser makes of it; each loss says where it was."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        return self.slope * param_map[PARAMS].network.weight


LINE_SCHEDULE = probdiff.log_snr_schedule(5, 4.0, -4.0)
DECAY = 0.95


def fit_line(iterations, start=0.0, slope=1.0, reverse_variance="forward", data=X, **kwargs):
    diffusion = probdiff.Diffusion(LINE_SCHEDULE, Line(jnp.array(start)), None, reverse_variance, dim=2)
    arguments = dict(batch_size=4, iterations=iterations, elbo=Slope(slope), ema_decay=DECAY, progress=False)
    return probdiff.fit(diffusion, data, **arguments | kwargs)


def line_bound(weight, x):
    """By closed form, of each datum."""
    network = LinearNetwork(np.tile(weight * np.eye(2), (5, 1, 1)), np.zeros((5, 2)))
    return exact_terms(probdiff.Diffusion(LINE_SCHEDULE, network, reverse_variance="forward"), x)["elbo"]


def averages(path):
    """The running average after each update, of the parameter at the start and after each."""
    found = [path[0]]
    for t, value in enumerate(path[1:], 1):
        decay = min(DECAY, (1 + t) / (10 + t))
        found.append(decay * found[-1] + (1 - decay) * value)
    return np.array(found)


@pytest.fixture(scope="module")
def validated_line():
    """A parameter that goes from -1 through its best to 2; the validation data are not alike."""
    x = np.random.default_rng(3).normal(0, 1, (40, 2)).astype(np.float32)
    x[20:] = 1.5 * x[20:] + 1
    with pytest.MonkeyPatch.context() as patch:
        set_constant(patch, "VALIDATION_ROWS", 2**14)
        fit = fit_line(90, -1.0, -1 / 30, learning_rate=optax.sgd(1.0), validation=x, validate_every=30)
    return fit, x, np.linspace(-1, 2, 91)


def test_without_validation_the_last_average_is_the_result():
    fit = fit_line(40, -1.0, -1 / 40, learning_rate=optax.sgd(1.0))
    path = np.linspace(-1, 0, 41)
    np.testing.assert_allclose(fit.losses, -path[:-1] / 40, atol=1e-6)  # it went where it was to go
    for network in (fit.diffusion.network, fit.params[PARAMS].network):
        assert float(network.weight) == pytest.approx(averages(path)[-1], abs=1e-5)
    assert averages(path)[-1] < path[-1] - 0.1


def test_with_validation_the_best_average_is_the_result(validated_line):
    fit, x, path = validated_line
    candidates = averages(path)[[30, 60, 90]]
    bounds = [line_bound(weight, x).mean() for weight in candidates]
    assert max(bounds[0], bounds[2]) < bounds[1] - 1 and abs(candidates[1] - path[60]) > 0.1
    for network in (fit.diffusion.network, fit.params[PARAMS].network):
        assert float(network.weight) == pytest.approx(candidates[1], abs=1e-5)


def test_validation_is_the_bound_of_the_averages_on_all_validation_data(validated_line):
    fit, x, path = validated_line
    expected, of_last, of_half = (
        np.array([line_bound(weight, rows).mean() for weight in weights[[30, 60, 90]]])
        for weights, rows in ((averages(path), x), (path, x), (averages(path), x[:20]))
    )
    np.testing.assert_array_equal(fit.validation[:, 0], [30, 60, 90])
    error = np.abs(fit.validation[:, 1] - expected)
    for other in (of_last, of_half):
        assert error.max() < 0.2 * np.abs(other - expected).max(), (error, other - expected)


def test_the_learning_rate_rises_to_the_number_given_and_falls_to_nothing_at_the_end(float64):
    """On a slope, Adam's steps are the learning rate; each is seen between two losses."""
    fit = fit_line(120, learning_rate=0.02)
    rate = -np.diff(fit.losses)
    top = int(rate.argmax())
    assert rate[top] == pytest.approx(0.02, rel=1e-5) and 0 < top < 60
    np.testing.assert_allclose(rate[:top], 0.02 * np.arange(top) / top, rtol=1e-5, atol=1e-12)
    phase = (np.arange(top, 119) - top) / (120 - top)
    np.testing.assert_allclose(rate[top:], 0.02 * (1 + np.cos(np.pi * phase)) / 2, rtol=1e-5)


def test_a_schedule_of_ones_own_for_the_learning_rate(float64):
    rates = np.where(np.arange(40) < 15, 0.03, 0.001)
    fit = fit_line(40, learning_rate=lambda count: jnp.asarray(rates)[count])
    np.testing.assert_allclose(-np.diff(fit.losses), rates[:-1], rtol=1e-5)


def test_the_optimal_variances_are_those_of_the_result_on_many_data():
    """Of a line, E|eps - w z|^2 is known. The first data are unlike the rest, the average unlike the last parameter."""
    rng = np.random.default_rng(4)
    x = np.concatenate([np.zeros((20, 2)), rng.normal(0, 3, (4000, 2))]).astype(np.float32)
    fit = fit_line(40, -1.0, -1 / 20, "optimal", x, learning_rate=optax.sgd(1.0))
    weight, schedule = averages(np.linspace(-1, 1, 41))[-1], LINE_SCHEDULE

    def variances(weight, x):
        square = np.square(np.asarray(x, np.float64)).mean()
        error = (1 - weight * schedule.noise_scale) ** 2 + weight**2 * schedule.alpha_bar * square
        return schedule.posterior_variance + schedule.beta**2 / (schedule.alpha * schedule.one_minus_alpha_bar) * error

    found = np.asarray(fit.diffusion.kernel.variance(schedule))[1:]
    # Relative error of a mean of 8040 squares, which are no more spread than those of a normal.
    np.testing.assert_allclose(found, variances(weight, x)[1:], rtol=4.9 * np.sqrt(2 / 8040))
    for other in (variances(weight, x[:20]), variances(1.0, x)):
        assert np.abs(found / other[1:] - 1).max() > 0.2


@pytest.mark.long
def test_the_optimal_variances_of_sorted_data_are_those_of_all_of_them(constant):
    """From a part of the rows, which the order of a file does not choose."""
    x = np.random.default_rng(4).normal(0, 3, (4000, 2)).astype(np.float32)
    x = x[np.argsort(np.square(x).sum(1))]
    constant("VARIANCE_ROWS", 1000 * LINE_SCHEDULE.num_steps)
    kernels = [fit_line(2, -1.0, -1 / 20, "optimal", data).diffusion.kernel for data in (x, x[::-1])]
    up, down = (np.asarray(kernel.variance(LINE_SCHEDULE))[1:] for kernel in kernels)
    np.testing.assert_allclose(up, down, rtol=4.9 * np.sqrt(2 * 2 / 2000))
    first = fit_line(2, -1.0, -1 / 20, "optimal", x[:1000]).diffusion.kernel.variance(LINE_SCHEDULE)
    assert np.abs(up / np.asarray(first)[1:] - 1).max() > 0.3


@pytest.mark.long
def test_ten_iterations_trace_once():
    traces = []

    def network_call(z, n):
        traces.append(1)
        return z

    class Network(probdiff.MLP):
        def __call__(self, z, n, *, key=None):
            traces.append(1)
            return super().__call__(z, n, key=key)

    network = Network(2, key=jax.random.key(0), hidden=8)
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), network)
    probdiff.fit(diffusion, X, iterations=300, batch_size=8, progress=False)
    assert len(traces) <= 3  # svi.init, and the scan of the update (which JAX may look at twice)


@pytest.mark.parametrize("what", long_but(["loss"], ["loss", "gradient"]))
def test_an_update_that_is_not_finite_is_skipped_and_counted(what):
    """One row of the data spoils each batch that it is in; the others are as good as ever."""
    data, diffusion = X.copy(), make(5)
    if what == "loss":
        data[7] = 1e20
    elbo = None
    if what == "gradient":

        class Elbo(probdiff.AnalyticELBO):
            def loss_with_mutable_state(self, rng_key, param_map, model, guide, x, *args, **kwargs):
                result = super().loss_with_mutable_state(rng_key, param_map, model, guide, x, *args, **kwargs)
                anchor = jax.tree.leaves(param_map)[0].sum()
                # Adds nothing to the loss, but a slope whose square overflows.
                spoil = jnp.where((x == X[7]).all(1).any(), 1e30, 0.0) * (anchor - jax.lax.stop_gradient(anchor))
                return result | {"loss": result["loss"] + spoil}

        elbo = Elbo(diffusion, "stratified")
    fit = probdiff.fit(diffusion, data, iterations=150, batch_size=64, elbo=elbo, progress=False)
    rows = [jax.random.randint(jax.random.fold_in(fit.state.keys[0], i), (64,), 0, len(data)) for i in range(150)]
    hit = np.array([bool((row == 7).any()) for row in rows])
    np.testing.assert_array_equal(np.isnan(fit.losses), hit)
    assert fit.skipped_updates == hit.sum() > 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fit.state.svi.optim_state))
    assert fit.state.svi.optim_state[0] == 150 - hit.sum()  # a skipped update changes nothing


@pytest.mark.release
def test_after_ten_in_a_row_the_fit_stops_and_says_which_batch():
    checkpoint = Interrupt()
    blow_up = optax.sgd(optax.piecewise_constant_schedule(1e-6, {150: 1e30}))
    with pytest.raises(FloatingPointError, match=r"10 iterations in a row, the first of them iteration 15\d, on rows \["):
        probdiff.fit(
            make(5), X, iterations=400, learning_rate=blow_up, validate_every=100, checkpoint=checkpoint, progress=False
        )
    assert len(checkpoint.state.losses) == 100
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(checkpoint.state.svi.optim_state))


CHANGES = [{"batch_size": 16}, {"iterations": 90}, {"weights": np.ones(len(X))}, {"learning_rate": 1e-2}, {"validation": X[:51]}, {"ema_decay": 0.9}]


@pytest.mark.long
@pytest.mark.parametrize(
    "changed", release_but(CHANGES[:2], CHANGES)
)
def test_a_resumed_fit_must_be_asked_for_the_same(changed):
    arguments = dict(iterations=70, batch_size=32, learning_rate=1e-3, validation=X[:50], validate_every=20, progress=False)
    checkpoint = Interrupt(at=1)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(), X, checkpoint=checkpoint, **arguments)
    ((name, value),) = changed.items()
    with pytest.raises(ValueError, match=f"{name}: Expected .* as in the fit of the checkpoint"):
        probdiff.fit(make(), X, checkpoint=checkpoint, **arguments | changed)


def test_a_fit_that_has_ended_goes_on_in_another_leg(float64):
    """From its result, as a fit of its own; the history goes on. Again, and only after its end."""
    checkpoint = Interrupt()
    first = fit_line(40, -1.0, learning_rate=0.02, checkpoint=checkpoint)
    assert checkpoint.state.settings["begun"] == 0
    start, done = float(first.diffusion.network.weight), 40
    for more in (90, 100):
        fit = fit_line(more, -1.0, learning_rate=0.02, checkpoint=checkpoint)
        alone = fit_line(more - done, start, learning_rate=0.02)
        np.testing.assert_array_equal(fit.losses[:done], first.losses)
        np.testing.assert_allclose(fit.losses[done:], alone.losses, rtol=1e-12)
        assert float(fit.diffusion.network.weight) == pytest.approx(float(alone.diffusion.network.weight), rel=1e-12)
        assert checkpoint.state.settings["begun"] == done and checkpoint.state.settings["iterations"] == more
        first, start, done = fit, float(fit.diffusion.network.weight), more
    with pytest.raises(ValueError, match="iterations: Expected 100, as in the fit .* or more if that has ended; got 90"):
        fit_line(90, -1.0, learning_rate=0.02, checkpoint=checkpoint)


@pytest.mark.release
def test_a_later_leg_is_resumed_bit_for_bit_and_loses_nothing():
    """What was best in validation stays so until it is surpassed; other minibatches come, and what was learned is kept."""
    arguments = dict(start=-1.0, elbo=None, learning_rate=0.02, validation=X[:50], validate_every=20)
    ended = Interrupt()
    first = fit_line(40, checkpoint=ended, **arguments)
    of_first = ended.state
    whole = fit_line(100, checkpoint=ended, **arguments)
    checkpoint = Interrupt(at=2)
    checkpoint.state = of_first
    with pytest.raises(KeyboardInterrupt):
        fit_line(100, checkpoint=checkpoint, **arguments)
    assert len(checkpoint.state.losses) == 80
    resumed = fit_line(100, checkpoint=checkpoint, **arguments)
    assert np.array_equal(whole.losses, resumed.losses) and np.array_equal(whole.validation, resumed.validation)
    assert same(whole.diffusion, resumed.diffusion) and same(whole.state.svi.optim_state, resumed.state.svi.optim_state)
    np.testing.assert_array_equal(whole.losses[:40], first.losses)
    np.testing.assert_array_equal(whole.validation[:2], first.validation)
    assert whole.state.svi.optim_state[0] == 60 and whole.state.best_bound >= of_first.best_bound
    assert float(whole.state.best_bound) == pytest.approx(whole.validation[:, 1].max(), rel=1e-6)
    visits = [state.svi.mutable_state["diffusion$learned"]["visits"].sum() for state in (of_first, whole.state)]
    assert visits[1] > 1.5 * visits[0]


def test_with_a_schedule_of_ones_own_a_fit_goes_on_as_if_it_had_not_ended(float64):
    rates = np.linspace(0.03, 0.001, 40)
    whole, checkpoint = fit_line(40, learning_rate=lambda count: jnp.asarray(rates)[count]), Interrupt()
    for more in (25, 40):
        fit = fit_line(more, learning_rate=lambda count: jnp.asarray(rates)[count], checkpoint=checkpoint)
    np.testing.assert_array_equal(fit.losses, whole.losses)


def test_weights_are_repetitions(monkeypatch):
    """Each datum in its share of the minibatch, and all in it once: bit for bit the fit to data that are repeated, with all that knows the batch."""
    weights = np.array([2, 0, 1, 3, 0, 0, 2])
    x, repeated = X[:7], np.repeat(X[:7], weights, 0)
    options = {"iterations": 3, "batch_size": 8, "elbo": "kl_posterior_target"}
    with monkeypatch.context() as patch:
        every = ((np.arange(8) + 0.5) / 8 * 2**32).astype(np.uint32)
        patch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(every))
        weighted = fit_line(data=x, weights=0.1 * weights, **options)
    monkeypatch.setattr(Minibatches, "rows", lambda self, key, iteration: jnp.arange(8))
    plain = fit_line(data=repeated, **options)
    np.testing.assert_array_equal(weighted.losses, plain.losses)
    assert same(weighted.diffusion, plain.diffusion)


def test_data_of_weight_0_are_as_if_they_were_not_there():
    """In the minibatches, as points that others may come from, in the optimal variances and in the words of warning."""
    weights = np.random.default_rng(0).exponential(size=40) * (np.arange(40) % 4 < 2)
    x = np.where(weights[:, None] > 0, X[:40] / 2, 1e4).astype(np.float32)
    options = {"iterations": 5, "batch_size": 8, "elbo": "kl_posterior_target", "reverse_variance": "optimal"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = fit_line(data=x, weights=weights, **options)
        expected = fit_line(data=x[weights > 0], weights=weights[weights > 0].tolist(), **options)
    np.testing.assert_array_equal(found.losses, expected.losses)
    assert same(found.diffusion, expected.diffusion)


@pytest.mark.parametrize("weights", [[0.5, 0, 3.0, 1.5, 0], [1e-12, 1.0, 1e-12], [0, 7, 0], [1e300, 1e300]])
def test_rows_are_drawn_in_proportion_to_their_weights(weights):
    weights = np.array(weights)
    rows = np.asarray(jax.vmap(lambda i: Minibatches(len(weights), 50, weights).rows(jax.random.key(0), i))(jnp.arange(400)))
    share = (rows.ravel()[:, None] == np.arange(len(weights))).mean(0)
    expected = weights / weights.max() / (weights / weights.max()).sum()
    assert np.all(np.abs(share - expected) <= 4.9 * np.sqrt(expected * (1 - expected) / rows.size) + 1e-9)


def test_a_resumed_fit_keeps_its_keys():
    arguments = dict(iterations=40, batch_size=32, validate_every=20, progress=False)
    whole, checkpoint = probdiff.fit(make(), X, key=jax.random.key(5), **arguments), Interrupt(at=1)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(), X, key=jax.random.key(5), checkpoint=checkpoint, **arguments)
    resumed = probdiff.fit(make(), X, key=jax.random.key(6), checkpoint=checkpoint, **arguments)
    assert np.array_equal(whole.losses, resumed.losses) and same(whole.diffusion, resumed.diffusion)


@pytest.mark.release
def test_ctrl_c_during_validation_loses_no_validation(patched):
    arguments = dict(iterations=40, batch_size=32, validation=X[:50], validate_every=20, progress=False)
    whole, calls = probdiff.fit(make(5), X, **arguments), []
    validate = training.loop.Loop.validate

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(self, *given)

    patched(validate, interrupted)
    checkpoint = Interrupt()
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(5), X, checkpoint=checkpoint, **arguments)
    resumed = probdiff.fit(make(5), X, checkpoint=checkpoint, **arguments)
    np.testing.assert_array_equal(whole.validation, resumed.validation)
    assert same(whole.diffusion, resumed.diffusion)


def test_a_fit_is_shown_in_two_lines():
    """By its own numbers: the mean bound of the last hundred minibatches, the last validation, what was skipped."""
    losses = np.concatenate([np.full(20, 50.0), np.arange(100.0)])
    losses[40] = np.nan
    fit = training.Fit(make(5).bind({}), losses, np.array([[60, -9.0], [120, -3.25]]), None)
    first, second = repr(fit).splitlines()
    mean = np.nanmean(losses[-100:])
    assert first == f"Fit of 120 updates: bound {-mean:.2f} nats, validation -3.25 nats, 1 updates skipped"
    assert second == repr(fit.diffusion) == str(fit.diffusion) and second.endswith(" parameters, bound)")
    assert "N = 5 steps" in second and "NormalLikelihood" in second and len(second) < 250
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(fit.params))
    assert f"; {size} parameters" in second and repr(make(5)).endswith("not bound)")


@pytest.mark.release
def test_the_shortest_fit():
    fit = probdiff.fit(make(), X, iterations=1, batch_size=4, progress=False)
    assert fit.losses.shape == (1,) and np.isfinite(fit.losses).all()


@pytest.mark.parametrize("elbo", [(None, None), probdiff.AnalyticELBO])
def test_an_objective_that_is_none_is_refused(elbo):
    with pytest.raises(TypeError, match="elbo: Expected a NumPyro ELBO, the name of an estimator"):
        probdiff.fit(make(), X, iterations=1, elbo=elbo)
    with pytest.raises(ValueError, match="elbo: Expected a NumPyro ELBO or one of trace, .*; got 'kl_combine'"):
        probdiff.fit(make(), X, iterations=1, elbo="kl_combine")


@pytest.mark.release
def test_an_objective_by_its_name_and_as_a_pair():
    """With the guide that carries what it learns: otherwise a warning says that it learns nothing."""
    diffusion, options = make(5), {"iterations": 6, "batch_size": 16, "progress": False}
    pair = probdiff.ESTIMATORS["kl_combined"](diffusion)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fits = [probdiff.fit(diffusion, X[:64], elbo=elbo, **options) for elbo in ("kl_combined", pair, pair[1])]
    for other in fits[1:]:
        np.testing.assert_array_equal(fits[0].losses, other.losses)
    other = probdiff.fit(diffusion, X[:64], elbo="kl_uniform", **options)
    assert not np.array_equal(other.losses, fits[0].losses) and other.state.settings["elbo"] == "kl_uniform"
