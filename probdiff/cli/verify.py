"""``probdiff verify``: checks of probdiff against independent computations, and of float32 against float64, on this machine and its JAX backend.

A check returns a figure and the limit that it must not exceed, in the present precision of JAX:

    identities      largest relative difference; at most 1e-10 in float64 (1e-8 for the scores of a mixture), 1e-5 (some eighty roundings) in float32 (1e-6 for tables)
    Monte Carlo     |z| ≤ 4.9 on fixed seeds; NaN, which fails, unless 9.7 standard errors are below the discrepancy
                    that the check exists to catch
"""

import argparse
import functools
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import kl_divergence
from numpyro.infer import Trace_ELBO
from numpyro.infer.util import log_density
from scipy.stats import norm
from tqdm import tqdm

import probdiff
from probdiff.chain.schedules import at_step
from probdiff.oracles.closed_form import exact_log_prob, exact_terms
from probdiff.oracles.distributions import GaussianMixture, GaussianOracle
from probdiff.programs.sites import PARAMS

Z_MAX = 4.9
SCHEDULE = probdiff.log_snr_schedule(8, 4.0, -1.0)
STEPS = np.arange(1, 9)[:, None]
SIGMAS = np.array([0.05, 0.2, 0.7, 3.0])
VE_SCHEDULE = probdiff.NoiseSchedule.from_sigmas(SIGMAS)
SCALE = 0.8  # factor on the exact network, for one that is not exact
GAUSSIAN = GaussianOracle([0.5, -0.3], [[0.6, 0.2], [0.2, 0.3]])
MIXTURE = GaussianMixture(
    [0.5, 0.2, 0.3],
    [[1.0, 0.5], [-1.2, 0.3], [0.2, -1.5]],
    [[[0.3, 0.1], [0.1, 0.2]], [[0.05, -0.02], [-0.02, 0.4]], [[0.5, 0.45], [0.45, 0.6]]],
)
X = np.array([[0.1, -0.2], [1.5, 0.4], [-0.7, -1.0]])


class Finding(NamedTuple):
    """The finding of a check: a figure, the limit that it must not exceed, and the unit of both."""

    figure: float
    bound: float
    unit: str

    @property
    def holds(self) -> bool:
        """Whether the figure is within the limit; NaN is not."""
        return bool(self.figure <= self.bound)


def _identity(found: Any, expected: Any, single: float = 1e-5, double: float = 1e-10, floor: float = 0.0) -> Finding:
    """The largest relative difference of two trees of arrays; ``floor`` is added to the absolute expected value."""
    found, expected = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    error = np.abs(found - expected) / (np.abs(expected) + floor)
    return Finding(float(error.max()), double if _dtype() == np.float64 else single, "relative")


def _mean(draws: Any, expected: Any, power: float) -> Finding:
    """The largest |z| of the means over axis 0; NaN if the draws are too few to detect a discrepancy of ``power``."""
    draws = np.asarray(draws, np.float64)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    z = np.abs(draws.mean(0) - expected) / error
    return Finding(float(np.where(9.7 * error < power, z, np.nan).max()), Z_MAX, "|z|")


def _dtype() -> np.dtype:
    return jnp.zeros(()).dtype


def _gaussian(scale: Any = SCALE, reverse_variance: str = "posterior", **kwargs: Any) -> probdiff.Diffusion:
    return probdiff.Diffusion(SCHEDULE, GAUSSIAN.network(SCHEDULE, scale), reverse_variance=reverse_variance, **kwargs)


def _noised(schedule: probdiff.NoiseSchedule) -> tuple[Any, Any, Any, Any]:
    """√ᾱ_n and √(1−ᾱ_n) by the product of 1 − β, noise, and ``X`` with that noise: shape ``(step, datum, dim)``."""
    alpha_bar = np.cumprod(1 - schedule.beta)[:, None, None]
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    eps = np.random.default_rng(0).standard_normal((schedule.num_steps, *X.shape))
    return signal, noise, eps, signal * X + noise * eps


def _step_kls(diffusion: probdiff.Diffusion) -> np.ndarray:
    """NumPyro's KLs of q(z_{n-1} | z_n, x_0) to the reverse steps, in float64, at the z of :func:`_noised`."""
    with jax.enable_x64(True):
        z = jnp.asarray(_noised(SCHEDULE)[-1][1:])
        posterior = probdiff.forward_posterior(SCHEDULE, z, X, STEPS[1:])
        return np.asarray(kl_divergence(posterior, diffusion.reverse_kernel(z, STEPS[1:])))


def tables() -> Finding:
    """The tables of the schedules against definitions of β, ``math.fsum`` of log(1 − β), Bayes' rule on precisions."""
    angle = (np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2
    cosine = np.sin(np.diff(angle)) * np.sin(angle[1:] + angle[:-1]) / np.cos(angle[:-1]) ** 2  # 1 − cos²/cos²
    by_log_snr, by_sigma = (np.diff(v, prepend=0) / (1 + v) for v in (np.exp(-np.linspace(10, -8, 50)), SIGMAS**2))
    definitions = [
        (probdiff.linear_schedule(1000), np.linspace(1e-4, 0.02, 1000)),
        (probdiff.cosine_schedule(100), np.minimum(cosine, 0.999)),
        (probdiff.log_snr_schedule(50), by_log_snr),
        (VE_SCHEDULE, by_sigma),
    ]
    found, expected = [], []
    for schedule, beta in definitions:
        n = np.arange(1, len(beta) + 1)
        log_alpha_bar = np.array([math.fsum(np.log1p(-beta[:k])) for k in n])
        alpha_bar, noise = np.exp(log_alpha_bar), -np.expm1(log_alpha_bar)
        posterior = 1 / ((1 - beta[1:]) / beta[1:] + 1 / noise[:-1])
        looked_up = (schedule.beta, schedule.alpha_bar, schedule.one_minus_alpha_bar, schedule.sigma)
        found.append([at_step(table, n, _dtype()) for table in looked_up])
        found.append([at_step(schedule.posterior_variance, n[1:], _dtype())])
        expected.append([[beta, alpha_bar, noise, np.sqrt(noise / alpha_bar)], posterior])
    return _identity(found, expected, single=1e-6)


def marginal() -> Finding:
    """q(z_n | x_0) against the recursion of means and variances along q(z_n | z_{n-1})."""
    steps = probdiff.forward_step(SCHEDULE, jnp.ones(X.shape), STEPS)
    mean, variance, expected = X, 0.0, []
    for gain, added in zip(np.asarray(steps.mean, np.float64), np.asarray(steps.variance, np.float64)):
        mean, variance = gain * mean, gain**2 * variance + added
        expected.append((mean, variance))
    closed = probdiff.forward_marginal(SCHEDULE, X, STEPS)
    return _identity([closed.mean, closed.variance], [np.stack(each) for each in zip(*expected)])


def bayes() -> Finding:
    """q(z_{n-1} | z_n, x_0) q(z_n | x_0) against q(z_n | z_{n-1}) q(z_{n-1} | x_0), on pairs drawn from the chain."""
    keys, n = jax.random.split(jax.random.key(0)), STEPS[1:]
    before, after = (probdiff.forward_marginal(SCHEDULE, X, k) for k in (n - 1, n))
    previous = before.sample(keys[0])
    step = probdiff.forward_step(SCHEDULE, previous, n)
    z = step.sample(keys[1])
    found = probdiff.forward_posterior(SCHEDULE, z, X, n).log_prob(previous) + after.log_prob(z)
    return _identity(found, step.log_prob(z) + before.log_prob(previous), floor=1)


def derivation() -> Finding:
    """log p, and log q by both guides, of a path by the programs against SciPy's normal densities, from β alone."""
    diffusion, x = _gaussian(), jnp.asarray(X)
    forward = handlers.trace(handlers.seed(diffusion.guide, 0)).get_trace(x)["z"]
    given = {"z": forward["value"]}
    after_bayes = handlers.trace(handlers.substitute(diffusion.posterior_guide, given)).get_trace(x)["z"]
    log_p, _ = log_density(diffusion.model, (x,), {}, given)
    log_q = [site["fn"].log_prob(given["z"]).sum() for site in (forward, after_bayes)]
    z = np.asarray(given["z"], np.float64)[::-1]
    previous, network = np.stack([X, *z[:-1]]), diffusion.network
    beta, noise = SCHEDULE.beta[:, None, None], _noised(SCHEDULE)[1]
    eps_hat = np.einsum("nij,nbj->nbi", network.weight, z) + network.bias[:, None]
    deviation = np.sqrt(beta) * np.concatenate([[[[1]]], noise[:-1] / noise[1:]])
    reverse = norm.logpdf(previous, (z - beta / noise * eps_hat) / np.sqrt(1 - beta), deviation)
    by_hand = norm.logpdf(z, np.sqrt(1 - beta) * previous, np.sqrt(beta)).sum()
    return _identity([log_p, log_q], [norm.logpdf(z[-1]).sum() + reverse.sum(), by_hand, by_hand], floor=1)


def given_terms() -> Finding:
    """The terms of the bound on given noise against NumPyro's KLs and log density of the same distributions."""
    found, expected = [], []
    _, _, eps, z = _noised(SCHEDULE)
    for diffusion in (_gaussian(), _gaussian(reverse_variance="forward")):
        terms = probdiff.elbo_terms(diffusion, X, noise=eps[None])
        found.append([terms.prior_kl, terms.step_kl[0], terms.reconstruction[0]])
        with jax.enable_x64(True):
            prior_kl = kl_divergence(probdiff.forward_marginal(SCHEDULE, X, 8).base_dist, dist.Normal(0.0, 1.0)).sum(-1)
            expected.append([prior_kl, _step_kls(diffusion), diffusion.reverse_kernel(z[0], 1).log_prob(X)])
    return _identity(found, expected, floor=1)


def mean_terms() -> Finding:
    """The mean terms of the bound against the closed form for Gaussian data."""
    diffusion = _gaussian(reverse_variance="forward")
    terms = probdiff.elbo_terms(diffusion, X, key=jax.random.key(1), num_draws=40_000)
    exact = exact_terms(diffusion, X)
    draws = jnp.concatenate([terms.step_kl, terms.reconstruction[:, None], terms.elbo[:, None]], 1)
    # If any one step KL were missing, its own term and the bound would be off by more.
    return _mean(draws, np.vstack([exact["step_kl"], exact["reconstruction"], exact["elbo"]]), power=0.1)


class _Scaled(eqx.Module):
    scale: jax.Array
    network: Callable[..., Any]

    def __call__(self, z: jax.Array, n: jax.Array) -> jax.Array:
        return self.scale * self.network(z, n)


def estimator(name: str) -> Finding:
    """An estimator of the bound, and its gradient in the network's scale, against the closed form for Gaussian data."""
    diffusion = probdiff.Diffusion(SCHEDULE, _Scaled(jnp.asarray(SCALE), GAUSSIAN.network(SCHEDULE)))
    guide, elbo = probdiff.ESTIMATORS[name](diffusion)
    learned, own = getattr(elbo, "initial_state", {}), diffusion.trainable()

    def one(key: jax.Array) -> jax.Array:
        def bound(scale: Any) -> jax.Array:
            params = {PARAMS: eqx.tree_at(lambda d: d.network.scale, own, scale), **learned}
            return -elbo.loss(key, params, diffusion.model, guide, jnp.asarray(X))

        return jnp.stack(jax.value_and_grad(bound)(own.network.scale))

    def exact(scale: Any) -> Any:
        return exact_terms(_gaussian(scale), X)["elbo"].sum()

    draws = 20_000 if getattr(elbo, "evaluations", SCHEDULE.num_steps) == SCHEDULE.num_steps else 100_000
    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=1000))(jax.random.split(jax.random.key(2), draws))
    slope = exact(SCALE + 0.5) - exact(SCALE - 0.5)  # without error, as the bound is quadratic in the scale
    # If any one step KL were missing, the bound of the three data would be off by more.
    return _mean(found, [exact(SCALE), slope], power=0.5)


def score_matching() -> Finding:
    """The terms of the loss with likelihood weights, and λ_n‖s + ε/σ_n‖² by the score, against NumPyro's step KLs."""
    diffusion, (signal, noise, eps, z) = _gaussian(), _noised(SCHEDULE)
    eps, z = jnp.asarray(eps), jnp.asarray(z)
    n = jnp.broadcast_to(STEPS, z.shape[:-1])
    term = probdiff.elbo.ScoreMatching(diffusion, "likelihood").term
    by_noise = term(diffusion, diffusion.sampled_step(X, jnp.asarray(X), n, eps))
    error = jnp.square(probdiff.chain.score.score(diffusion, z / signal, n) + eps * signal / noise).sum(-1)
    by_score = probdiff.elbo.likelihood_weights(diffusion)[:, None] * error
    return _identity([by_noise[1:], by_score[1:]], 2 * [_step_kls(diffusion)], floor=1)


def _log_mixture(x: Any, signal: Any, variance: Any) -> Any:
    """NumPyro's log density of the mixture, times ``signal`` and with noise of ``variance`` added, in float64."""
    with jax.enable_x64(True):
        mean, spread = np.asarray(signal)[..., None] * MIXTURE.means, np.asarray(signal)[..., None, None] ** 2
        covariance = spread * MIXTURE.covariances + np.asarray(variance)[..., None, None] * np.eye(2)
        mixing = dist.CategoricalProbs(jnp.asarray(MIXTURE.weights))
        return dist.MixtureSameFamily(mixing, dist.MultivariateNormal(mean, covariance)).log_prob(jnp.asarray(x))


def _gradient(log_prob: Callable[..., Any], x: Any) -> np.ndarray:
    """Autodiff in float64 of a function that maps ``(*batch, dim)`` to log densities of shape ``batch``."""
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.grad(lambda x: log_prob(x).sum()))(np.asarray(x, np.float64)))


def mixture_scores() -> Finding:
    """The exact ε-network of a mixture, as noise and as a score, against autodiff of NumPyro's log densities."""
    signal, noise, _, z = _noised(VE_SCHEDULE)
    z, n = jnp.asarray(z), jnp.broadcast_to(STEPS[: len(SIGMAS)], z.shape[:-1])
    x_n, diffusion = z / signal, probdiff.Diffusion(VE_SCHEDULE, MIXTURE.network(VE_SCHEDULE))
    eps_hat = -noise * _gradient(lambda z: _log_mixture(z, signal, noise**2), z)
    score = _gradient(lambda x: _log_mixture(x, np.ones_like(signal), (noise / signal) ** 2), x_n)
    found = [diffusion.predict_noise(z, n), probdiff.chain.score.score(diffusion, x_n, n)]
    return _identity(found, [eps_hat, score], double=1e-8, floor=1)


def conditional_scores() -> Finding:
    """The scores of the noising given x_0, VE and VP, against autodiff of NumPyro's normal log densities."""
    signal, noise, _, z = _noised(VE_SCHEDULE)
    n, z, sigma = STEPS[: len(SIGMAS)], jnp.asarray(z), SIGMAS[:, None, None]
    x_n = z / signal
    found = [probdiff.chain.score.conditional_score(VE_SCHEDULE, x_n, X, n), probdiff.chain.score.vp_conditional_score(VE_SCHEDULE, z, X, n)]
    vp = _gradient(lambda z: dist.Normal(signal * X, noise).log_prob(z), z)
    return _identity(found, [_gradient(lambda x: dist.Normal(X, sigma).log_prob(x), x_n), vp], floor=1 / SIGMAS[0])


def coordinates() -> Finding:
    """The maps between x_n and z_n against x_0 + σ_n ε and √ᾱ_n x_0 + √(1−ᾱ_n) ε."""
    _, _, eps, z = _noised(VE_SCHEDULE)
    x_n, n = X + SIGMAS[:, None, None] * eps, STEPS[: len(SIGMAS)]
    return _identity([probdiff.chain.score.vp_from_ve(VE_SCHEDULE, x_n, n), probdiff.chain.score.ve_from_vp(VE_SCHEDULE, z, n)], [z, x_n])


def flow() -> Finding:
    """log q(z_1) by the flow of the exact ε, from base q(z_N), against NumPyro's log density of the mixture."""
    schedule = probdiff.log_snr_schedule(30, 6.0, -3.0)
    diffusion, (signal, noise, _, z) = probdiff.Diffusion(schedule, MIXTURE.network(schedule)), _noised(schedule)
    first, last = (functools.partial(_log_mixture, signal=signal[k], variance=noise[k] ** 2) for k in (0, -1))
    error = probdiff.flow.flow_log_prob(diffusion, z[0], base=last, rtol=1e-6, atol=1e-6) - np.asarray(first(z[0]))
    return Finding(float(np.abs(error).max()), 1e-3, "nats")


def sandwich() -> Finding:
    """ELBO < IWAE < log p < upper bounds for data from the model, with log p by the covariance of the reverse chain."""
    diffusion = _gaussian()
    bounds = probdiff.sandwich(diffusion, key=jax.random.key(3), num_data=4000, num_particles=(1, 10))
    exact = exact_log_prob(diffusion, bounds.x)
    rising = np.diff([bounds.lower[1], bounds.lower[10], exact, bounds.upper[10], bounds.upper[1]], axis=0)
    z = rising.mean(1) / rising.std(1, ddof=1) * np.sqrt(rising.shape[1])
    return Finding(float(-z.min()), -Z_MAX, "s.e. above the next")


def pairing() -> Finding:
    """The step KLs in float32 against the same in float64, step by step; N = 1000, d = 64."""
    noise = np.random.default_rng(0).standard_normal((1, 1000, 1, 64))
    x, errors = np.random.default_rng(1).standard_normal((1, 64)), []
    for schedule in (probdiff.linear_schedule(1000), probdiff.cosine_schedule(1000), probdiff.log_snr_schedule(1000)):
        diffusion, step_kl = probdiff.Diffusion(schedule, lambda z, n: 0.95 * z), {}
        for dtype in (np.float32, np.float64):
            with jax.enable_x64(dtype == np.float64):
                terms = probdiff.elbo_terms(diffusion, x.astype(dtype), noise=noise.astype(dtype))
                step_kl[dtype] = np.asarray(terms.step_kl, np.float64)
        errors.append(np.abs(step_kl[np.float32] - step_kl[np.float64]).sum())
    return Finding(float(max(errors)), 3e-3, "nats")


def units() -> Finding:
    """log p of a path in other units against −Σ ln a, and bits/dim of 17 equally likely levels against log₂ 17."""
    loc, scale = np.array([3.0, -1.0]), np.array([10.0, 3.0])
    before, after = (
        Trace_ELBO().loss(jax.random.key(0), {}, diffusion.model, diffusion.guide, jnp.asarray(x))
        for diffusion, x in (
            (_gaussian(), X),
            (_gaussian(likelihood=probdiff.NormalLikelihood(loc, scale)), loc + scale * X),
        )
    )
    bits = probdiff.elbo.bits_per_dim(-64 * np.log(17), 64)
    return _identity([after - before, bits], [len(X) * np.log(scale).sum(), np.log2(17)])


CHECKS: dict[str, Callable[[], Finding]] = {
    "tables of the schedules": tables,
    "marginals by recursion": marginal,
    "Bayes' rule": bayes,
    "densities of a path": derivation,
    "terms on given noise": given_terms,
    "mean terms": mean_terms,
    **{f"estimator {name}": functools.partial(estimator, name) for name in probdiff.ESTIMATORS},
    "score matching": score_matching,
    "scores of a mixture": mixture_scores,
    "scores given x_0": conditional_scores,
    "VE and VP coordinates": coordinates,
    "probability flow": flow,
    "sandwich of log p": sandwich,
    "float32 step KLs": pairing,
    "units": units,
}
PRECISIONS = ("float32", "float64")
LEFT_OUT = [("float32 step KLs", "float64")]


def verify(progress: bool = False) -> dict[str, Any]:
    """Run all checks in float32 and in float64, independently of the present precision of JAX.

    A check that raises an exception has failed: a warning shows the exception, and the other checks are still run.

    Args:
        progress: Show a progress bar.

    Returns:
        A dict for JSON: ``holds``, whether all do; ``device``, ``jax``, ``numpyro`` and ``seconds``; and ``checks``, a
        list of dicts of ``check``, ``precision``, ``figure`` (None if not finite), ``bound``, ``unit`` and ``holds``.
    """
    start, rows = time.monotonic(), []
    todo = [case for case in itertools.product(CHECKS, PRECISIONS) if case not in LEFT_OUT]
    with tqdm(todo, unit="check", disable=not progress) as bar:
        for name, precision in bar:
            bar.set_description(name)
            try:
                with jax.enable_x64(precision == "float64"):
                    finding = CHECKS[name]()
            except Exception as error:
                warnings.warn(f"{name}, {precision}: {type(error).__name__}: {error}", stacklevel=2)
                finding = Finding(np.nan, 0.0, "it raised an error")
            row = {"check": name, "precision": precision, **finding._asdict(), "holds": finding.holds}
            rows.append(row | {"figure": finding.figure if np.isfinite(finding.figure) else None})
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "numpyro": numpyro.__version__}
    seconds = round(time.monotonic() - start, 1)
    return {"holds": all(row["holds"] for row in rows), **machine, "seconds": seconds, "checks": rows}


def format_table(results: dict[str, Any]) -> str:
    """The table of :func:`verify` as text, with a line for the overall result."""
    lines = [f"{'check':32}{'precision':12}{'figure':>9}{'bound':>9}  {'unit':20}verdict"]
    for row in results["checks"]:
        figure = "–" if row["figure"] is None else f"{row['figure']:.2g}"
        verdict = "holds" if row["holds"] else "FAILS"
        lines.append(
            f"{row['check']:32}{row['precision']:12}{figure:>9}{row['bound']:>9.2g}  {row['unit']:20}{verdict}"
        )
    held = sum(row["holds"] for row in results["checks"])
    machine = f"{results['device']}, JAX {results['jax']}, NumPyro {results['numpyro']}"
    return "\n".join([*lines, "", f"{held} of {len(lines) - 1} hold; {machine}; {results['seconds']:.0f} s"])


def run(arguments: argparse.Namespace) -> int:
    """Run all checks and print their table; returns the exit code."""
    results = verify(progress=True)
    print(json.dumps(results) if arguments.json else format_table(results), file=arguments.output)
    return 0 if results["holds"] else 1
