"""The SVI loop: it learns, resumes bit for bit, averages parameters, and keeps the best."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO

import probdiff
from probdiff import training
from probdiff.oracles import GaussianOracle, exact_terms

ORACLE = GaussianOracle([1.0, -2.0], [[2.0, 0.8], [0.8, 0.5]])


@pytest.fixture(autouse=True)
def short_validation(monkeypatch):
    monkeypatch.setattr(training, "VALIDATION_ROWS", 2**12)


def make(num_steps=20, **kwargs):
    network = probdiff.MLP(2, key=jax.random.key(0), hidden=32, num_blocks=1, **kwargs)
    schedule = probdiff.log_snr_schedule(num_steps, 5.0, -5.0)
    likelihood = probdiff.NormalLikelihood.standardized(ORACLE.sample(np.random.default_rng(1), 1000))
    return probdiff.Diffusion(schedule, network, likelihood, reverse_variance="forward")


X = ORACLE.sample(np.random.default_rng(0), 4000).astype(np.float32)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


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
    terms = probdiff.elbo_terms(fit.diffusion, {}, x, key=jax.random.key(3), num_draws=40, reduce=True)
    shortfall = exact_terms(best, x)["elbo"] - np.asarray(terms.elbo.mean)
    error = np.sqrt(np.sum(terms.elbo.variance) / 40) / len(x)
    assert error < 0.005
    assert -4.9 * error < shortfall.mean() < 0.05


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO(), None])
def test_any_numpyro_objective(elbo):
    fit = probdiff.fit(make(5), X[:200], iterations=30, batch_size=64, elbo=elbo, progress=False)
    assert fit.losses[-5:].mean() < fit.losses[:5].mean()


def test_loss_is_nats_per_datum():
    diffusion = make(5)
    losses = [
        probdiff.fit(diffusion, X, iterations=20, batch_size=b, learning_rate=1e-9, progress=False).losses.mean()
        for b in (50, 500)
    ]
    bound = probdiff.elbo_terms(diffusion, {}, X[:500], key=jax.random.key(0), num_draws=5).elbo.mean()
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


def test_ctrl_c_saves_the_iterations_since_the_last_checkpoint(monkeypatch):
    checkpoint, chunks = Interrupt(), []
    advance = training._Loop.advance

    def interrupted(self, *arguments):
        chunks.append(1)
        if len(chunks) == 3:
            raise KeyboardInterrupt
        return advance(self, *arguments)

    monkeypatch.setattr(training._Loop, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(5), X, iterations=1000, checkpoint=checkpoint, progress=False)
    assert len(checkpoint.state.losses) == 200


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
    bound = probdiff.elbo_terms(fit.diffusion, {}, X[:200], key=jax.random.key(0), num_draws=3).elbo.mean()
    assert bound > fit.validation[-1, 1] + 1


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


@pytest.mark.parametrize("what", ["loss", "gradient"])
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


def test_after_ten_in_a_row_the_fit_stops_and_says_which_batch():
    checkpoint = Interrupt()
    blow_up = optax.sgd(optax.piecewise_constant_schedule(1e-6, {150: 1e30}))
    with pytest.raises(FloatingPointError, match=r"10 iterations in a row, the first of them iteration 15\d, on rows \["):
        probdiff.fit(
            make(5), X, iterations=400, learning_rate=blow_up, validate_every=100, checkpoint=checkpoint, progress=False
        )
    assert len(checkpoint.state.losses) == 100
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(checkpoint.state.svi.optim_state))


@pytest.mark.parametrize(
    "changed", [{"batch_size": 16}, {"iterations": 90}, {"learning_rate": 1e-2}, {"validation": X[:51]}, {"ema_decay": 0.9}]
)
def test_a_resumed_fit_must_be_asked_for_the_same(changed):
    arguments = dict(iterations=70, batch_size=32, learning_rate=1e-3, validation=X[:50], validate_every=20, progress=False)
    checkpoint = Interrupt(at=1)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(), X, checkpoint=checkpoint, **arguments)
    ((name, value),) = changed.items()
    with pytest.raises(ValueError, match=f"{name}: Expected .* as in the fit that the checkpoint is of"):
        probdiff.fit(make(), X, checkpoint=checkpoint, **arguments | changed)


def test_a_resumed_fit_keeps_its_keys():
    arguments = dict(iterations=40, batch_size=32, validate_every=20, progress=False)
    whole, checkpoint = probdiff.fit(make(), X, key=jax.random.key(5), **arguments), Interrupt(at=1)
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(), X, key=jax.random.key(5), checkpoint=checkpoint, **arguments)
    resumed = probdiff.fit(make(), X, key=jax.random.key(6), checkpoint=checkpoint, **arguments)
    assert np.array_equal(whole.losses, resumed.losses) and same(whole.diffusion, resumed.diffusion)


def test_ctrl_c_during_validation_loses_no_validation(monkeypatch):
    arguments = dict(iterations=40, batch_size=32, validation=X[:50], validate_every=20, progress=False)
    whole, calls = probdiff.fit(make(5), X, **arguments), []
    validate = training._Loop.validate

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(self, *given)

    monkeypatch.setattr(training._Loop, "validate", interrupted)
    checkpoint = Interrupt()
    with pytest.raises(KeyboardInterrupt):
        probdiff.fit(make(5), X, checkpoint=checkpoint, **arguments)
    resumed = probdiff.fit(make(5), X, checkpoint=checkpoint, **arguments)
    np.testing.assert_array_equal(whole.validation, resumed.validation)
    assert same(whole.diffusion, resumed.diffusion)


def test_the_shortest_fit():
    fit = probdiff.fit(make(), X, iterations=1, batch_size=4, progress=False)
    assert fit.losses.shape == (1,) and np.isfinite(fit.losses).all()


@pytest.mark.parametrize("elbo", ["kl_combined", (None, None), probdiff.AnalyticELBO])
def test_an_objective_that_is_none_is_refused(elbo):
    with pytest.raises(TypeError, match="elbo: Expected a NumPyro ELBO"):
        probdiff.fit(make(), X, iterations=1, elbo=elbo)
