"""The table of bad inputs: each is refused with a typed error that names what was expected and what came."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO

import probdiff

SCHEDULE = probdiff.cosine_schedule(5)
NETWORK = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1)
NORMAL = probdiff.Diffusion(SCHEDULE, NETWORK)
GRID = probdiff.Diffusion(SCHEDULE, NETWORK, probdiff.DiscretizedNormalLikelihood(5))
OPTIMAL = probdiff.Diffusion(SCHEDULE, NETWORK, reverse_variance="optimal")
LINEAR = probdiff.oracles.GaussianOracle([0.0, 0.0], np.eye(2))
MIXTURE = probdiff.Diffusion(
    SCHEDULE, probdiff.networks.CategoricalHead(NETWORK, 5), GRID.likelihood, kernel=probdiff.chain.MixtureKernel(5)
)
PREDICTED = probdiff.Diffusion(SCHEDULE, probdiff.networks.VarianceHead(lambda z, n: z), dim=2, reverse_variance="predicted")
X = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
KEY = jax.random.key(0)
OF_VECTOR = probdiff.MLP(2, key=KEY, hidden=8, num_blocks=1, context_dim=3)
DROPPED = probdiff.networks.ContextDropout(OF_VECTOR)
GIVEN = probdiff.Diffusion(SCHEDULE, OF_VECTOR)
LABELLED = probdiff.networks.Embedding(DROPPED, 4, key=KEY)
OF_LABELS = probdiff.Diffusion(SCHEDULE, LABELLED)
NAN = np.where(np.arange(12).reshape(6, 2) == 5, np.nan, X).astype(np.float32)

DATA = {
    "nan": (NORMAL, NAN, ValueError, r"x: Expected finite values; got nan at index \[2, 1\]: fit to the complete rows; .*observed_log_prob"),
    "infinity": (NORMAL, np.where(np.isnan(NAN), np.inf, X), ValueError, r"got inf at index \[2, 1\]"),
    "integers for a density": (NORMAL, np.ones((6, 2), int), TypeError, "floats for NormalLikelihood.*got dtype int"),
    "complex": (NORMAL, X + 1j, TypeError, "got dtype complex"),
    "objects": (NORMAL, X.astype(object), TypeError, "got dtype object"),
    "strings": (NORMAL, X.astype(str), TypeError, "got dtype <U"),
    "booleans": (NORMAL, X > 0, TypeError, "got dtype bool"),
    "a list": (NORMAL, [[1.0, 2.0]], TypeError, "x: Expected an array; got list"),
    "one axis": (NORMAL, X[:, 0], ValueError, r"x: Expected shape \(datum, 2\); got shape \(6,\)"),
    "a masked array": (NORMAL, np.ma.masked_array(X, NAN != NAN), TypeError, "x: Expected complete data: .*probdiff.inference.smc.*; got a masked array"),
    "three axes": (NORMAL, X[None], ValueError, r"got shape \(1, 6, 2\)"),
    "another dimension": (NORMAL, X[:, :1], ValueError, r"x: Expected shape \(datum, 2\); got shape \(6, 1\)"),
    "empty": (NORMAL, X[:0], ValueError, "at least one datum"),
    "floats for a grid": (GRID, X, TypeError, "integers for DiscretizedNormalLikelihood.*got dtype float32"),
    "a level too many": (GRID, np.array([[0, 5]]), ValueError, r"x: Expected levels 0 … 4; got 5 at index \[0, 1\]"),
    "a negative level": (GRID, np.array([[0, 1], [-1, 2]]), ValueError, r"got -1 at index \[1, 0\]"),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("use", ["elbo_terms", "fit", "svi", "analytic"])
def test_data(case, use, monkeypatch):
    diffusion, x, error, message = DATA[case]
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("something was compiled"))
    with pytest.raises(error, match=message):
        if use == "elbo_terms":
            probdiff.elbo_terms(diffusion, x, key=jax.random.key(0))
        elif use == "fit":
            probdiff.fit(diffusion, x, iterations=2, progress=False)
        else:
            elbo = Trace_ELBO() if use == "svi" else probdiff.AnalyticELBO(diffusion)
            SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), elbo).init(jax.random.key(0), x)


GIVEN_TWO = probdiff.Diffusion(SCHEDULE, probdiff.MLP(2, key=KEY, hidden=8, num_blocks=1, context_dim=2))
def subsampled(x):
    with numpyro.plate("rows", 10, subsample_size=2) as rows:
        numpyro.sample("y", dist.Normal(x[0], 1.0), obs=jnp.arange(10.0)[rows])


def observed(diffusion, x, **options):
    return probdiff.inference.observed_log_prob(diffusion, x, **({"key": KEY, "num_particles": 2} | options))


program_of = probdiff.inference.Program
HALF = probdiff.inference.Inpainting(np.array([True, False]), X[0])
SCHEDULER = {"num_train_timesteps": 10, "beta_schedule": "linear", "beta_start": 0.01, "beta_end": 0.3, "clip_sample": False}
CALLS = {
    "the likelihood of no context": (lambda: probdiff.inference.ConditionalBound(GIVEN_TWO, None, key=KEY), ValueError, "context: Expected a context"),
    "a likelihood with a number for a key": (
        lambda: probdiff.inference.ConditionalEstimate(GIVEN_TWO, X, key=0), TypeError, "key: Expected a JAX key"
    ),
    "a bound of no draws": (
        lambda: probdiff.inference.ConditionalBound(GIVEN_TWO, X, key=KEY, num_draws=0), ValueError, "num_draws: Expected a positive integer; got 0"
    ),
    "an estimate of no paths": (
        lambda: probdiff.inference.ConditionalEstimate(GIVEN_TWO, X, key=KEY, num_particles=0), ValueError, "num_particles: Expected a positive integer; got 0"
    ),
    "the likelihood of a word": (lambda: probdiff.inference.ConditionalEstimate("fit", X, key=KEY), TypeError, "diffusion: Expected a Diffusion; got str"),
    "the likelihood of a model without context": (
        lambda: probdiff.inference.ConditionalBound(NORMAL, X, key=KEY), ValueError, "context: Expected None, for a network that takes no context="
    ),
    "a bound of other data": (
        lambda: probdiff.inference.ConditionalBound(GIVEN_TWO, X, key=KEY).log_prob(X[:3]), ValueError, "as many rows as there are data, 3; got 6 rows"
    ),
    "an estimate of other data": (
        lambda: probdiff.inference.ConditionalEstimate(GIVEN_TWO, X, key=KEY).log_prob(X[:3]), ValueError, "as many rows as there are data, 3; got 6 rows"
    ),
    "an observation with no noise": (lambda: probdiff.inference.LinearGaussian(np.ones((1, 2)), [0.0], 0.0), ValueError, "scale: Expected positive numbers; got 0.0"),
    "an observation with NaN": (lambda: probdiff.inference.LinearGaussian(np.ones((1, 2)), [np.nan], 1.0), ValueError, r"y: Expected finite values; got nan at index \[0\]"),
    "a matrix of another number of rows": (
        lambda: probdiff.inference.LinearGaussian(np.ones((3, 2)), [0.0], 1.0), ValueError, r"matrix: Expected shape \(1, dim\); got shape \(3, 2\)"
    ),
    "a matrix of another dimension": (
        lambda: probdiff.inference.smc(NORMAL, probdiff.inference.LinearGaussian(np.ones((1, 3)), [0.0], 1.0), key=KEY, num_particles=2),
        ValueError,
        r"matrix: Expected shape \(1, 2\); got shape \(1, 3\)",
    ),
    "a function that is not linear": (
        lambda: probdiff.inference.smc(NORMAL, probdiff.inference.LinearGaussian(lambda x: x**2, [0.0, 0.0], 1.0), key=KEY, num_particles=2),
        ValueError,
        "matrix: Expected a linear function; got one that is not",
    ),
    "a singular covariance": (
        lambda: probdiff.inference.LinearGaussian(np.ones((2, 2)), [0.0, 0.0], covariance=np.ones((2, 2))), ValueError, "covariance: Expected a positive definite matrix"
    ),
    "scale and covariance": (
        lambda: probdiff.inference.LinearGaussian(np.ones((1, 2)), [0.0], 1.0, covariance=[[1.0]]), ValueError, "scale, covariance: Expected exactly one of the two; got both"
    ),
    "a mask of numbers": (lambda: probdiff.inference.Inpainting(np.array([1, 0]), X[0]), TypeError, "mask: Expected truth values"),
    "a mask of the wrong shape": (
        lambda: probdiff.inference.smc(NORMAL, probdiff.inference.Inpainting(np.array([True, False, True]), np.ones(3)), key=KEY, num_particles=2),
        ValueError,
        r"mask: Expected shape \(2,\); got shape \(3,\)",
    ),
    "nothing observed": (lambda: probdiff.inference.Inpainting(np.array([False, False]), X[0]), ValueError, "mask: Expected at least one observed"),
    "nothing hidden": (lambda: probdiff.inference.Inpainting(np.array([True, True]), X[0]), ValueError, "mask: Expected at least one hidden"),
    "an observed NaN": (lambda: probdiff.inference.Inpainting(np.array([True, False]), [np.nan, 1.0]), ValueError, "values: Expected finite values; got nan"),
    "inpainting off the grid": (
        lambda: probdiff.inference.smc(GRID, probdiff.inference.Inpainting(np.array([True, False]), np.array([7, 0])), key=KEY, num_particles=2),
        ValueError,
        "x: Expected levels 0 … 4; got 7",
    ),
    "a program without observed sites": (
        lambda: probdiff.inference.smc(NORMAL, probdiff.inference.Program(lambda x: None), key=KEY, num_particles=2),
        ValueError,
        "function: Expected a program with observed sites; got none",
    ),
    "a program with a latent": (
        lambda: probdiff.inference.smc(NORMAL, probdiff.inference.Program(lambda x: numpyro.sample("a", numpyro.distributions.Normal(x[0], 1.0))), key=KEY, num_particles=2),
        ValueError,
        "function: Expected a program whose sites are all observed.*; got latent a",
    ),
    "a program with NaN": (
        lambda: probdiff.inference.smc(NORMAL, program_of(lambda x: numpyro.sample("y", dist.Normal(x[0], 1.0), obs=np.nan)), key=KEY, num_particles=2),
        ValueError,
        "y: Expected finite values; got nan",
    ),
    "a program with a part of the data": (
        lambda: probdiff.inference.smc(NORMAL, program_of(subsampled), key=KEY, num_particles=2),
        ValueError,
        "function: Expected plates without subsample_size: all that was observed; got rows",
    ),
    "a program with a factor": (
        lambda: probdiff.inference.smc(NORMAL, program_of(lambda x: numpyro.factor("y", x[0])), key=KEY, num_particles=2),
        ValueError,
        "function: Expected sites with a mean and a variance, for the twist; got Unit at site 'y'",
    ),
    "a posterior of no particles": (lambda: probdiff.inference.smc(NORMAL, HALF, key=KEY, num_particles=0), ValueError, "num_particles: Expected a positive integer; got 0"),
    "no runs": (lambda: probdiff.inference.smc(NORMAL, HALF, key=KEY, num_particles=2, num_runs=0), ValueError, "num_runs: Expected a positive integer; got 0"),
    "a twist by another name": (
        lambda: probdiff.inference.smc(NORMAL, HALF, key=KEY, num_particles=2, twist="tweedy"), ValueError, "twist: Expected one of .* or an AbstractTwist; got 'tweedy'"
    ),
    "an observation that is none": (lambda: probdiff.inference.log_evidence(NORMAL, X, key=KEY, num_particles=2), TypeError, "observation: Expected an AbstractObservation"),
    "particles of a network": (lambda: probdiff.inference.smc(NETWORK, HALF, key=KEY, num_particles=2), TypeError, "diffusion: Expected a Diffusion"),
    "particles without a context": (
        lambda: probdiff.inference.smc(GIVEN_TWO, HALF, key=KEY, num_particles=2), ValueError, "context: Expected .*: the network takes context=; got None"
    ),
    "particles with two contexts": (
        lambda: probdiff.inference.smc(GIVEN_TWO, HALF, key=KEY, num_particles=2, context=X[:2]), ValueError, "context: Expected as many rows as there are data, 1; got 2 rows"
    ),
    "bounds of the evidence of one datum": (
        lambda: probdiff.inference.evidence_bounds(NORMAL, HALF, key=KEY, num_data=1, num_particles=2), ValueError, "num_data: Expected at least 2; got 1"
    ),
    "bounds of the evidence by one particle": (
        lambda: probdiff.inference.evidence_bounds(NORMAL, HALF, key=KEY, num_data=2, num_particles=1), ValueError, "num_particles: Expected at least 2; got 1"
    ),
    "what was observed of no model": (lambda: observed(NETWORK, X), TypeError, "diffusion: Expected a Diffusion; got MLP"),
    "what was observed by no particles": (lambda: observed(NORMAL, NAN, num_particles=0), ValueError, "num_particles: Expected a positive integer; got 0"),
    "what was observed in no runs": (lambda: observed(NORMAL, NAN, num_runs=0), ValueError, "num_runs: Expected a positive integer; got 0"),
    "what was observed of another dimension": (lambda: observed(NORMAL, NAN[:, :1]), ValueError, r"x: Expected shape \(datum, 2\), .*; got shape \(6, 1\)"),
    "what was observed, in a list": (lambda: observed(NORMAL, [[1.0, 2.0]]), TypeError, "x: Expected an array; got list"),
    "infinity, observed": (lambda: observed(NORMAL, np.where(np.isnan(NAN), np.inf, X)), ValueError, r"x: Expected finite values; got inf at index \[2, 1\]"),
    "NaN, observed": (lambda: observed(NORMAL, NAN, mask=X == X), ValueError, r"x: Expected finite values; got nan at index \[2, 1\]"),
    "a mask of one datum": (lambda: observed(NORMAL, X, mask=X[0] > 0), ValueError, r"mask: Expected shape \(6, 2\), that of x; got shape \(2,\)"),
    "a mask of numbers by datum": (lambda: observed(NORMAL, X, mask=np.ones((6, 2))), TypeError, "mask: Expected truth values"),
    "halves of levels, observed": (lambda: observed(GRID, np.array([[0.5, np.nan]])), TypeError, "x: Expected integers for DiscretizedNormalLikelihood"),
    "what was observed of too few contexts": (
        lambda: observed(GIVEN_TWO, NAN, context=X[:2]), ValueError, "context: Expected as many rows as there are data, 6; got 2 rows"
    ),
    "what was observed without a context": (lambda: observed(GIVEN_TWO, NAN), ValueError, "context: Expected .*; got None"),
    "the flow of a grid as a prior": (lambda: probdiff.inference.FlowPrior(GRID), TypeError, "diffusion: Expected a NormalLikelihood, for a density"),
    "a flow of no steps": (lambda: probdiff.inference.FlowPrior(NORMAL, steps=0), ValueError, "steps: Expected a positive integer; got 0"),
    "a prior without its context": (lambda: probdiff.inference.ChainPrior(GIVEN_TWO), ValueError, "context: Expected .*; got None"),
    "a prior of no dimension": (
        lambda: probdiff.inference.ChainPrior(probdiff.Diffusion(SCHEDULE, lambda z, n: z)), ValueError, "diffusion: Expected one that knows its dimension"
    ),
    "resampled to none": (lambda: probdiff.inference.smc(NORMAL, HALF, key=KEY, num_particles=2).resample(KEY, 0), ValueError, "num_samples: Expected a positive"),
    "a kernel of no program": (lambda: probdiff.inference.PseudoMarginal(None), TypeError, "model: Expected a program .*; got NoneType"),
    "beta of 0": (lambda: probdiff.NoiseSchedule.from_betas([0.1, 0.0]), ValueError, "got 0.0 at step n = 2"),
    "beta of 1": (
        lambda: probdiff.NoiseSchedule.from_betas([1.0]),
        ValueError,
        "0 < beta < 1 .* got 1.0 at step n = 1",
    ),
    "negative beta": (lambda: probdiff.NoiseSchedule.from_betas([-0.1]), ValueError, "got -0.1"),
    "nan in beta": (lambda: probdiff.NoiseSchedule.from_betas([0.1, np.nan]), ValueError, "got nan at step n = 2"),
    "no beta": (lambda: probdiff.NoiseSchedule.from_betas([]), ValueError, "non-empty 1-D array"),
    "beta of rank 2": (lambda: probdiff.NoiseSchedule.from_betas([[0.1]]), ValueError, r"got shape \(1, 1\)"),
    "sigmas that fall": (
        lambda: probdiff.NoiseSchedule.from_sigmas([0.1, 0.5, 0.4]),
        ValueError,
        "sigmas: Expected numbers that increase with the step; got 0.4 at step n = 3",
    ),
    "two equal sigmas": (lambda: probdiff.NoiseSchedule.from_sigmas([0.1, 0.1]), ValueError, "got 0.1 at step n = 2"),
    "sigma of 0": (lambda: probdiff.NoiseSchedule.from_sigmas([0.0, 1.0]), ValueError, "positive finite .* got 0.0"),
    "nan in sigmas": (lambda: probdiff.NoiseSchedule.from_sigmas([0.1, np.nan]), ValueError, "got nan at step n = 2"),
    "infinite sigma": (lambda: probdiff.NoiseSchedule.from_sigmas([0.1, np.inf]), ValueError, "got inf at step n = 2"),
    "sigmas too far apart": (
        lambda: probdiff.NoiseSchedule.from_sigmas([1e-3, 1e200]),
        ValueError,
        "sigmas: Expected levels whose beta float64 tells from 0 and from 1; got 1e\\+200 at step n = 2",
    ),
    "no sigmas": (lambda: probdiff.NoiseSchedule.from_sigmas([]), ValueError, "sigmas: Expected a non-empty 1-D array"),
    "sigmas in words": (lambda: probdiff.NoiseSchedule.from_sigmas("abc"), TypeError, "sigmas: Expected .* got 'abc'"),
    "geometric upside down": (lambda: probdiff.geometric_schedule(5, 2.0, 1.0), ValueError, "sigma_min < sigma_max"),
    "score at step 0": (lambda: probdiff.chain.score.score(NORMAL, X, 0), ValueError, "n: Expected 1 <= n <= 5; got 0"),
    "noising at step 6": (lambda: probdiff.chain.score.noising(SCHEDULE, X, 6), ValueError, "n: Expected 1 <= n <= 5; got 6"),
    "score at half a step": (lambda: probdiff.chain.score.score_from_eps(SCHEDULE, X, 1.5), TypeError, "n: Expected an integer"),
    "score of a network": (lambda: probdiff.chain.score.score(NETWORK, X, 1), TypeError, "diffusion: Expected a Diffusion"),
    "noise of no schedule": (lambda: probdiff.chain.score.noising(NORMAL, X, 1), TypeError, "schedule: Expected a NoiseSchedule"),
    "weights by another name": (
        lambda: probdiff.elbo.ScoreMatching(NORMAL, "sigma"),
        ValueError,
        r"weights: Expected one of \['sigma_squared', 'likelihood'\] or an array; got 'sigma'",
    ),
    "too few weights": (lambda: probdiff.elbo.ScoreMatching(NORMAL, [1.0]), ValueError, r"shape \(num_steps,\) = \(5,\)"),
    "a weight of 0": (lambda: probdiff.elbo.ScoreMatching(NORMAL, np.arange(5.0)), ValueError, "positive numbers; got 0.0"),
    "none to sample": (
        lambda: probdiff.samplers.ancestral(NORMAL, key=KEY, num_samples=0),
        ValueError,
        "num_samples: Expected a positive integer; got 0",
    ),
    "samples of a network": (
        lambda: probdiff.samplers.ancestral(NETWORK, key=KEY, num_samples=1),
        TypeError,
        "diffusion: Expected a Diffusion",
    ),
    "samples of no dimension": (
        lambda: probdiff.samplers.ddim(
            probdiff.Diffusion(SCHEDULE, lambda z, n: z), key=KEY, num_samples=1
        ),
        ValueError,
        "diffusion: Expected one that knows its dimension",
    ),
    "eta": (
        lambda: probdiff.samplers.ddim(NORMAL, key=KEY, num_samples=1, eta=1.5),
        ValueError,
        "eta: Expected 0 <= eta <= 1; got 1.5",
    ),
    "steps that fall": (
        lambda: probdiff.samplers.ddim(NORMAL, key=KEY, num_samples=1, steps=[3, 2]),
        ValueError,
        r"steps: Expected a number of steps, 1 to 5, .* got \[3 2\]",
    ),
    "step 6 of 5": (
        lambda: probdiff.samplers.annealed_langevin(NORMAL, key=KEY, num_samples=1, steps=[1, 6]),
        ValueError,
        r"steps: Expected a number of steps, 1 to 5, .* got \[1 6\]",
    ),
    "half a number of steps": (
        lambda: probdiff.samplers.ddim(NORMAL, key=KEY, num_samples=1, steps=2.5),
        TypeError,
        "steps: Expected .* got dtype float64",
    ),
    "a step size of 0": (
        lambda: probdiff.samplers.annealed_langevin(NORMAL, key=KEY, num_samples=1, step_size=0.0),
        ValueError,
        "step_size: Expected a positive number; got 0.0",
    ),
    "no updates": (
        lambda: probdiff.samplers.annealed_langevin(NORMAL, key=KEY, num_samples=1, num_updates=0),
        ValueError,
        "num_updates: Expected a positive integer; got 0",
    ),
    "a tolerance of 0": (
        lambda: probdiff.samplers.probability_flow(NORMAL, key=KEY, num_samples=1, rtol=0.0),
        ValueError,
        "rtol: Expected a number between 0 and 1; got 0.0",
    ),
    "probes without a key": (
        lambda: probdiff.flow.flow_log_prob(NORMAL, X, num_probes=1),
        TypeError,
        "key: Expected a JAX key, .* got None",
    ),
    "flow of one axis": (
        lambda: probdiff.flow.flow_log_prob(NORMAL, X[:, 0]),
        ValueError,
        r"z: Expected shape \(datum, 2\); got shape \(6,\)",
    ),
    "flow of nan": (lambda: probdiff.flow.flow_log_prob(NORMAL, NAN), ValueError, r"z: Expected finite .* index \[2, 1\]"),
    "flow of nan data": (
        lambda: probdiff.flow_likelihood(NORMAL, NAN, key=jax.random.key(0)),
        ValueError,
        r"x: Expected finite values; got nan at index \[2, 1\]",
    ),
    "no steps": (lambda: probdiff.cosine_schedule(0), ValueError, "num_steps: Expected at least 1; got 0"),
    "negative steps": (lambda: probdiff.linear_schedule(-3), ValueError, "num_steps: Expected at least 1; got -3"),
    "half a step": (lambda: probdiff.log_snr_schedule(2.5), TypeError, "num_steps: Expected an integer; got 2.5"),
    "log-SNR upside down": (lambda: probdiff.log_snr_schedule(5, -3.0, 3.0), ValueError, "log_snr_min < log_snr_max"),
    "beta_max of 2": (lambda: probdiff.linear_schedule(5, 1e-4, 2.0), ValueError, "beta_max < 1"),
    "no schedule": (lambda: probdiff.Diffusion(100, NETWORK), TypeError, "schedule: Expected a NoiseSchedule; got int"),
    "no network": (lambda: probdiff.Diffusion(SCHEDULE, None), TypeError, "network: Expected a callable"),
    "no likelihood": (lambda: probdiff.Diffusion(SCHEDULE, NETWORK, "normal"), TypeError, "likelihood: Expected"),
    "a class for a likelihood": (
        lambda: probdiff.Diffusion(SCHEDULE, NETWORK, probdiff.NormalLikelihood),
        TypeError,
        "likelihood: Expected an instance",
    ),
    "a learned variance without a schedule": (
        lambda: probdiff.chain.GaussianKernel("learned"), ValueError, r"schedule: Expected GaussianKernel\(name, schedule, dim\)"
    ),
    "reverse variance": (
        lambda: probdiff.Diffusion(SCHEDULE, NETWORK, reverse_variance="beta"),
        ValueError,
        r"reverse_variance: Expected one of \['posterior', 'forward', 'learned', 'optimal', 'predicted'\] or an AbstractReverseVariance; got 'beta'",
    ),
    "two dimensions": (lambda: probdiff.Diffusion(SCHEDULE, NETWORK, dim=3), ValueError, "dim: Expected 2"),
    "one level": (lambda: probdiff.DiscretizedNormalLikelihood(1), ValueError, "levels: Expected at least 2; got 1"),
    "half a level": (lambda: probdiff.DiscretizedNormalLikelihood(2.5), TypeError, "levels: Expected an integer"),
    "no categories": (lambda: probdiff.likelihoods.CategoricalLikelihood(1.5), TypeError, "a number of categories, or a sequence"),
    "no columns": (lambda: probdiff.likelihoods.ColumnLikelihood([]), TypeError, "parts: Expected a dict from columns"),
    "a head for no likelihood": (
        lambda: probdiff.networks.ColumnHead(NETWORK, 3),
        TypeError,
        "likelihood: Expected an AbstractLikelihood; got int",
    ),
    "parameters of no function": (lambda: probdiff.networks.from_apply(None, {"w": X}), TypeError, r"apply: Expected a callable apply\(params, z, n\); got NoneType"),
    "a function of no parameters": (
        lambda: probdiff.networks.from_apply(lambda params, z, n: z, {"w": 3}), ValueError, "params: Expected a tree with floating-point arrays, to be trained; got {'w': 3}"
    ),
    "parameters with batch statistics": (
        lambda: probdiff.networks.from_apply(lambda params, z, n: z, {"params": {"w": X}, "batch_stats": {"mean": X}}),
        ValueError,
        r"""params: Expected the collection "params" of Flax linen alone; got \['batch_stats'\] beside it: lambda params""",
    ),
    "a module of no library": (lambda: probdiff.networks.from_torch("unet"), TypeError, "module: Expected a torch.nn.Module; got str"),
    "a list to split": (lambda: probdiff.datasets.split([[1.0, 2.0]]), ValueError, "at least 10 rows"),
    "an index of an array": (lambda: probdiff.datasets.split(np.ones((20, 2)), index="a"), ValueError, "index: Expected none for an array"),
    "an index of digits": (lambda: probdiff.datasets.load("digits", index="a"), ValueError, "index: Expected none for digits"),
    "a context of digits": (lambda: probdiff.datasets.load("digits", context="label"), ValueError, "context: Expected labels, or none, for digits"),
    "a context of other rows": (
        lambda: probdiff.datasets.split(np.ones((20, 2)), context=np.arange(19)),
        ValueError,
        "context: Expected as many rows as there are data, 20; got 19 rows",
    ),
    "an unknown label": (
        lambda: probdiff.datasets.Covariates((probdiff.datasets.Covariate("ill", (0.0, 1.0)),)).encode([[2]]),
        ValueError,
        "context: Expected one of the labels 0, 1; got 2 in row 0",
    ),
    "negative scale": (lambda: probdiff.NormalLikelihood(scale=-1.0), ValueError, "scale: Expected positive numbers"),
    "nan in loc": (lambda: probdiff.NormalLikelihood(loc=[0.0, np.nan]), ValueError, "loc: Expected finite values"),
    "constant column": (
        lambda: probdiff.NormalLikelihood.standardized(X * [1, 0] + 0.1),
        ValueError,
        "a constant column 1",
    ),
    "one row to standardise": (lambda: probdiff.NormalLikelihood.standardized(X[:1]), ValueError, "1 rows"),
    "scales for other data": (
        lambda: probdiff.NormalLikelihood(scale=[1.0, 2.0, 3.0]).encode(X),
        ValueError,
        "3 dimensions, as the likelihood's scale has",
    ),
    "no draws": (
        lambda: probdiff.elbo_terms(NORMAL, X, key=KEY, num_draws=0),
        ValueError,
        "num_draws: Expected a positive integer; got 0",
    ),
    "neither key nor noise": (
        lambda: probdiff.elbo_terms(NORMAL, X),
        ValueError,
        "exactly one of the two; got neither",
    ),
    "noise of another shape": (
        lambda: probdiff.elbo_terms(NORMAL, X, noise=np.zeros((3, 4, 6, 2))),
        ValueError,
        r"noise: Expected shape .* \(3, 5, 6, 2\); got \(3, 4, 6, 2\)",
    ),
    "a model for a diffusion": (
        lambda: probdiff.elbo_terms(NORMAL.model, X, key=jax.random.key(0)),
        TypeError,
        "diffusion: Expected a Diffusion",
    ),
    "parameters of another": (
        lambda: probdiff.elbo_terms(NORMAL.bind({"w": 1}), X, key=jax.random.key(0)),
        ValueError,
        r"params: Expected only the site 'diffusion\$params'",
    ),
    "no iterations": (
        lambda: probdiff.fit(NORMAL, X, iterations=0),
        ValueError,
        "iterations: Expected a positive integer",
    ),
    "no batch": (lambda: probdiff.fit(NORMAL, X, batch_size=0), ValueError, "batch_size: Expected a positive integer"),
    "no learning": (
        lambda: probdiff.fit(NORMAL, X, learning_rate=0.0),
        ValueError,
        "learning_rate: Expected a positive",
    ),
    "a decay of 1": (
        lambda: probdiff.fit(NORMAL, X, ema_decay=1),
        ValueError,
        "ema_decay: Expected 0 <= ema_decay < 1",
    ),
    "validation data": (lambda: probdiff.fit(NORMAL, X, validation=NAN), ValueError, "got nan"),
    "nothing to train": (
        lambda: probdiff.fit(probdiff.Diffusion(SCHEDULE, lambda z, n: z), X),
        ValueError,
        "something to train",
    ),
    "no run": (lambda: probdiff.open_run("nowhere"), FileNotFoundError, "nowhere, which has no config.json"),
    "no particles": (
        lambda: probdiff.iwae(NORMAL, X, key=KEY, num_particles=0),
        ValueError,
        "num_particles: Expected a positive integer; got 0",
    ),
    "no paths": (lambda: probdiff.elbo.path_elbo(NORMAL, X, key=KEY, num_draws=0), ValueError, "num_draws: Expected a pos"),
    "paths of a network": (
        lambda: probdiff.elbo.path_elbo(NETWORK, X, key=KEY, num_draws=1),
        TypeError,
        "diffusion: Expected a Diffusion; got MLP",
    ),
    "weights of one axis": (
        lambda: probdiff.pareto_khat(X[0]),
        ValueError,
        r"log_weights: Expected shape \(draw, datum\); got shape \(2,\)",
    ),
    "a sandwich of one": (
        lambda: probdiff.sandwich(NORMAL, key=KEY, num_data=1),
        ValueError,
        "num_data: Expected at least 2, for an error; got 1",
    ),
    "an unknown estimator": (
        lambda: probdiff.compare_estimators(NORMAL, X, key=KEY, estimators=["trase"]),
        ValueError,
        "estimators: Expected names out of trace",
    ),
    "one model to rank": (
        lambda: probdiff.compare_models({"one": NORMAL}, X, key=KEY),
        ValueError,
        "models: Expected at least two; got 1",
    ),
    "an estimator of a network": (
        lambda: probdiff.ESTIMATORS["kl_uniform"](NETWORK),
        TypeError,
        "diffusion: Expected a Diffusion; got MLP",
    ),
    "an audit of nan": (
        lambda: probdiff.audit(NORMAL, NAN, key=KEY),
        ValueError,
        r"x: Expected finite values; got nan at index \[2, 1\]",
    ),
    "an audit of a network": (lambda: probdiff.audit(NETWORK, X, key=KEY), TypeError, "diffusion: Expected a Diffusion; got MLP"),
    "an audit of one draw": (lambda: probdiff.audit(NORMAL, X, key=KEY, num_draws=1), ValueError, "num_draws: Expected at least 2, for an error; got 1"),
    "an audit on one datum": (lambda: probdiff.audit(NORMAL, X[:1], key=KEY), ValueError, "x: Expected at least two data; got 1"),
    "no oracle": (lambda: probdiff.diagnostics.gap_decomposition(NORMAL, None, X, key=KEY), TypeError, "oracle: Expected a distribution"),
    "both ways of nan": (
        lambda: probdiff.diagnostics.compute_both_ways(NORMAL, NAN, key=KEY, num_draws=2),
        ValueError,
        r"x: Expected finite values; got nan at index \[2, 1\]",
    ),
    "common paths of nan": (
        lambda: probdiff.diagnostics.compare_on_common_paths(NORMAL, NAN, key=KEY),
        ValueError,
        r"x: Expected finite values; got nan at index \[2, 1\]",
    ),
    "the bound of a data set of one": (
        lambda: probdiff.elbo.data_set_elbo(NORMAL, X[:1], key=KEY),
        ValueError,
        "x: Expected at least two data; got 1",
    ),
    "a data set without any noise": (
        lambda: probdiff.elbo.data_set_elbo(NORMAL, X, key=KEY, noise_share=0),
        ValueError,
        "noise_share: Expected a positive number; got 0",
    ),
    "marginal at step 0": (lambda: probdiff.forward_marginal(SCHEDULE, X, 0), ValueError, "1 <= n <= 5; got 0"),
    "step 1.0": (lambda: probdiff.forward_step(SCHEDULE, X, 1.0), TypeError, "n: Expected an integer step; got dtype"),
    "posterior at step 1": (lambda: probdiff.forward_posterior(SCHEDULE, X, X, 1), ValueError, "2 <= n <= 5; got 1"),
    "a chain of no schedule": (
        lambda: probdiff.forward_marginal(NORMAL, X, 1),
        TypeError,
        "schedule: Expected a NoiseSchedule; got Diffusion",
    ),
    "learned variances of no dimension": (
        lambda: probdiff.Diffusion(SCHEDULE, lambda z, n: z, reverse_variance="learned"),
        ValueError,
        "dim: Expected Diffusion\\(…, dim=…\\) or a network with .dim, for the variances to be learned; got neither",
    ),
    "optimal variances of others": (
        lambda: probdiff.elbo.optimal_variance(NORMAL, X, key=KEY),
        ValueError,
        "diffusion: Expected reverse_variance='optimal'; got posterior",
    ),
    "one learned step": (lambda: probdiff.LearnedSchedule(1), ValueError, "num_steps: Expected at least 2 for"),
    "learned ends": (lambda: probdiff.LearnedSchedule(5, -1.0, 1.0), ValueError, "log_snr_max, log_snr_min: Expected"),
    "increasing log-SNR": (
        lambda: probdiff.NoiseSchedule.from_log_snr([1.0, 2.0]),
        ValueError,
        "log_snr: Expected finite numbers that decrease with the step; got 2.0 at step n = 2",
    ),
    "a shape to learn of a fixed schedule": (
        lambda: probdiff.AnalyticELBO(NORMAL, "uniform", schedule_loss="variance"),
        ValueError,
        "schedule_loss: Expected a LearnedSchedule and one step a datum",
    ),
    "a head on nothing": (lambda: probdiff.networks.X0Head(3), TypeError, "network: Expected a callable network"),
    "a head on another shape": (
        lambda: probdiff.Diffusion(SCHEDULE, probdiff.networks.VHead(lambda z, n: z[0])).predict(X, 1),
        ValueError,
        r"network\(z, n\): Expected shape \(6, 2\), for a VHead; got \(2,\)",
    ),
    "a step between steps": (
        lambda: probdiff.Diffusion(SCHEDULE, probdiff.networks.X0Head(lambda z, n: z)).predict_noise_at(X, 0.3),
        ValueError,
        "network: Expected an AbstractNetwork, to be asked between steps; got a function, which is told the step",
    ),
    "one level for a head": (lambda: probdiff.networks.CategoricalHead(NETWORK, 1), ValueError, "levels: Expected at least 2; got 1"),
    "logits of one number": (
        lambda: probdiff.Diffusion(SCHEDULE, probdiff.networks.CategoricalHead(NETWORK, 5)).predict(X, 1),
        ValueError,
        r"network\(z, n\): Expected shape \(6, 2, 5\), for a CategoricalHead; got \(6, 2\)",
    ),
    "a mixture without levels, afterwards": (
        lambda: probdiff.Diffusion(SCHEDULE, NETWORK, GRID.likelihood).with_kernel(probdiff.chain.MixtureKernel(5)),
        ValueError,
        "network: Expected a CategoricalHead of 5 levels for this MixtureKernel; got a MLP",
    ),
    "a mixture without levels": (
        lambda: probdiff.Diffusion(SCHEDULE, NETWORK, GRID.likelihood, kernel=probdiff.chain.MixtureKernel(5)),
        ValueError,
        "network: Expected a CategoricalHead of 5 levels for this MixtureKernel; got a MLP",
    ),
    "a mixture for a density": (
        lambda: probdiff.Diffusion(SCHEDULE, probdiff.networks.CategoricalHead(NETWORK, 5), kernel=probdiff.chain.MixtureKernel(5)),
        ValueError,
        "likelihood: Expected a DiscretizedNormalLikelihood of 5 levels for this MixtureKernel; got a NormalLikelihood",
    ),
    "a mixture for levels from 3": (
        lambda: probdiff.Diffusion(
            SCHEDULE,
            probdiff.networks.CategoricalHead(NETWORK, 5),
            probdiff.DiscretizedNormalLikelihood(5, first=3),
            kernel=probdiff.chain.MixtureKernel(5),
        ),
        ValueError,
        "likelihood: Expected levels from 0 for a MixtureKernel; got levels from 3: subtract it from the data",
    ),
    "a predicted variance without a network for it": (
        lambda: probdiff.Diffusion(SCHEDULE, NETWORK, kernel=probdiff.chain.PredictedVarianceKernel()),
        ValueError,
        "network: Expected a VarianceHead for predicted variances; got a MLP",
    ),
    "one output where two are needed": (
        lambda: probdiff.Diffusion(SCHEDULE, probdiff.networks.VarianceHead(NETWORK), reverse_variance="predicted").predict(X, 1),
        ValueError,
        r"network\(z, n\): Expected shape \(6, 4\) or \(6, 2, 2\), for a VarianceHead; got \(6, 2\)",
    ),
    "a head of levels for a mean": (
        lambda: probdiff.Diffusion(SCHEDULE, probdiff.networks.VarianceHead(MIXTURE.network)).predict(X, 1),
        ValueError,
        "network: Expected a network or a head with one output a dimension; got a CategoricalHead",
    ),
    "data cut off at nothing": (
        lambda: probdiff.networks.ClipHead(NETWORK, 0),
        ValueError,
        "bound: Expected a positive number; got 0",
    ),
    "score matching of predicted variances": (
        lambda: probdiff.elbo.ScoreMatching(PREDICTED),
        ValueError,
        "diffusion: Expected a Gaussian kernel with one variance a step for score matching; got predicted",
    ),
    "the gap of predicted variances": (
        lambda: probdiff.diagnostics.gap_decomposition(PREDICTED, LINEAR, X, key=KEY),
        ValueError,
        "diffusion: Expected a reverse kernel that asks for the noise alone; got predicted",
    ),
    "guidance of predicted variances": (
        lambda: probdiff.samplers.guided(PREDICTED, 1.0),
        ValueError,
        "diffusion: Expected a reverse kernel that asks for the noise; got a predicted",
    ),
    "a scheduler that is a name": (
        lambda: probdiff.chain.diffusers_schedule("DDPMScheduler"),
        TypeError,
        "config: Expected a dict, or a scheduler with .config; got str",
    ),
    "no signal at step N": (
        lambda: probdiff.chain.diffusers_schedule(SCHEDULER | {"rescale_betas_zero_snr": True}),
        ValueError,
        "rescale_betas_zero_snr: Expected False: .*ᾱ_N = 0; got True",
    ),
    "trained betas of no signal": (
        lambda: probdiff.chain.diffusers_schedule({"trained_betas": [0.1, 1.0]}),
        ValueError,
        "betas: Expected 0 < beta < 1 at every step; got 1.0 at step n = 2",
    ),
    "an unknown beta_schedule": (
        lambda: probdiff.chain.diffusers_schedule(SCHEDULER | {"beta_schedule": "laplace"}),
        ValueError,
        r"beta_schedule: Expected one of \['linear', 'scaled_linear', 'squaredcos_cap_v2', 'sigmoid'\], or trained_betas; got 'laplace'",
    ),
    "betas from nowhere": (
        lambda: probdiff.chain.diffusers_schedule({"beta_schedule": "linear", "beta_end": 0.02, "num_train_timesteps": 10}),
        ValueError,
        "beta_start: Expected a number in the configuration; got None",
    ),
    "betas that fall": (
        lambda: probdiff.chain.diffusers_schedule(SCHEDULER | {"beta_end": 0.001}),
        ValueError,
        "beta_start, beta_end: Expected 0 < beta_start <= beta_end < 1; got 0.01, 0.001",
    ),
    "no number of timesteps": (
        lambda: probdiff.chain.diffusers_schedule(SCHEDULER | {"num_train_timesteps": 10.0}),
        ValueError,
        "num_train_timesteps: Expected a number of steps in the configuration; got 10.0",
    ),
    "thresholding": (
        lambda: probdiff.presets.from_diffusers(lambda z, t: z, SCHEDULER | {"thresholding": True}),
        ValueError,
        "thresholding: Expected False: .*; got True",
    ),
    "clipping that is not said": (
        lambda: probdiff.presets.from_diffusers(lambda z, t: z, {name: value for name, value in SCHEDULER.items() if name != "clip_sample"}),
        ValueError,
        "clip_sample: Expected True or False in the configuration; got None",
    ),
    "clipping at nothing": (
        lambda: probdiff.presets.from_diffusers(lambda z, t: z, SCHEDULER | {"clip_sample_range": None}),
        ValueError,
        "clip_sample_range: Expected a positive number; got None",
    ),
    "a flow's prediction": (
        lambda: probdiff.presets.from_diffusers(lambda z, t: z, SCHEDULER | {"prediction_type": "flow_prediction"}),
        ValueError,
        r"prediction_type: Expected one of \['epsilon', 'v_prediction', 'sample'\]; got 'flow_prediction'",
    ),
    "a variance without a range": (
        lambda: probdiff.presets.from_diffusers(lambda z, t: z, SCHEDULER | {"variance_type": "learned"}),
        ValueError,
        r"variance_type: Expected one of \['fixed_small', .*'learned_range'\]; got 'learned'",
    ),
    "the root of a logarithm": (
        lambda: probdiff.presets.from_diffusers(lambda z, t: z, SCHEDULER | {"variance_type": "fixed_large_log"}),
        ValueError,
        "variance_type: Expected one of .*; got 'fixed_large_log'",
    ),
    "an unknown schedule of improved-diffusion": (
        lambda: probdiff.chain.improved_diffusion_schedule("sqrt", 100),
        ValueError,
        "name: Expected 'linear' or 'cosine'; got 'sqrt'",
    ),
    "too few steps of a scaled schedule": (
        lambda: probdiff.chain.improved_diffusion_schedule("linear", 20),
        ValueError,
        "num_steps: Expected more than 20 for 'linear', whose last beta is 20/N; got 20",
    ),
    "numbers for gamma": (
        lambda: probdiff.chain.vdm_schedule(np.linspace(-13, 5, 10), 10),
        TypeError,
        "gamma: Expected a function of an array of times; got ndarray",
    ),
    "a constant gamma": (
        lambda: probdiff.chain.vdm_schedule(lambda t: 5.0, 10),
        ValueError,
        r"gamma: Expected an array of shape \(10,\), as the times have; got shape \(\)",
    ),
    "a gamma that falls": (
        lambda: probdiff.chain.vdm_schedule(lambda t: -t, 10),
        ValueError,
        "log_snr: Expected finite numbers that decrease with the step; got .* at step n = 2",
    ),
    "one noise level of a VDM": (lambda: probdiff.chain.vdm_schedule(lambda t: t, 1), ValueError, "num_steps: Expected at least 2"),
    "noise levels of EDM in the wrong order": (
        lambda: probdiff.chain.edm_schedule(10, 80.0, 0.002),
        ValueError,
        "sigma_min, sigma_max, rho: Expected 0 < sigma_min < sigma_max and rho > 0, finite; got 80.0, 0.002, 7.0",
    ),
    "a network of the log-SNR, told a timestep": (
        lambda: probdiff.networks.from_timesteps(NETWORK),
        ValueError,
        r"network: Expected a callable network\(z, t\); got a MLP, which is told the log-SNR",
    ),
    "timesteps in a table": (
        lambda: probdiff.networks.from_timesteps(lambda z, t: z, [[0, 1]]),
        ValueError,
        r"timesteps: Expected N numbers; got shape \(1, 2\) of int64",
    ),
    "no network of a VDM": (lambda: probdiff.networks.from_vdm(None), TypeError, r"network: Expected a callable network\(z, gamma\); got NoneType"),
    "no denoiser": (lambda: probdiff.networks.from_denoiser(3), TypeError, r"network: Expected a callable network\(x, sigma\); got int"),
    "data without a scale": (
        lambda: probdiff.networks.from_edm(lambda x, c: x, 0.0),
        ValueError,
        "sigma_data: Expected a positive number; got 0.0",
    ),
    "a kernel's name for a kernel": (
        lambda: probdiff.Diffusion(SCHEDULE, NETWORK, kernel="mixture"),
        TypeError,
        "kernel: Expected an AbstractKernel; got str",
    ),
    "points for a mixture": (
        lambda: probdiff.AnalyticELBO(MIXTURE, points="batch"),
        ValueError,
        "points: Expected None with a MixtureKernel; got 'batch'",
    ),
    "a flat image": (lambda: probdiff.networks.ConvNet(64, key=KEY), ValueError, r"shape: Expected \(height, width\); got 64"),
    "no channels": (lambda: probdiff.networks.ConvNet((8, 8), key=KEY, channels=0), ValueError, "channels: Expected a positive"),
    "channels that are no multiple": (lambda: probdiff.networks.UNet((8, 8), key=KEY, channels=3), ValueError, "channels: Expected a multiple of 2; got 3"),
    "half precision": (
        lambda: probdiff.networks.UNet((8, 8), key=KEY, products="float16"),
        ValueError,
        "products: Expected one of .None, 'bfloat16'.; got 'float16'",
    ),
    "waves that are no integers": (lambda: probdiff.networks.UNet((8, 8), key=KEY, fourier=(0.5,)), ValueError, "fourier: Expected integers from 0 to 15"),
    "a mixture on one level": (lambda: probdiff.networks.LevelMixtureHead(NETWORK, 1), ValueError, "levels: Expected at least 2; got 1"),
    "a mixture of nothing": (lambda: probdiff.networks.LevelMixtureHead(NETWORK, 8, 0), ValueError, "components: Expected a positive"),
    "score matching of a mixture": (
        lambda: probdiff.elbo.ScoreMatching(MIXTURE),
        ValueError,
        "diffusion: Expected a Gaussian kernel with one variance a step for score matching; got MixtureKernel",
    ),
    "score matching by dimension": (
        lambda: probdiff.elbo.likelihood_weights(probdiff.Diffusion(SCHEDULE, NETWORK, reverse_variance="learned")),
        ValueError,
        "diffusion: Expected a Gaussian kernel with one variance a step for score matching; got learned",
    ),
    "score matching of a learned schedule": (
        lambda: probdiff.elbo.ScoreMatching(probdiff.Diffusion(probdiff.LearnedSchedule(5), NETWORK)),
        ValueError,
        "diffusion: Expected a NoiseSchedule for score matching; got a LearnedSchedule",
    ),
    "closed form of other variances": (
        lambda: probdiff.oracles.exact_terms(
            probdiff.Diffusion(SCHEDULE, LINEAR.network(SCHEDULE), reverse_variance="optimal"), X
        ),
        ValueError,
        "diffusion: Expected reverse_variance 'posterior' or 'forward'; got 'optimal'",
    ),
    "a kernel by another name": (lambda: probdiff.chain.GaussianKernel("beta"), ValueError, "reverse_variance: Expected one"),
    "conditional score at step 9": (
        lambda: probdiff.chain.score.conditional_score(SCHEDULE, X, X, 9),
        ValueError,
        "n: Expected 1 <= n <= 5; got 9",
    ),
    "weights of a schedule": (
        lambda: probdiff.elbo.likelihood_weights(SCHEDULE),
        TypeError,
        "diffusion: Expected a Diffusion; got NoiseSchedule",
    ),
    "a tree of a model": (lambda: probdiff.to_datatree(NORMAL), TypeError, "terms: Expected an ELBOTerms; got Diffusion"),
    "dimensions of a schedule": (
        lambda: probdiff.diagnostics.arviz_dims(SCHEDULE),
        TypeError,
        "diffusion: Expected a Diffusion; got NoiseSchedule",
    ),
    "a run of a network": (
        lambda: probdiff.storage.create_run("nowhere", NETWORK),
        TypeError,
        "diffusion: Expected a Diffusion; got MLP",
    ),
    "a number for a key": (
        lambda: probdiff.elbo_terms(NORMAL, X, key=3),
        TypeError,
        "key: Expected a JAX key, such as jax.random.key\\(0\\); got 3",
    ),
    "two keys": (
        lambda: probdiff.fit(NORMAL, X, key=jax.random.split(KEY)),
        TypeError,
        "key: Expected a JAX key",
    ),
    "a number for parameters": (lambda: NORMAL.bind(3), TypeError, "params: Expected a Mapping; got int"),
    "a thousand and one blocks": (lambda: probdiff.MLP(2, key=KEY, num_blocks=1001), ValueError, "at most 1000; got"),
    "dropout": (lambda: probdiff.MLP(2, key=KEY, dropout=1.5), ValueError, "dropout: Expected 0 <= dropout < 1; got"),
    "harmonics": (lambda: probdiff.MLP(2, key=KEY, num_harmonics=-1), ValueError, "num_harmonics: Expected an integer"),
    "too many levels": (lambda: probdiff.DiscretizedNormalLikelihood(10**12), ValueError, "levels: Expected at most"),
    "half a dimension": (
        lambda: probdiff.Diffusion(SCHEDULE, lambda z, n: z, dim=2.5),
        ValueError,
        "dim: Expected a positive integer; got 2.5",
    ),
    "an ensemble of none": (lambda: probdiff.networks.Ensemble([]), ValueError, "networks: Expected a list of callables"),
    "networks on two dimensions": (
        lambda: probdiff.networks.Ensemble([NETWORK, probdiff.MLP(3, key=KEY)]),
        ValueError,
        r"networks: Expected networks of one dimension; got dimensions \[2, 3\]",
    ),
    "a head on data": (
        lambda: probdiff.networks.DensityHead(X),
        TypeError,
        r"network: Expected a callable network\(z, n\); got ndarray",
    ),
    "parallel programs of a network": (
        lambda: probdiff.programs.ParallelPrograms(NETWORK),
        TypeError,
        "diffusion: Expected a Diffusion; got MLP",
    ),
    "a forward chain of no schedule": (
        lambda: probdiff.programs.ForwardChain(NORMAL, X),
        TypeError,
        "schedule: Expected a NoiseSchedule; got Diffusion",
    ),
    "a forward chain of one datum": (
        lambda: probdiff.programs.PosteriorChain(SCHEDULE, X[0]),
        ValueError,
        r"x0: Expected shape \(datum, dim\); got \(2,\)",
    ),
    "a reverse chain of a network": (
        lambda: probdiff.programs.ReverseChain(NETWORK, X.shape),
        TypeError,
        "diffusion: Expected a Diffusion; got MLP",
    ),
    "a reverse chain of one datum": (
        lambda: probdiff.programs.ReverseChain(NORMAL, (2,)),
        ValueError,
        r"shape: Expected \(datum, dim\); got \(2,\)",
    ),
    "weights of other data": (
        lambda: probdiff.fit(NORMAL, X, weights=np.ones(5)),
        ValueError,
        r"weights: Expected shape \(6,\), one for each datum; got shape \(5,\)",
    ),
    "a negative weight": (
        lambda: probdiff.fit(NORMAL, X, weights=np.arange(6) - 1),
        ValueError,
        "weights: Expected numbers of at least 0, one of them positive; got from -1 to 4",
    ),
    "no weight": (lambda: probdiff.fit(NORMAL, X, weights=[0] * 6), ValueError, "one of them positive; got from 0 to 0"),
    "a weight that is nan": (lambda: probdiff.fit(NORMAL, X, weights=NAN[:, 1]), ValueError, r"weights: Expected finite values; got nan at index \[2\]"),
    "words for weights": (lambda: probdiff.fit(NORMAL, X, weights=list("abcdef")), TypeError, "weights: Expected numbers; got dtype <U1"),
    "labels for a network that takes none": (
        lambda: probdiff.networks.Embedding(NETWORK, 4, key=KEY),
        ValueError,
        "network: Expected one with a context_dim, whose context is a vector; got MLP without",
    ),
    "no label": (lambda: probdiff.networks.Embedding(OF_VECTOR, 0, key=KEY), ValueError, "num_labels: Expected a positive integer; got 0"),
    "labels for data": (lambda: probdiff.networks.Embedding(X, 4, key=KEY), TypeError, "network: Expected a callable"),
    "labels that are dropped": (lambda: probdiff.networks.ContextDropout(LABELLED), ValueError, "one with a context_dim.*got Embedding without"),
    "a context that is always dropped": (
        lambda: probdiff.networks.ContextDropout(OF_VECTOR, probability=1.0),
        ValueError,
        "probability: Expected 0 <= probability < 1; got 1.0",
    ),
    "no context to leave out": (
        lambda: probdiff.networks.unconditional(OF_VECTOR),
        ValueError,
        "network: Expected one with a ContextDropout in it; got MLP",
    ),
    "guidance by a network": (lambda: probdiff.samplers.guided(DROPPED, 1.0), TypeError, "diffusion: Expected a Diffusion; got ContextDropout"),
    "guidance without a dropout": (
        lambda: probdiff.samplers.guided(GIVEN, 1.0),
        ValueError,
        "network: Expected one with a ContextDropout in it; got MLP",
    ),
    "guidance of probabilities": (
        lambda: probdiff.samplers.guided(MIXTURE, 1.0),
        ValueError,
        "diffusion: Expected a reverse kernel that asks for the noise; got a MixtureKernel",
    ),
    "guidance by NaN": (
        lambda: probdiff.samplers.guided(OF_LABELS, np.nan),
        ValueError,
        "weight: Expected a finite number; got nan",
    ),
    "labels of a network": (lambda: probdiff.classify(LABELLED, X, range(4), key=KEY), TypeError, "diffusion: Expected a Diffusion; got Embedding"),
    "one label": (lambda: probdiff.classify(OF_LABELS, X, [0], key=KEY), ValueError, "labels: Expected at least two; got 1"),
    "no labels": (lambda: probdiff.classify(OF_LABELS, X, None, key=KEY), ValueError, "labels: Expected contexts, one for each label; got None"),
    "a label twice": (
        lambda: probdiff.classify(OF_LABELS, X, [0, 1, 2, 1], key=KEY),
        ValueError,
        r"labels: Expected different labels; got two that are the same, at \[\[1, 3\]\]",
    ),
    "a label that there is not": (
        lambda: probdiff.classify(OF_LABELS, X, range(5), key=KEY),
        ValueError,
        r"labels: Expected labels 0 … 3, integers of shape \(datum,\); got \[4\] at index \[4\]",
    ),
    "labels of other data": (lambda: probdiff.classify(OF_LABELS, X[:, :1], range(4), key=KEY), ValueError, r"x: Expected shape \(datum, 2\)"),
    "labels without a context": (lambda: probdiff.classify(NORMAL, X, range(4), key=KEY), ValueError, "labels: Expected None, for a network that takes"),
    "labels of NaN": (lambda: probdiff.classify(OF_LABELS, NAN, range(4), key=KEY), ValueError, r"x: Expected finite values; got nan at index \[2, 1\]"),
    "a prior of other labels": (
        lambda: probdiff.classify(OF_LABELS, X, range(4), prior=[1, 1, 1], key=KEY),
        ValueError,
        r"prior: Expected shape \(4,\), one for each label; got shape \(3,\)",
    ),
    "a prior by label": (lambda: probdiff.classify(OF_LABELS, X, range(4), prior={0: 1.0}, key=KEY), TypeError, "prior: Expected numbers.*; got dict"),
    "a prior of 0": (lambda: probdiff.classify(OF_LABELS, X, range(4), prior=[1, 1, 1, 0], key=KEY), ValueError, "prior: Expected positive numbers; leave out"),
    "too few evaluations": (
        lambda: probdiff.classify(OF_LABELS, X, range(4), key=KEY, num_evaluations=31),
        ValueError,
        "num_evaluations: Expected at least 8 for each label, 32; got 31",
    ),
    "an error level of 2": (lambda: probdiff.classify(OF_LABELS, X, range(4), key=KEY, error_level=2), ValueError, "error_level: Expected 0 <= error_level <= 1"),
    "a second context of another width": (
        lambda: probdiff.diagnostics.compare_contexts(GIVEN, X, np.ones((6, 3)), np.ones((6, 2)), key=KEY),
        ValueError,
        r"second: Expected an array of shape \(datum, 3\).*got shape \(6, 2\)",
    ),
    "a second context too long": (
        lambda: probdiff.diagnostics.compare_contexts(GIVEN, X, np.ones((6, 3)), np.ones((7, 3)), key=KEY),
        ValueError,
        "second: Expected as many rows as there are data, 6; got 7 rows",
    ),
    "no first context": (
        lambda: probdiff.diagnostics.compare_contexts(GIVEN, X, None, np.ones((6, 3)), key=KEY),
        ValueError,
        "first: Expected a context; got None",
    ),
    "one draw of a difference": (
        lambda: probdiff.diagnostics.compare_contexts(GIVEN, X, np.ones((6, 3)), np.zeros((6, 3)), key=KEY, num_draws=1),
        ValueError,
        "num_draws: Expected at least two; got 1",
    ),
    "no network to map": (lambda: probdiff.networks.batched(3), TypeError, r"network: Expected a callable network\(z, n\); got int"),
    "hidden": (
        lambda: probdiff.MLP(2, key=jax.random.key(0), hidden=0),
        ValueError,
        "hidden: Expected a positive integer",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case):
    call, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        call()


TAKES_KEY = {
    "MLP": lambda key: probdiff.MLP(2, key=key),
    "ConvNet": lambda key: probdiff.networks.ConvNet((2, 2), key=key),
    "UNet": lambda key: probdiff.networks.UNet((4, 4), key=key),
    "Embedding": lambda key: probdiff.networks.Embedding(OF_VECTOR, 4, key=key),
    "fit": lambda key: probdiff.fit(NORMAL, X, key=key, progress=False),
    "elbo_terms": lambda key: probdiff.elbo_terms(NORMAL, X, key=key),
    "path_elbo": lambda key: probdiff.elbo.path_elbo(NORMAL, X, key=key, num_draws=2),
    "data_set_elbo": lambda key: probdiff.elbo.data_set_elbo(NORMAL, X, key=key),
    "optimal_variance": lambda key: probdiff.elbo.optimal_variance(OPTIMAL, X, key=key),
    "per_datum": lambda key: probdiff.AnalyticELBO(NORMAL).per_datum(key, X),
    "iwae": lambda key: probdiff.iwae(NORMAL, X, key=key, num_particles=2),
    "sandwich": lambda key: probdiff.sandwich(NORMAL, key=key, num_data=2),
    "flow_likelihood": lambda key: probdiff.flow_likelihood(NORMAL, X, key=key),
    "compare_models": lambda key: probdiff.compare_models({"a": NORMAL, "b": NORMAL}, X, key=key),
    "compare_estimators": lambda key: probdiff.compare_estimators(NORMAL, X, key=key),
    "classify": lambda key: probdiff.classify(OF_LABELS, X, range(4), key=key),
    "compare_contexts": lambda key: probdiff.diagnostics.compare_contexts(GIVEN, X, np.ones((6, 3)), np.zeros((6, 3)), key=key),
    "compute_both_ways": lambda key: probdiff.diagnostics.compute_both_ways(NORMAL, X, key=key, num_draws=2),
    "compare_on_common_paths": lambda key: probdiff.diagnostics.compare_on_common_paths(NORMAL, X, key=key),
    "audit": lambda key: probdiff.audit(NORMAL, X, key=key),
    "gap_decomposition": lambda key: probdiff.diagnostics.gap_decomposition(NORMAL, LINEAR, X, key=key),
    **{name: lambda key, draw=draw: draw(NORMAL, key=key, num_samples=2) for name, draw in probdiff.samplers.SAMPLERS.items()},
}


@pytest.mark.parametrize("name", TAKES_KEY)
def test_a_seed_in_the_place_of_a_key_is_refused_with_the_remedy(name, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("something was compiled"))
    with pytest.raises(TypeError, match=r"key: Expected a JAX key, such as jax.random.key\(0\); got 0"):
        TAKES_KEY[name](0)


SCORES = {"vp_conditional_score", "vp_from_ve", "ve_from_vp", "vp_score_from_eps", "eps_from_score", "eps_from_vp_score"}
RESULTS = {"ELBOTerms", "ELBOMoments", "Moments", "Estimate", "Sandwich", "TwoWays", "bits_per_dim", "EstimatorComparison"}
RESULTS |= {"Classification", "ContextDifference", "EvidenceBounds", "ObservedLogProb", "Posterior", "Dataset", "ModelComparison", "GapDecomposition", "DataSetELBO"}
RESULTS |= {"Audit", "CommonPaths", "Finding", "Fit", "FitState", "EMAState", "Run", "Checkpoint", "ScheduleTables"}
# What takes a result, or encoded data; what an optimiser is made of.
INNER = {"NoTwist", "PointTwist", "DiagonalTwist", "TweedieTwist", "Categories", "Columns", "DiscretizedNormal", "prior_kl", "from_datatree", "inspect_terms", "orthogonalised_convolutions", "parameter_ema", "has_fast_bfloat16"}
# What a user makes a part of, in tests/test_own_parts.py.
ABSTRACT = {"AbstractHead", "AbstractKernel", "AbstractLikelihood", "AbstractNetwork", "AbstractReverseVariance", "AbstractSchedule"}
ABSTRACT |= {"AbstractObservation", "AbstractTwist", "CheckpointLike", "AbstractControl", "AbstractNoise", "AbstractSteps", "AbstractTerm"}


def test_every_public_function_has_joined_the_table():
    """All but results, and those that check their arguments by the same lines as one that has."""
    places = [probdiff, *(getattr(probdiff, name) for name in probdiff.__all__ if hasattr(getattr(probdiff, name), "__path__"))]
    public = {name for place in places for name in getattr(place, "__all__", ()) if callable(getattr(place, name))}
    public |= {name for name, value in vars(probdiff.chain.score).items() if inspect.isfunction(value) and name[0] != "_"}
    public |= set(map(str, (f.__name__ for f in probdiff.samplers.SAMPLERS.values())))
    public -= set(probdiff.oracles.__all__)  # Theirs are in the tests of the oracles.
    there = {name for names in re.findall(r"probdiff((?:\.\w+)+)", Path(__file__).read_text()) for name in names.split(".")}
    imported = {"at_step", "isotropic_normal", "require", "require_schedule", "require_step"}
    assert public - there - imported == SCORES | RESULTS | INNER | ABSTRACT


@pytest.mark.release
def test_jax_arrays_and_other_dtypes_that_fit_are_taken():
    for x in (jnp.asarray(X), X.astype(np.float64), X.astype(np.float16)):
        assert np.all(np.isfinite(probdiff.elbo_terms(NORMAL, x, key=jax.random.key(0)).elbo))
    for dtype in (np.uint8, np.int16, np.int64):
        levels = np.array([[0, 4], [2, 3]], dtype)
        assert np.all(np.isfinite(probdiff.elbo_terms(GRID, levels, key=jax.random.key(0)).elbo))
