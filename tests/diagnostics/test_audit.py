"""``probdiff.audit``: each fault by its name, no fault in what is sound, and the figures against raw draws."""

import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_networks import DIM, FAULTS, NOISE, ORACLE, RANGES, SCHEDULE, SIGNAL, STEPS, N, X, broken
from conftest import assert_mean, long_but, release_but

import probdiff
from probdiff.diagnostics.equal_calls import compare_equal_calls
from probdiff.diagnostics.findings import SURE, WORTH_OF_RANGE
from probdiff.diagnostics.readings import ANSWERS, ASKED, OWN, Reading, Recoded, fit_slopes
from probdiff.elbo.estimate import Estimate
from probdiff.networks.base import signal_and_noise

KEY, DRAWS = jax.random.key(0), 4
ROOT = np.sqrt(len(X))


def audited(diffusion, x=X, **options):
    return probdiff.audit(diffusion, x, key=KEY, num_draws=DRAWS, **options)


def named(diffusion, x=X, **options):
    """The findings of an audit by their names, and the audit."""
    found = audited(diffusion, x, **options)
    return {each.name: each for each in found.findings}, found


@functools.cache
def of_fault(fault):
    return audited(FAULTS[fault])


OTHER_SIGNS = ("off by a step: asked early", "off by a scale: too large", "predicts minus v", "predicts the score of z_n/√ᾱ_n")


def optimal(oracle=ORACLE, network=None, schedule=SCHEDULE):
    """The oracle's network, or another, with the best reverse variances."""
    diffusion = probdiff.Diffusion(schedule, network or oracle.network(schedule), reverse_variance="optimal", dim=oracle.dim)
    return probdiff.elbo.optimal_variance(diffusion, oracle.sample(np.random.default_rng(1), 2000).astype(np.float32), key=KEY)


def test_nothing_is_wrong_with_the_right_network():
    findings, found = named(broken())
    assert not findings and found.sound and "What is wrong: nothing was found" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.parametrize("fault", release_but([each for each in FAULTS if each not in OTHER_SIGNS], FAULTS))
def test_a_fault_is_named_and_nothing_else(fault):
    found, name = of_fault(fault), fault.partition(":")[0]
    (finding,) = found.findings
    assert finding.name == name and not found.sound and f"1. {name}: " in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    if name not in ("output not finite", "coupled batch"):
        assert finding.nats > SURE * finding.error


@pytest.mark.parametrize("change", long_but(["[0, 1] for [−1, 1]", "not standardised"], RANGES, ["0 … 255 for [−1, 1]", "a shift", "half"]))
def test_another_range_of_the_data_is_named_with_its_numbers(change):
    """The network knows ``X``, of which the data are a multiple with a shift; on the whole, or in each dimension."""
    scale, shift = (np.float32(each) for each in RANGES[change])
    findings, _ = named(broken(), X * scale + shift)
    finding = findings.pop("range of the data")
    assert not findings and finding.nats > DIM * WORTH_OF_RANGE
    if np.ndim(scale) == 0:
        a, sign, b = finding.sentence.split("should be ")[1].replace(" · x_0", "").split()
        assert float(a) == pytest.approx(1 / scale, rel=0.2)
        assert float(f"{'-' if sign == '−' else ''}{b}") == pytest.approx(-shift / scale, abs=0.3)


def test_two_faults_are_both_named():
    """What the network is asked, and what its answer is taken for: each by what it gains beside the other."""
    signal, noise = SIGNAL[::-1], NOISE[::-1]
    findings, found = named(broken(1 / signal, -noise / signal, asked=STEPS[::-1]))
    assert set(findings) == {"steps out of order", "predicts v"}
    gains = {reading: gain.mean for reading, gain in found.readings.items()}
    both = gains[Reading("N + 1 − n", "v")]
    assert findings["steps out of order"].nats == pytest.approx(both - gains[Reading(OWN, "v")])
    assert findings["predicts v"].nats == pytest.approx(both - gains[Reading("N + 1 − n", OWN)])


@pytest.mark.release
def test_a_chain_that_does_not_end_in_noise_is_named():
    schedule = probdiff.log_snr_schedule(N, 10.0, -1.0)
    findings, found = named(optimal(schedule=schedule))
    alpha_bar = float(schedule.alpha_bar[-1])
    exact = (alpha_bar * np.square(X) - alpha_bar - np.log1p(-alpha_bar)).sum(1) / 2
    assert list(findings) == ["prior KL"] and findings["prior KL"].nats == pytest.approx(exact.mean(), rel=1e-4)
    assert findings["prior KL"].error == pytest.approx(exact.std(ddof=1) / ROOT, rel=1e-4)
    assert f"{exact.mean() / 2:.3g} nats a dimension, at a log-SNR of -1.0" in findings["prior KL"].sentence


@pytest.mark.release
def test_an_untrained_network_is_named_as_one():
    """Not by a reading of it that predicts less."""
    network = probdiff.MLP(DIM, key=KEY, hidden=8, num_blocks=1)
    network = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(KEY, leaf.shape) if eqx.is_inexact_array(leaf) else leaf, network)
    findings, _ = named(probdiff.Diffusion(SCHEDULE, probdiff.networks.X0Head(network), reverse_variance="forward"))
    assert "predicts no noise" in findings and not any(name.startswith(("off", "steps", "predicts v", "predicts the")) for name in findings)


def test_zeros_are_not_read_as_v():
    """Of data with mean 0 and variance 1, v = 0 is as good as independent normals: it says nothing of the network."""
    x = np.random.default_rng(0).normal(size=X.shape).astype(np.float32)
    findings, _ = named(probdiff.Diffusion(SCHEDULE, lambda z, n: 0 * z, dim=DIM), x)
    assert list(findings) == ["predicts no noise"]


def with_dropout():
    """A model whose prediction has a random factor of standard deviation 0.3, as of a module of another library with its dropout on."""
    rng, exact = np.random.default_rng(0), ORACLE.network(SCHEDULE)

    def factor(z):
        return rng.normal(1, 0.3, z.shape).astype(np.float32)

    def network(z, n):
        eps_hat = exact(z, jnp.asarray(SCHEDULE.log_snr, z.dtype)[n - 1])
        return eps_hat * jax.pure_callback(factor, jax.ShapeDtypeStruct(z.shape, jnp.float32), z, vmap_method="expand_dims").astype(z.dtype)

    return probdiff.Diffusion(SCHEDULE, network, dim=DIM)


@pytest.mark.release
def test_a_random_output_is_named():
    findings, _ = named(with_dropout())
    assert list(findings) == ["random output"]


def test_equal_calls():
    """The difference of two has a variance of 2 · 0.09 of the square of the prediction, of which half is a cost."""
    models = {"right": broken(), "random": with_dropout(), "coupled": broken(share=0.5)}
    found = {name: compare_equal_calls(model.evaluated(), X, key=KEY) for name, model in models.items()}
    there = {(name, kind) for name, both in found.items() for kind, each in both.items() if each.is_there}
    assert there == {("random", "twice"), ("random", "alone"), ("coupled", "alone")}
    assert found["random"]["twice"].relative == pytest.approx(np.sqrt(0.18), rel=0.4)
    costs = [compare_equal_calls(models["random"].evaluated(), X, key=jax.random.key(k))["twice"].nats.mean for k in range(48)]
    # From the first eight data, and the step in the middle of each quarter.
    quarters, kl_weight = np.split(np.arange(N), 4), np.asarray(models["random"].kernel.kl_weight(SCHEDULE))
    middle = np.array([each[len(each) // 2] for each in quarters])
    noise = jax.random.normal(KEY, (500, 4, 8, DIM))
    z = np.float32(SIGNAL)[middle, None, None] * X[:8] + np.float32(NOISE)[middle, None, None] * noise
    squared = np.square(models["right"].predict_noise(z, middle[:, None] + 1)).sum(-1).mean((0, 2))
    cost = 0.09 * sum(kl_weight[each].sum() * own for each, own in zip(quarters, squared))
    assert_mean(np.array(costs), cost, power=cost)


SLOPED = probdiff.oracles.GaussianOracle([0.0, 0.0], [[0.2, 0.05], [0.05, 0.1]], [[0.5, 0.0], [0.3, -0.4]])


@pytest.mark.release
@pytest.mark.parametrize("ignores", [False, True])
def test_a_context_that_is_ignored_is_named(ignores):
    context = np.random.default_rng(2).normal(size=(128, 2)).astype(np.float32)
    x = SLOPED.sample(np.random.default_rng(3), 128, context).astype(np.float32)
    given = SLOPED.network(SCHEDULE)
    without = probdiff.oracles.GaussianOracle([0.0, 0.0], np.cov(x.T)).network(SCHEDULE)

    def network(z, n, *, context):
        return without(z, n) if ignores else given(z, n, context=context)

    findings, found = named(probdiff.Diffusion(SCHEDULE, network, reverse_variance="forward", dim=2), x, context=context)
    assert list(findings) == ["context ignored"] * ignores
    assert ignores or found.readings[Reading("another's context", OWN)].mean < -1


HEADS = {"v": probdiff.networks.VHead, "x_0": probdiff.networks.X0Head}


@pytest.mark.release
@pytest.mark.parametrize("answer", HEADS)
def test_a_head_around_a_network_that_predicts_the_noise_is_named(answer):
    exact = ORACLE.network(SCHEDULE)
    model = probdiff.Diffusion(SCHEDULE, HEADS[answer](exact), reverse_variance="forward")
    findings, _ = named(model)
    assert f"is taken to predict {answer}" in findings["predicts the noise"].sentence


@pytest.mark.release
def test_a_head_around_a_network_of_its_kind_is_right():
    class Velocity(eqx.Module):
        network: eqx.Module

        def __call__(self, z, n):
            log_snr = jnp.asarray(SCHEDULE.log_snr, z.dtype)[n - 1]
            signal, noise = signal_and_noise(log_snr)
            return (self.network(z, log_snr) - noise * z) / signal

    head = probdiff.networks.VHead(Velocity(ORACLE.network(SCHEDULE)))
    findings, found = named(probdiff.Diffusion(SCHEDULE, head, reverse_variance="posterior", dim=2))
    assert not findings and Reading(OWN, "v") not in found.readings and found.readings[Reading(OWN, "the noise")].mean < -1


@pytest.mark.release
def test_data_on_a_grid_in_bits_and_in_another_range():
    """A network of pixels in [0, 1], in a chain of [−1, 1]: both the fault, and the bits of the bound."""
    rng, levels = np.random.default_rng(0), 17
    pixels = np.clip(np.rint(8 + 2 * rng.normal(size=(200, 3))), 0, 16).astype(np.int32)
    unit = probdiff.oracles.GaussianOracle(np.full(3, 0.5), np.eye(3) / 64)  # of x / 16
    schedule = probdiff.log_snr_schedule(N, 8.0, -6.0)
    model = probdiff.Diffusion(schedule, unit.network(schedule), probdiff.DiscretizedNormalLikelihood(levels), dim=3)
    findings, found = named(model, pixels)
    assert next(iter(findings)) == "range of the data" and found.bits_per_dim.mean == pytest.approx(-found.elbo.mean / (3 * np.log(2)))
    assert found.bits_per_dim.error == pytest.approx(found.elbo.error / (3 * np.log(2))) and "bits/dim" in str(found)


# ---- the figures, against raw draws


def test_the_bound_and_its_steps_are_those_of_the_terms():
    fault = "off by a scale: too small"
    found, terms = of_fault(fault), probdiff.elbo_terms(FAULTS[fault], X, key=jax.random.key(9), num_draws=64)
    per_step = np.asarray(terms.step_kl, np.float64).mean(0)
    assert found.step_kl.shape == (N - 1,) and abs(found.elbo.mean - float(terms.elbo.mean())) < 5 * found.elbo.monte_carlo_error
    noise = np.asarray(found.two_ways.terms.step_kl, np.float64)
    np.testing.assert_allclose(found.step_kl, noise.mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.step_kl_error, noise.mean(0).std(1, ddof=1) / ROOT, rtol=1e-5)
    assert np.all(np.abs(found.step_kl - per_step.mean(1)) < 5 * np.hypot(found.step_kl_error, per_step.std(1) / ROOT))
    assert found.inspection["table"].loc["elbo", "nats"] == pytest.approx(found.elbo.mean, rel=1e-5)


@pytest.mark.long
def test_what_a_reading_gains_is_the_difference_of_two_bounds():
    """Read as v, and asked for n − 1: the bound of a model with a network that does so, less its own, both on 64 other draws."""
    exact, log_snr = ORACLE.network(SCHEDULE), jnp.asarray(SCHEDULE.log_snr, jnp.float32)

    def as_v(z, n):
        signal, noise = signal_and_noise(log_snr[n - 1])
        return 0.8 * signal * exact(z, log_snr[n - 1]) + noise * z

    def early(z, n):
        return 0.8 * exact(z, log_snr[jnp.maximum(n - 1, 1) - 1])

    own, others = FAULTS["off by a scale: too small"], {Reading(OWN, "v"): as_v, Reading("n − 1", OWN): early}
    found = of_fault("off by a scale: too small").readings
    bound = {None: own} | {reading: own.with_network(network) for reading, network in others.items()}
    bound = {k: np.asarray(probdiff.elbo_terms(d, X, key=KEY, num_draws=64).elbo, np.float64).mean(0) for k, d in bound.items()}
    for reading in others:
        expected = Estimate.of(bound[reading] - bound[None])
        assert abs(found[reading].mean - expected.mean) < 5 * np.hypot(found[reading].error, expected.error)
    assert abs(bound[Reading(OWN, "v")] - bound[None]).mean() > 0.3


def test_a_recoded_likelihood_is_that_of_the_same_data():
    """Its density is that of x, in the user's units, as of a NormalLikelihood with the loc and scale that come to the same."""
    x = X[:5]
    whole = probdiff.NormalLikelihood(np.array([1.0, -2.0]), np.array([3.0, 0.5]))
    scale, shift = np.array([2.0, 0.25]), np.array([0.5, -1.0])
    recoded = Recoded(whole, scale, shift)
    same = probdiff.NormalLikelihood(whole.loc - np.asarray(whole.scale) * shift / scale, whole.scale / scale)
    np.testing.assert_allclose(recoded.encode(x), same.encode(x), rtol=1e-5)
    np.testing.assert_allclose(recoded.decode(recoded.encode(x)), x, rtol=1e-4, atol=1e-5)
    loc = jnp.asarray(X[5:10])
    np.testing.assert_allclose(recoded(loc, 0.3).log_prob(x), same(loc, 0.3).log_prob(x), rtol=1e-5)
    assert recoded.log_jacobian(2) == pytest.approx(same.log_jacobian(2)) and recoded.levels is None


def test_the_slopes_are_those_of_a_regression():
    """Of ε on ε̂ in each range, as the bound weighs the steps, on other draws: of a network whose factor changes within each range."""
    schedule = probdiff.cosine_schedule(N)  # whose weights differ from step to step
    signal, noise, rng = schedule.signal_scale, schedule.noise_scale, np.random.default_rng(5)
    exact, beta, alpha, alpha_bar = ORACLE.network(schedule), schedule.beta, schedule.alpha, schedule.alpha_bar
    factor = np.linspace(0.3, 1.0, N)

    def network(z, n):
        return exact(z, jnp.asarray(schedule.log_snr, z.dtype)[n - 1]) * jnp.asarray(factor, z.dtype)[n - 1, None]

    found = fit_slopes(probdiff.Diffusion(schedule, network, dim=DIM), X, KEY, 16)
    kl_weight = beta[1:] ** 2 / (2 * schedule.posterior_variance[1:] * alpha[1:] * (1 - alpha_bar[1:]))
    kl_weight = np.concatenate([[0.5 / alpha[0]], kl_weight])
    eps = rng.standard_normal((16, N, *X.shape)).astype(np.float32)
    z = np.float32(signal)[:, None, None] * X + np.float32(noise)[:, None, None] * eps
    log_snr = jnp.broadcast_to(jnp.asarray(schedule.log_snr, jnp.float32)[:, None], z.shape[:-1])
    eps_hat = factor[:, None, None] * np.asarray(eqx.filter_jit(exact)(jnp.asarray(z), log_snr), np.float64)
    weighted = [np.einsum("n,sndi,sndi->n", kl_weight, a, eps_hat) for a in (eps, eps_hat)]
    expected = [np.sum(weighted[0][first - 1 : last]) / np.sum(weighted[1][first - 1 : last]) for first, last in found.steps]
    assert found.steps[0][0] == 1 and found.steps[-1][1] == N and len(found.steps) == 5
    np.testing.assert_array_less(np.abs(found.slope - expected), 6 * found.error)
    unweighted = [np.einsum("sndi,sndi->n", a, eps_hat) for a in (eps, eps_hat)]
    other = [np.sum(unweighted[0][first - 1 : last]) / np.sum(unweighted[1][first - 1 : last]) for first, last in found.steps]
    assert np.max(np.abs(np.subtract(other, expected)) / found.error) > 20 and np.all(found.error < 0.2)
    assert of_fault("off by a scale: too small").slopes.median == pytest.approx(1.25, rel=0.02)


def test_what_the_best_variances_gain_is_the_difference_of_two_bounds():
    found = of_fault("reverse variance")
    bounds = [np.asarray(probdiff.elbo_terms(d, X, key=KEY, num_draws=32).elbo, np.float64).mean(0) for d in (optimal(), broken(factor=20.0))]
    expected = Estimate.of(bounds[0] - bounds[1])
    assert abs(found.variance.mean - expected.mean) < 5 * np.hypot(found.variance.error, expected.error)


@pytest.mark.long
def test_a_model_whose_kernel_asks_for_something_else_has_its_bound():
    """Of a mixture kernel: the two ways and where the nats go, no readings; and that the chain does not end in noise."""
    network = probdiff.networks.CategoricalHead(lambda z, n: jnp.zeros((*z.shape, 3)), 3)
    schedule, kernel = probdiff.log_snr_schedule(4, 8.0, -1.0), probdiff.chain.MixtureKernel(3)
    model = probdiff.Diffusion(schedule, network, probdiff.DiscretizedNormalLikelihood(3), dim=2, kernel=kernel)
    x = np.random.default_rng(0).integers(0, 3, (40, 2))
    _, found = named(model, x)
    alpha_bar = float(schedule.alpha_bar[-1])
    exact = (alpha_bar * np.square(x - 1.0) - alpha_bar - np.log1p(-alpha_bar)).sum(1) / 2
    finding = found.findings[0]
    assert finding.name == "prior KL" and finding.nats == pytest.approx(exact.mean(), rel=1e-4)
    assert finding.error == pytest.approx(exact.std(ddof=1) / np.sqrt(40), rel=1e-4)
    assert not found.readings and found.slopes is None and found.variance is None and found.two_ways.agree and str(found)


def test_the_document_is_json_and_the_figure_is_of_the_steps():
    found = of_fault("predicts v")
    document = json.loads(json.dumps(found.to_dict()))
    slopes = [(*each["steps"], each["slope"], each["error"]) for each in document["slopes"]]
    np.testing.assert_allclose(slopes, [(*steps, c, e) for steps, c, e in zip(*found.slopes)])
    assert [(each["mean"], each["error"]) for each in document["readings"]] == [gain[:2] for gain in found.readings.values()]
    assert document["step_kl"] == found.step_kl.tolist() and document["step_kl_error"] == found.step_kl_error.tolist()
    assert document["findings"][0]["name"] == "predicts v" and document["step_kl"] == pytest.approx(found.step_kl.tolist())
    assert {(each["asked"], each["answer"]) for each in document["readings"]} == {tuple(reading) for reading in found.readings}
    assert {*ASKED} <= {each["asked"] for each in document["readings"]} and {*ANSWERS} - {"the noise"} <= {each["answer"] for each in document["readings"]}
    assert document["terms"]["elbo"]["nats"] == pytest.approx(document["elbo"]["mean"], rel=1e-5) and document["bits_per_dim"] is None
    (axes,) = found.plot("title").axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), found.step_kl, rtol=1e-4)


@pytest.mark.release
def test_a_table_of_several_kinds_is_audited():
    """Its head knows the likelihood, which the reading of other units replaces."""
    parts = probdiff.likelihoods.ColumnLikelihood({0: probdiff.NormalLikelihood(), 1: probdiff.likelihoods.CategoricalLikelihood(3)})
    network = probdiff.networks.ColumnHead(probdiff.MLP(4, key=KEY, hidden=8), parts)
    x = np.column_stack([np.random.default_rng(0).normal(size=40), np.arange(40) % 3]).astype(np.float32)
    result = probdiff.audit(probdiff.Diffusion(probdiff.log_snr_schedule(8, 5.0, -5.0), network, parts, "learned"), x, key=KEY)
    assert np.isfinite(result.two_ways.analytic.mean) and result.two_ways.agree
