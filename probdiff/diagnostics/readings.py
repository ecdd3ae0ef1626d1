r"""The readings of a network: the conventions under which it may have been trained, and the bound under each of them.

The conventions of a network that was trained elsewhere may be unknown. It may count the steps from 0 or from the noisy end, predict v, x_0 or a
score instead of the noise, or have been trained on data of another scale. Each such convention is a *reading* of the network: the arguments of
its call, and the meaning of its output. All readings are evaluated on the same data and the same noise, so that the gain of one of them over the
model's own reading is a paired difference. The bound is :math:`L(x) = \text{noise\_free\_bound}(x) - \sum_n \text{excess}_n`
(:mod:`probdiff.elbo.analytic`); all but the excesses is known exactly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real
from numpyro import distributions as dist
from tqdm import tqdm

from probdiff._checks import AnyArray, Whole
from probdiff._chunks import over_steps
from probdiff._context import of_batch
from probdiff.chain.reverse import GaussianKernel, NoiseMoments, SampledStep
from probdiff.chain.schedules import at_step, per_step
from probdiff.diffusion import Diffusion
from probdiff.elbo.analytic import BoundTerm
from probdiff.likelihoods import AbstractLikelihood
from probdiff.likelihoods.base import Scale
from probdiff.networks.base import Prediction, predict_noise
from probdiff.networks.heads import AbstractHead, VHead, X0Head

OWN = "own"
EARLY, LATE, REVERSED = "n − 1", "n + 1", "N + 1 − n"
BEYOND = {EARLY: "n − 2", LATE: "n + 2"}  # shifted by one more step
RANGE, RANGE_BY_DIM = "another range of the data", "another range of each dimension"
OTHERS_CONTEXT = "another's context"
SCALED = "a multiple"
NORMALS, STANDARD_NORMALS = "independent normals", "independent standard normals"
SLOPES = 5  # ranges of steps
# The step with which the network is called instead of n; at the ends of the chain, the nearest step.
ASKED: dict[str, Callable[[Any, int], Any]] = {
    OWN: lambda n, num_steps: n,
    EARLY: lambda n, num_steps: n - 1,
    LATE: lambda n, num_steps: n + 1,
    BEYOND[EARLY]: lambda n, num_steps: n - 2,
    BEYOND[LATE]: lambda n, num_steps: n + 2,
    REVERSED: lambda n, num_steps: num_steps + 1 - n,
}
NOISE = "the noise"
# The noise ε̂ in z = signal · x_0 + noise · ε that follows from an output, if the output is …
ANSWERS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    NOISE: lambda answer, z, signal, noise: answer,
    "minus the noise": lambda answer, z, signal, noise: -answer,
    "v": lambda answer, z, signal, noise: signal * answer + noise * z,
    "minus v": lambda answer, z, signal, noise: noise * z - signal * answer,
    "x_0": lambda answer, z, signal, noise: (z - signal * answer) / noise,
    "the score of z_n": lambda answer, z, signal, noise: -noise * answer,
    "the score of z_n/√ᾱ_n": lambda answer, z, signal, noise: -noise / signal * answer,
}
READ_BY_HEAD: dict[type, str] = {X0Head: "x_0", VHead: "v"}


class Recoded(AbstractLikelihood):
    r"""The likelihood for a chain of :math:`a \cdot x_0 + b`, given the likelihood for a chain of :math:`x_0`; for the same data.

    Attributes:
        likelihood: The given likelihood.
        scale, shift: a, positive, and b, each of shape ``(dim,)``.
    """

    likelihood: AbstractLikelihood
    scale: Float[AnyArray, "dim"]
    shift: Float[AnyArray, "dim"]

    @property
    def levels(self) -> int | None:
        """The levels of the given likelihood."""
        return self.likelihood.levels

    def check_data(self, x: Real[AnyArray, "*batch dim"]) -> None:
        """Refuse the data that the given likelihood refuses."""
        self.likelihood.check_data(x)

    def encode(self, x: Real[AnyArray, "*batch dim"]) -> Float[Array, "*batch dim"]:
        r""":math:`a \cdot x_0 + b`, with :math:`x_0` the data as encoded by the given likelihood."""
        return jnp.asarray(self.scale) * self.likelihood.encode(x) + jnp.asarray(self.shift)

    def decode(self, x0: Float[Array, "*batch dim"]) -> Real[Array, "*batch dim"]:
        """The inverse of :meth:`encode`."""
        return self.likelihood.decode(self._before(x0))

    def log_jacobian(self, dim: int) -> float:
        r"""The log of :math:`|dx_0/dx|`, summed over the dimensions, in nats."""
        return self.likelihood.log_jacobian(dim) + float(np.log(np.broadcast_to(self.scale, dim)).sum())

    def __call__(self, loc: Float[Array, "*batch dim"], scale: Scale) -> dist.Distribution:
        """The distribution of the given likelihood, for the normal in its units."""
        return self.likelihood(self._before(loc), scale / jnp.asarray(self.scale))

    def _before(self, x0: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return (x0 - jnp.asarray(self.shift)) / jnp.asarray(self.scale)


class Reading(NamedTuple):
    """The arguments with which a network is called, and the meaning given to its output.

    Attributes:
        asked: A key of :data:`ASKED`, or :data:`RANGE`, :data:`RANGE_BY_DIM` or :data:`OTHERS_CONTEXT`.
        answer: A key of :data:`ANSWERS`, or :data:`OWN` for the meaning in the model, or :data:`SCALED` for a multiple of it; or
            :data:`NORMALS` or :data:`STANDARD_NORMALS`, for the best prediction if the dimensions were independent normals, without the network.
    """

    asked: str
    answer: str


class Excesses(NamedTuple):
    r"""The excess of every step under a reading, over a network that knew the noise; means over draws of the noise.

    Attributes:
        nats: Shape ``(num_steps, datum)``.
        squared_error: :math:`\|\epsilon - \hat\epsilon\|^2`, shape ``(num_steps, datum)``.
    """

    nats: Float[AnyArray, "num_steps datum"]
    squared_error: Float[AnyArray, "num_steps datum"]


def ask(diffusion: Diffusion, z: Float[Array, "*batch dim"], n: Int[Array, "*batch"]) -> Prediction:
    """Output of the network itself at step ``n``, before a head converts it to noise."""
    network = eqx.nn.inference_mode(diffusion.network)
    asked = z, at_step(diffusion.schedule.log_snr, n, z.dtype), n, None, of_batch(diffusion.context, z.shape[:-1])
    return network.output(*asked) if isinstance(network, AbstractHead) else predict_noise(network, *asked)


def read(diffusion: Diffusion, reading: str, answer: Prediction, z: Float[Array, "*batch dim"], n: Int[Array, "*batch"]) -> Float[Array, "*batch dim"]:
    """The noise in ``z`` after ``n`` steps that follows from an output under the meaning ``reading``."""
    if reading == OWN:
        network = diffusion.network
        log_snr = at_step(diffusion.schedule.log_snr, n, z.dtype)
        return network.noise(answer, z, log_snr) if isinstance(network, AbstractHead) else answer
    signal, noise = (at_step(table, n, z.dtype)[..., None] for table in (diffusion.schedule.signal_scale, diffusion.schedule.noise_scale))
    return ANSWERS[reading](answer, z, signal, noise)


def other_answers(diffusion: Diffusion, shape: tuple[int, ...]) -> list[str]:
    """Names of the other possible meanings of the outputs; none if the outputs do not have the shape of the data, ``shape``."""
    network = diffusion.network
    if isinstance(network, AbstractHead) and network.output_shape(jnp.zeros(shape)) != shape:
        return []
    own = READ_BY_HEAD.get(type(network), "" if isinstance(network, AbstractHead) else NOISE)
    return [name for name in ANSWERS if name != own]


@eqx.filter_jit
def _excesses(
    models: dict[str, Diffusion], x: Real[AnyArray, "datum dim"], key: PRNGKeyArray, multiple: Float[AnyArray, ""]
) -> dict[Reading, Excesses]:
    """The :class:`Excesses` of every reading in one draw of the noise, the same for all.

    Args:
        models: For each way of calling the network, the model in which it is called.
        x: Data, shape ``(datum, dim)``.
        key: JAX key of the noise.
        multiple: The factor of :data:`SCALED`.
    """
    own = models[OWN]
    shape, num_steps = own.likelihood.encode(x).shape, own.schedule.num_steps
    others = other_answers(own, shape)

    def one(n: Int[Array, ""]) -> dict[Reading, Excesses]:
        found: dict[Reading, Excesses] = {}
        for asked, model in models.items():
            x0 = model.likelihood.encode(x)
            eps = jax.random.normal(jax.random.fold_in(key, n), shape, x0.dtype)
            steps = jnp.full(shape[:-1], n)
            signal, noise = (at_step(table, n, x0.dtype) for table in (model.schedule.signal_scale, model.schedule.noise_scale))
            z = signal * x0 + noise * eps
            answer = ask(model, z, jnp.clip(ASKED.get(asked, ASKED[OWN])(steps, num_steps), 1, num_steps))
            eps_hat: dict[str, Any] = {name: read(model, name, answer, z, steps) for name in [OWN, *(others if asked in ASKED else ())]}
            if asked == OWN:
                eps_hat[SCALED] = multiple.astype(x0.dtype) * eps_hat[OWN]
                eps_hat[NORMALS] = noise * (z - signal * x0.mean(0)) / (signal**2 * x0.var(0) + noise**2)
                eps_hat[STANDARD_NORMALS] = noise * z
            every = jnp.stack([*eps_hat.values()])
            n_of_every, z, eps = (jnp.broadcast_to(each, (len(every), *each.shape)) for each in (steps, z, eps))
            nats = BoundTerm()(model, SampledStep(x, x0, n_of_every, z, NoiseMoments(eps, 0.0), every, None))
            squared_error = jnp.square(eps - every).sum(-1)
            found |= {Reading(asked, name): Excesses(nats[i], squared_error[i]) for i, name in enumerate(eps_hat)}
        return found

    return over_steps(one, num_steps, own.network, len(models) * len(x))


@eqx.filter_jit
def _products(diffusion: Diffusion, x: Real[AnyArray, "datum dim"], key: PRNGKeyArray) -> Float[Array, "num_steps 2 datum"]:
    r""":math:`\langle\epsilon, \hat\epsilon\rangle` and :math:`\langle\hat\epsilon, \hat\epsilon\rangle` in one draw of the noise."""
    x0 = diffusion.likelihood.encode(x)

    def one(n: Int[Array, ""]) -> Array:
        eps = jax.random.normal(jax.random.fold_in(key, n), x0.shape, x0.dtype)
        eps_hat = diffusion.sampled_step(x, x0, jnp.full(eps.shape[:-1], n), eps).prediction
        return jnp.stack([(eps * eps_hat).sum(-1), jnp.square(eps_hat).sum(-1)])

    return over_steps(one, diffusion.schedule.num_steps, diffusion.network, len(x))


class Slopes(NamedTuple):
    r"""The factor of :math:`\hat\epsilon` that best predicts :math:`\epsilon`, by least squares with the weights of the bound, in ranges of the steps.

    Attributes:
        steps: The first and the last step of each range.
        slope, error: The factor and its standard error over data; it is 1 for a network that is calibrated on average.
    """

    steps: list[tuple[int, int]]
    slope: Float[np.ndarray, "range"]
    error: Float[np.ndarray, "range"]

    @property
    def median(self) -> float:
        """The median factor over the ranges, which ranges with nothing to predict do not affect."""
        return float(np.median(self.slope)) if np.isfinite(self.slope).all() else 1.0


def fit_slopes(diffusion: Diffusion, x: Real[AnyArray, "datum dim"], key: PRNGKeyArray, num_draws: int) -> Slopes:
    """The :class:`Slopes` of a model on data of shape ``(datum, dim)``."""
    draws = [np.asarray(_products(diffusion, x, jax.random.fold_in(key, i)), np.float64) for i in range(num_draws)]
    weight = per_step(np.asarray(diffusion.kernel.kl_weight(diffusion.schedule), np.float64))
    weighted = weight[:, None, None] * np.mean(draws, 0)
    steps = np.array_split(np.arange(len(weight)), min(SLOPES, len(weight)))
    parts = np.stack([weighted[each].sum(0) for each in steps])
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = parts[:, 0].mean(1) / parts[:, 1].mean(1)
        off = (parts[:, 0] - slope[:, None] * parts[:, 1]) / parts[:, 1].mean(1)[:, None]
    return Slopes([(int(each[0]) + 1, int(each[-1]) + 1) for each in steps], slope, off.std(1, ddof=1) / np.sqrt(off.shape[1]))


@eqx.filter_jit
def _draw_encoded(diffusion: Diffusion, key: PRNGKeyArray, like: Float[AnyArray, "sample dim"]) -> Float[Array, "sample dim"]:
    """Encoded samples of the network, shaped like ``like``, with reverse variances β̃_n in any case; for a conditional model, one for
    each row of its context."""
    diffusion = diffusion.with_kernel(GaussianKernel("posterior"))

    def step(z: Array, n: Int[Array, ""]) -> tuple[Array, None]:
        return diffusion.reverse_kernel(z, n).sample(jax.random.fold_in(key, n)).astype(z.dtype), None

    start = jax.random.normal(jax.random.fold_in(key, 0), like.shape, like.dtype)
    return jax.lax.scan(step, start, jnp.arange(diffusion.schedule.num_steps, 0, -1))[0]


def _recoded(likelihood: AbstractLikelihood, samples: Float[np.ndarray, "sample dim"], x0: Float[np.ndarray, "datum dim"]) -> dict[str, Recoded]:
    """Likelihoods under which the data, encoded as ``x0``, have the mean and the standard deviation of ``samples``: overall, and in each dimension.

    A network's samples have the range of the data that it was trained on. None where the samples are not finite.
    """
    spread, spread0 = (np.sqrt(each.var(0).mean()) for each in (samples, x0))
    if not (np.isfinite(spread) and spread > 0 < spread0):
        return {}
    varies, whole = x0.std(0) > 1e-3 * spread0, np.full(x0.shape[1], spread / spread0)
    of_each = np.where(varies, np.maximum(samples.std(0), 1e-6 * spread) / np.where(varies, x0.std(0), 1), whole)
    shifts = np.full(x0.shape[1], (samples.mean(0) - whole * x0.mean(0)).mean()), samples.mean(0) - of_each * x0.mean(0)
    return {name: Recoded(likelihood, *each) for name, each in zip((RANGE, RANGE_BY_DIM), zip((whole, of_each), shifts))}


class ReadingComparison(NamedTuple):
    """The result of :func:`compare_readings`.

    Attributes:
        gains: For each :class:`Reading`, its gain in the bound of each datum over the model's own reading, nats, shape ``(datum,)``.
        excesses: For each reading, its :class:`Excesses`.
        models: For each way of calling the network, the model in which it is called.
        slopes: The :class:`Slopes` of the model's own reading.
        samples: Encoded samples of the network, shape ``(sample, dim)``.
    """

    gains: dict[Reading, Float[np.ndarray, "datum"]]
    excesses: dict[Reading, Excesses]
    models: dict[str, Diffusion]
    slopes: Slopes
    samples: Float[np.ndarray, "sample dim"]

    @property
    def dim(self) -> int:
        """Number of dimensions of the chain."""
        return self.samples.shape[1]

    def explained(self, reading: Reading) -> Float[np.ndarray, "datum"]:
        """The fraction of the noise that a reading predicts, 1 − Σ_n E‖ε − ε̂‖² / Σ_n E‖ε‖², shape ``(datum,)``: about 0 if it predicts nothing."""
        return 1 - np.asarray(self.excesses[reading].squared_error).mean(0) / self.dim


def compare_readings(
    diffusion: Diffusion, x: Real[AnyArray, "datum dim"], *, key: PRNGKeyArray, num_draws: Whole, progress: bool = False
) -> ReadingComparison:
    """The bound under every reading of the network, on the same data and the same noise: a :class:`ReadingComparison`.

    Args:
        diffusion: The model prepared for evaluation, given its context; its kernel needs a prediction of the noise.
        x: Data, shape ``(datum, dim)``, at least two.
        key: JAX key.
        num_draws: Draws of the noise, for each step and datum.
        progress: Show a progress bar.
    """
    x = jnp.asarray(x)
    x0 = diffusion.likelihood.encode(x)
    slope_key, sample_key, key = jax.random.split(key, 3)
    slopes = fit_slopes(diffusion, x, slope_key, int(num_draws))
    samples = np.asarray(_draw_encoded(diffusion, sample_key, x0), np.float64)
    models = dict.fromkeys(ASKED, diffusion)
    models |= {name: diffusion.with_likelihood(each) for name, each in _recoded(diffusion.likelihood, samples, np.asarray(x0, np.float64)).items()}
    if diffusion.context is not None:
        models[OTHERS_CONTEXT] = diffusion.take(np.roll(np.arange(len(x)), len(x) // 2))
    total: Any = 0.0
    for draw in tqdm(range(num_draws), unit="draw", desc="readings of the network, all steps", disable=not progress):
        found = _excesses(models, x, jax.random.fold_in(key, draw), np.asarray(slopes.median))
        total = jax.tree.map(lambda each, old: old + np.asarray(each, np.float64) / num_draws, found, total if draw else jax.tree.map(lambda _: 0.0, found))
    own = total[Reading(OWN, OWN)].nats
    known = {name: np.asarray(BoundTerm().noise_free_bound(model, x, model.likelihood.encode(x)), np.float64) for name, model in models.items()}
    gains = {reading: (own - each.nats).sum(0) + known[reading.asked] - known[OWN] for reading, each in total.items()}
    return ReadingComparison(gains, total, models, slopes, samples)
