"""``probdiff verify``: every check holds, and fails with a bug put into what it checks."""

import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import release_but
from numpyro import distributions as dist
from numpyro.distributions import kl_divergence

import probdiff
from probdiff import cli
from probdiff._static import Static
from probdiff.chain.forward import isotropic_normal, prior_kl
from probdiff.chain.reverse import GaussianKernel, NoiseMoments
from probdiff.chain.schedules import NoiseSchedule, at_step
from probdiff.cli import verify as verification
from probdiff.cli.verify import CHECKS, LEFT_OUT, PRECISIONS
from probdiff.elbo.importance import log_mean_exp
from probdiff.elbo.score_matching import WEIGHTS, sigma_squared_weights
from probdiff.elbo.steps import AllSteps, OneStep
from probdiff.elbo.variance_reduction import NOISE, ForwardPathNoise, LinearControl, PathNoise, PosteriorNoise, RowNoise
from probdiff.flow import velocity
from probdiff.networks.base import predict_noise
from probdiff.oracles.networks import MixtureNetwork

# In float64 the estimators are held against the same closed form in test_estimators.py.
CASES = [
    (name, precision)
    for name, precision in itertools.product(CHECKS, PRECISIONS)
    if (name, precision) not in LEFT_OUT and not (name.startswith("estimator") and precision == "float64")
]

# In the precision that is the default; the estimators are tested where they are.
ESTIMATORS = [name for name in CHECKS if name.startswith("estimator")]
QUICK = [(name, "float32") for name in CHECKS if name not in ESTIMATORS[1:-2] and (name, "float32") in CASES]


def find(name, precision="float64"):
    with jax.enable_x64(precision == "float64"):
        return CHECKS[name]()


@pytest.mark.parametrize("name, precision", release_but(QUICK, CASES))
def test_check(name, precision):
    finding = find(name, precision)
    assert finding.holds, finding


def shifted(function):
    """A function of a schedule, arrays and the step, given the step before (but never the first)."""
    return lambda *arguments: function(*arguments[:-1], jnp.maximum(jnp.asarray(arguments[-1]) - 1, 2))


def negated(function):
    return lambda *arguments: -function(*arguments)


def with_deviation_for_variance(function):
    def wrong(*arguments):
        right = function(*arguments)
        return isotropic_normal(right.mean, jnp.sqrt(right.variance)[..., 0])

    return wrong


def posterior_with_beta(schedule, z, x0, n, right=probdiff.forward_posterior):
    return isotropic_normal(right(schedule, z, x0, n).mean, at_step(schedule.beta, n, z.dtype))


def twice_shrunk(function):
    """A function of a schedule, x_0 or x_n, and the step, given what is already shrunk."""
    return lambda schedule, x, n, shrink=probdiff.chain.score.vp_from_ve: function(schedule, shrink(schedule, x, n), n)


def one_step_more(num_steps, right=probdiff.cosine_schedule):
    return NoiseSchedule.from_betas(right(num_steps + 1).beta[1:])


def first_order_tables(self, beta, right=NoiseSchedule.__init__):
    right(self, beta)
    self._tables = Static(eqx.tree_at(lambda tables: tables.alpha_bar, self.tables(), np.exp(-np.cumsum(beta))))


def network_of_the_step_before(network, z, log_snr, n, key=None, context=None):
    return network(z, jnp.maximum(n - 1, 1))


def swapped_constant(self, schedule):
    ratio = self.variance(schedule)[1:] / schedule.posterior_variance[1:]
    return np.concatenate([[0.0], (ratio - 1 - np.log(ratio)) / 2])


def draw_all_but_the_last(self, key, size, num_steps, probability=None):
    n = jnp.broadcast_to(jnp.arange(1, num_steps)[:, None], (num_steps - 1, size))
    return n, jnp.ones(n.shape)


def draw_one_of_fewer(self, key, size, num_steps, probability=None):
    n = jax.random.randint(key, (1, size), 1, num_steps)
    return n, jnp.full(n.shape, num_steps - 1.0)


def draw_without_a_random_shift(self, key, size, num_steps, probability=None, right=OneStep.draw):
    return right(OneStep(lambda key, size: jnp.arange(size) / size), key, size, num_steps)


def draw_with_uniform_weights(self, key, size, num_steps, probability=None, right=OneStep.draw):
    n, weight = right(self, key, size, num_steps, probability)
    return n, jnp.full_like(weight, num_steps)


def pairs_without_second(self, rows, right=RowNoise.__call__):
    return right(self, rows) * (rows % self.copies == 0)[:, None, None]


class NoiseOfOneStep(ForwardPathNoise):
    def draw(self, key, schedule, x0):
        deviation = np.sqrt(schedule.beta)[:, None, None]
        return PathNoise(deviation * jax.random.normal(key, (len(deviation), *x0.shape), x0.dtype))


def control_without_noise_part(self, coefficient, x0, right=LinearControl.expected):
    return right(eqx.tree_at(lambda c: c.noise_part, self, jnp.zeros_like(self.noise_part)), coefficient, x0)


def target_without_variance(self, schedule, z, n, right=PosteriorNoise.__call__):
    return NoiseMoments(right(self, schedule, z, n).mean, 0.0)


def difference_of_means(self, schedule, step):
    posterior = probdiff.forward_posterior(schedule, step.z, step.x0, step.n)
    return kl_divergence(posterior, self(schedule, step.z, step.prediction, step.n))


def without_jacobian(self, loc, scale):
    return dist.Normal(loc, scale).to_event(1)


def mixture_of_another_noise_level(self, z, log_snr, right=MixtureNetwork.__call__):
    return right(self, z, log_snr + 0.1)


def without_half(self, schedule, right=GaussianKernel.kl_weight):
    return 2 * right(self, schedule)


def mean_for_sum(schedule, x0, right=prior_kl):
    return right(schedule, x0) / x0.shape[-1]


def weights_for_sigma(diffusion, right=probdiff.elbo.likelihood_weights):
    return right(diffusion) / diffusion.schedule.sigma


def without_data(schedule, x0, n, right=probdiff.forward_marginal):
    return right(schedule, 0 * x0, n)


def flow_with_variance(eps, z, log_snr):
    return jax.nn.sigmoid(-log_snr) / 2 * (z - eps(z, log_snr))


# For every check, what to put in the place of what: of a function, or of an entry of a table. The routes that the check is held
# against do not use it.
BUGS = {
    "tables of the schedules": {
        "shifted index": (at_step, lambda table, n, dtype: at_step(np.roll(table, 1), n, dtype)),
        "β for −log(1 − β)": (NoiseSchedule.__init__, first_order_tables),
        "one step more": (probdiff.cosine_schedule, one_step_more),
    },
    "marginals by recursion": {
        "ᾱ for its root": (probdiff.forward_marginal, twice_shrunk(probdiff.forward_marginal)),
        "σ for σ²": (probdiff.forward_marginal, with_deviation_for_variance(probdiff.forward_marginal)),
    },
    "Bayes' rule": {
        "β for its posterior": (probdiff.forward_posterior, posterior_with_beta),
        "shifted index": (probdiff.forward_posterior, shifted(probdiff.forward_posterior)),
    },
    "densities of a path": {
        "shifted network": (predict_noise, network_of_the_step_before),
        "σ for σ² in the guide": (probdiff.forward_step, with_deviation_for_variance(probdiff.forward_step)),
        "shifted index after Bayes": (probdiff.forward_posterior, shifted(probdiff.forward_posterior)),
    },
    "terms on given noise": {
        "dropped half": (GaussianKernel.kl_weight, without_half),
        "dropped constant": (GaussianKernel.constant, lambda self, schedule: np.zeros(schedule.num_steps)),
        "mean for sum": (prior_kl, mean_for_sum),
    },
    "mean terms": {
        "shifted network": (predict_noise, network_of_the_step_before),
        "swapped KL": (GaussianKernel.constant, swapped_constant),
    },
    "estimator trace": {"β for its posterior": (GaussianKernel.variance, lambda self, schedule: schedule.beta)},
    "estimator trace_posterior": {
        "shifted index": (probdiff.forward_posterior, shifted(probdiff.forward_posterior)),
    },
    "estimator mean_field": {
        "dropped x_0": (probdiff.forward_marginal, without_data),
    },
    "estimator kl_path": {"noise of one step": (NOISE, "path", NoiseOfOneStep())},
    "estimator kl_marginal": {"dropped step": (AllSteps.draw, draw_all_but_the_last)},
    "estimator kl_uniform": {"N − 1 for N": (OneStep.draw, draw_one_of_fewer)},
    "estimator kl_stratified": {"no random shift": (OneStep.draw, draw_without_a_random_shift)},
    "estimator kl_importance": {"N for 1/p": (OneStep.draw, draw_with_uniform_weights)},
    "estimator kl_antithetic": {"0 for −ε": (RowNoise.__call__, pairs_without_second)},
    "estimator kl_controlled": {"dropped term": (LinearControl.expected, control_without_noise_part)},
    "estimator kl_combined": {"sign": (LinearControl.expected, negated(LinearControl.expected))},
    "estimator kl_posterior_target": {
        "dropped variance": (PosteriorNoise.__call__, target_without_variance),
    },
    "score matching": {
        "σ for σ²": (probdiff.elbo.likelihood_weights, weights_for_sigma),
        "other weights": (WEIGHTS, "likelihood", sigma_squared_weights),
        "sign": (probdiff.chain.score.score, negated(probdiff.chain.score.score)),
    },
    "scores of a mixture": {
        "shifted noise level": (MixtureNetwork.__call__, mixture_of_another_noise_level),
        "sign": (probdiff.chain.score.score, negated(probdiff.chain.score.score)),
    },
    "scores given x_0": {
        "sign": (probdiff.chain.score.vp_conditional_score, negated(probdiff.chain.score.vp_conditional_score)),
        "shifted index": (probdiff.chain.score.conditional_score, shifted(probdiff.chain.score.conditional_score)),
    },
    "VE and VP coordinates": {
        "ᾱ for its root": (probdiff.chain.score.vp_from_ve, twice_shrunk(probdiff.chain.score.vp_from_ve)),
        "inverse": (probdiff.chain.score.ve_from_vp, probdiff.chain.score.vp_from_ve),
    },
    "probability flow": {"σ² for σ": (velocity, flow_with_variance)},
    "sandwich of log p": {
        "mean of logs": (log_mean_exp, lambda log_weights, axis: np.mean(log_weights, axis)),
        "sum for mean": (log_mean_exp, lambda log_weights, axis: np.logaddexp.reduce(log_weights, axis)),
    },
    "float32 step KLs": {"difference of means": (GaussianKernel.excess, difference_of_means)},
    "units": {
        "dropped Jacobian": (probdiff.NormalLikelihood.__call__, without_jacobian),
        "nats for bits": (probdiff.elbo.bits_per_dim, lambda nats, dim: -nats / dim),
    },
}


def test_every_check_has_a_bug():
    assert list(BUGS) == list(CHECKS)


@pytest.mark.long
@pytest.mark.parametrize("name, bug", release_but([(name, next(iter(BUGS[name]))) for name in list(BUGS)[::2]], [(name, bug) for name in BUGS for bug in BUGS[name]]))
def test_a_bug_is_found(name, bug, compiled_anew, patched, monkeypatch):
    *place, wrong = BUGS[name][bug]
    (patched if len(place) == 1 else monkeypatch.setitem)(*place, wrong)
    finding = find(name, "float32" if (name, "float64") in LEFT_OUT else "float64")
    assert finding.figure > finding.bound


def test_too_few_draws_fail():
    """Draws that could not show the discrepancy show nothing, wherever their mean is."""
    draws = np.random.default_rng(0).normal(size=(100, 1))
    assert verification._mean(draws, 0.0, power=1.0).holds
    assert not verification._mean(draws, 0.0, power=0.5).holds


@pytest.fixture
def three(constant):
    """Only three checks, for the tests of the command."""
    checks = {name: CHECKS[name] for name in ("VE and VP coordinates", "scores given x_0", "float32 step KLs")}
    constant("CHECKS", checks)
    return checks


@pytest.mark.long
def test_the_command(three, capsys):
    assert cli.main(["verify"]) == 0
    out, err = capsys.readouterr()
    head, *rows, empty, summary = out.splitlines()
    assert [row.split("  ")[0] for row in rows] == [name for name in three for _ in range(2)][:5]
    assert all(row.endswith("holds") for row in rows) and head.endswith("verdict")
    assert summary.startswith("5 of 5 hold; ") and "5/5" in err
    assert jnp.zeros(()).dtype == np.float32


def test_json(three, capsys):
    assert cli.main(["verify", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["holds"] is True and results["seconds"] > 0
    assert results["device"] == jax.devices()[0].device_kind and results["jax"] == jax.__version__
    assert [row["precision"] for row in results["checks"]] == ["float32", "float64", "float32", "float64", "float32"]
    assert all(row["holds"] and row["figure"] <= row["bound"] and row["unit"] for row in results["checks"])


def raises():
    raise MemoryError("no memory")


@pytest.mark.long
@pytest.mark.parametrize("check, figure, shown", [
    (lambda: verification.Finding(2e-5, 1e-5, "nats"), 2e-5, "2e-05    1e-05  nats"),
    (lambda: verification.Finding(float("nan"), 4.9, "|z|"), None, "–      4.9  |z|"),
    (raises, None, "–        0  it raised an error"),
])  # fmt: skip
def test_a_check_that_fails_is_exit_code_1(three, check, figure, shown, capsys):
    three["scores given x_0"] = check
    assert cli.main(["verify"]) == 1
    out, err = capsys.readouterr()
    assert out.count("FAILS") == 2 and shown in out and "\n3 of 5 hold" in out
    assert ("probdiff: warning: scores given x_0, float64: MemoryError: no memory" in err) == (check is raises)
    assert cli.main(["verify", "--json"]) == 1
    results = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert results["holds"] is False
    assert [row["holds"] for row in results["checks"]] == [True, True, False, False, True]
    assert [row["figure"] for row in results["checks"][2:4]] == [figure, figure]
