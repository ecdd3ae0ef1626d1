"""The account of the bound: its parts by closed form, and that they add up."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Z_MAX, long_but

import probdiff
from probdiff.diagnostics.gap import GapDecomposition
from probdiff.elbo.estimate import Estimate
from probdiff.oracles import GaussianMixture, GaussianOracle, UniformBoxes, exact_terms

SCHEDULE = probdiff.log_snr_schedule(8, 5.0, -3.0)
ORACLE = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
PARTS = ("gap", "irreducible", "network", "residual", "prior_kl", "step_kl", "reconstruction")


def make(scale, oracle=ORACLE, reverse_variance="posterior"):
    likelihood = probdiff.NormalLikelihood([0.2, -0.1], [1.5, 0.7])
    network = oracle.standardized(likelihood.loc, likelihood.scale).network(SCHEDULE, scale)
    return probdiff.Diffusion(SCHEDULE, network, likelihood, reverse_variance)


def account(diffusion, oracle=ORACLE):
    x = oracle.sample(np.random.default_rng(0), 4000)
    return probdiff.diagnostics.gap_decomposition(diffusion, oracle, x, key=jax.random.key(1)), x


def near(estimate, expected, power):
    assert abs(estimate.mean - expected) <= Z_MAX * estimate.error and 9.7 * estimate.error < power


@pytest.mark.long
@pytest.mark.parametrize("reverse_variance", long_but(["forward"], ["posterior", "forward"]))
def test_parts_against_the_closed_form(reverse_variance, float64):
    diffusion, best = (make(scale, reverse_variance=reverse_variance) for scale in (0.8, 1.0))
    found, x = account(diffusion)
    log_p = ORACLE.log_prob(x)
    near(found.gap, (log_p - exact_terms(diffusion, x)["elbo"]).mean(), 0.15)
    near(found.irreducible, (log_p - exact_terms(best, x)["elbo"]).mean(), 0.15)
    # What the network adds at each step: w_n E|(1 - 0.8) eps*|^2 with eps* = A z + b, z Gaussian.
    network, schedule = best.network, SCHEDULE
    scale = np.asarray(diffusion.likelihood.scale)
    covariance = ORACLE.covariance / np.outer(scale, scale)
    for n in range(1, 9):
        z_cov = schedule.alpha_bar[n - 1] * covariance + (1 - schedule.alpha_bar[n - 1]) * np.eye(2)
        square = np.trace(network.weight[n - 1] @ z_cov @ network.weight[n - 1].T)
        expected = diffusion.kernel.kl_weight(schedule)[n - 1] * 0.2**2 * square
        error = found.network_per_step_error[n - 1]
        assert abs(found.network_per_step[n - 1] - expected) <= Z_MAX * error and 9.7 * error < 0.3 * expected
    assert found.entropy[0] == pytest.approx(-log_p.mean(), abs=Z_MAX * log_p.std() / np.sqrt(len(x)))


@pytest.mark.long
def test_it_adds_up_on_a_mixture(float64):
    mixture = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [0.8, -0.4]], 0.1 * np.eye(2))
    found, _ = account(make(0.8, mixture), mixture)
    near(found.residual, 0.0, 0.4 * found.network.mean)
    total = found.reconstruction.mean - found.step_kl.mean - found.prior_kl.mean
    assert abs(total + found.entropy[0] + found.gap.mean) < Z_MAX * (found.step_kl.error + found.reconstruction.error)
    text = str(found)
    assert f"on 4000 data; log p(x) is exact, on average minus the entropy, {-found.entropy[0]:.4f}" in text and "n = 1 … 1" in text
    back = GapDecomposition.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert str(back) == text and back.to_dict() == found.to_dict() and back.plot().axes
    figure = found.plot()
    assert "nats" in figure.axes[0].get_ylabel()


@pytest.mark.long
def test_the_exact_network_of_a_planar_set_leaves_nothing_to_the_network():
    dataset = probdiff.datasets.load("8gaussians")
    likelihood = dataset.likelihood()
    diffusion = probdiff.Diffusion(SCHEDULE, dataset.exact_network(SCHEDULE, likelihood), likelihood, dim=2)
    found = probdiff.diagnostics.gap_decomposition(diffusion, dataset.oracle, dataset.test[:200], key=jax.random.key(0))
    assert found.network.mean == 0 and found.gap == found.irreducible and found.gap.mean > 0
    assert "nan" not in str(found)


@pytest.mark.long
def test_a_datum_on_the_edge_of_a_box(float64):
    """0.2 in float32 lies above 0.2: the density is taken where the datum is."""
    boxes = UniformBoxes([[0.1, 0.1]], [[0.2, 0.2]])
    x = boxes.sample(np.random.default_rng(0), 10)
    x[0] = 0.2
    with jax.enable_x64(False):
        found = probdiff.diagnostics.gap_decomposition(probdiff.Diffusion(SCHEDULE, boxes.network(SCHEDULE)), boxes, x, key=jax.random.key(0))
    assert np.isfinite(found.gap.mean)


def test_the_account_prints_each_number_with_its_error_and_every_share():
    """Of 16 steps in blocks of two; the parts add up to the gap as they are printed, though each is rounded."""
    per_step = np.arange(1.0, 17.0) / 10
    estimates = {name: Estimate(k + 0.25, k / 100, 0.0) for k, name in enumerate(PARTS, 1)}
    rounded = {"irreducible": 0.01004, "network": 0.02004, "residual": -0.00001, "gap": 0.03007}
    estimates |= {name: Estimate(mean, estimates[name].error, 0.0) for name, mean in rounded.items()}
    steps = {"network_per_step": per_step, "network_per_step_error": per_step / 9, "log_snr": np.linspace(5, -3, 16)}
    account = GapDecomposition((1.5, 0.005), **estimates, **steps, num_items=77)
    title, _, *lines = str(account).splitlines()
    assert "on 77 data" in title and "-1.5000" in title and "-0.0000" not in str(account)
    printed = {line[:34].strip(): [float(word) for word in line[34:].split()] for line in lines[:4]}
    assert printed == {
        "irreducible gap, exact ε": [0.01, 0.02],
        "added by the network": [0.02, 0.03],
        "rest: 0 but for its error": [0.0, 0.04],
        "gap: log p(x) − ELBO": [0.03, 0.01],
    }
    blocks = [line for line in lines if line.startswith("  n = ")]
    assert len(blocks) == 8
    for i, line in enumerate(blocks):
        first, last = 2 * i, 2 * i + 1
        nats = per_step[first] + per_step[last]
        span = f"{account.log_snr[first]:.1f} … {account.log_snr[last]:.1f}"
        assert line.split("  ")[1] == f"n = {first + 1} … {last + 1}" and span in line
        assert line.split()[-2:] == [f"{nats:.5f}", f"{nats / 13.6:.1%}"]
    document = account.to_dict()
    assert document["network_per_step_error"] == list(per_step / 9) and document["gap"] == estimates["gap"]._asdict()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"oracle": 3}, "oracle: Expected a distribution out of probdiff.oracles; got int"),
        ({"diffusion": 3}, "diffusion: Expected a Diffusion; got int"),
        ({"oracle": GaussianOracle([0.0], [[1.0]])}, "oracle: Expected 2 dimensions, as the data have; got 1"),
        ({"oracle": UniformBoxes([[1, 1]], [[2, 2]])}, "x: Expected data that the oracle may have drawn"),
        ({"x": np.zeros((1, 2), np.float32)}, "x: Expected at least two data; got 1"),
        ({"x": np.zeros((4, 3), np.float32)}, r"x: Expected shape \(datum, 2\)"),
    ],
)
def test_what_is_not_usable_is_refused(arguments, message):
    diffusion = probdiff.Diffusion(SCHEDULE, ORACLE.network(SCHEDULE))
    given = {"diffusion": diffusion, "oracle": ORACLE, "x": np.zeros((4, 2), np.float32)} | arguments
    with pytest.raises((ValueError, TypeError), match=message):
        probdiff.diagnostics.gap_decomposition(given.pop("diffusion"), given.pop("oracle"), given.pop("x"), key=jax.random.key(0))


def test_data_on_a_grid_are_refused():
    diffusion = probdiff.Diffusion(SCHEDULE, lambda z, n: z, probdiff.DiscretizedNormalLikelihood(3), dim=2)
    with pytest.raises(TypeError, match="diffusion.likelihood: Expected a NormalLikelihood"):
        probdiff.diagnostics.gap_decomposition(diffusion, ORACLE, jnp.zeros((4, 2), int), key=jax.random.key(0))
