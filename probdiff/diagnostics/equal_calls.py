"""Whether a network is a function of each datum: the same call twice, and the same datum alone and beside others.

The network is called as Python code, not compiled: two calls that are compiled together may be made one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from probdiff._checks import AnyArray
from probdiff.chain.schedules import at_step, per_step
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimate import Estimate

ROWS, STEPS = 8, 4
ROUNDING = 1e-3  # relative; accelerators round products to fewer bits


class CallDifference(NamedTuple):
    """Two predictions of the noise that should be equal.

    Attributes:
        relative: Root mean square of the difference, relative to that of the prediction.
        nats: Cost of the difference δ in the bound, :class:`Estimate`: Σ_n w_n ‖δ‖²/2, estimated from one step in each of a few ranges. For two
            draws of a random prediction this is the cost of its variance.
    """

    relative: float
    nats: Estimate

    @property
    def is_there(self) -> bool:
        """Whether the difference is more than rounding."""
        return self.relative > ROUNDING


def compare_equal_calls(diffusion: Diffusion, x0: Float[AnyArray, "datum dim"], *, key: PRNGKeyArray) -> dict[str, CallDifference]:
    """Predictions of the network that should be equal, on a few data and steps.

    Args:
        diffusion: The model prepared for evaluation, given its context.
        x0: Encoded data, shape ``(datum, dim)``.
        key: JAX key.

    Returns:
        A dict of a :class:`CallDifference` for ``"twice"``, the same call a second time, and ``"alone"``, each datum in a batch of copies of
        itself.
    """
    rows = np.arange(min(ROWS, len(x0)))
    x0, diffusion = jnp.asarray(x0)[rows], diffusion.take(rows)
    ranges = np.array_split(np.arange(diffusion.schedule.num_steps), min(STEPS, diffusion.schedule.num_steps))
    weight = per_step(np.asarray(diffusion.kernel.kl_weight(diffusion.schedule), np.float64))
    found = [[*_predictions(diffusion, x0, int(each[len(each) // 2]) + 1, key)] for each in ranges]
    size = np.sqrt(np.mean([np.square(first) for first, *_ in found]))
    differences = {}
    for i, name in enumerate(("twice", "alone"), 1):
        squared = np.stack([np.square(each[i] - each[0]).sum(-1) for each in found])
        nats = sum(weight[each].sum() * own / 2 for each, own in zip(ranges, squared))
        relative = np.sqrt(squared.mean() / x0.shape[1]) / size if squared.any() else 0.0
        differences[name] = CallDifference(float(relative), Estimate.of(nats))
    return differences


def _predictions(diffusion: Diffusion, x0: Float[Array, "datum dim"], n: int, key: PRNGKeyArray) -> Iterator[Float[np.ndarray, "datum dim"]]:
    """The prediction at step ``n``, the same prediction again, and the prediction for each datum in a batch of copies of itself."""
    eps = jax.random.normal(jax.random.fold_in(key, n), x0.shape, x0.dtype)
    signal, noise = (at_step(table, n, x0.dtype) for table in (diffusion.schedule.signal_scale, diffusion.schedule.noise_scale))
    z = signal * x0 + noise * eps
    for _ in range(2):
        yield np.asarray(diffusion.predict_noise(z, n), np.float64)
    copies = [np.full(len(z), i) for i in range(len(z))]
    yield np.stack([np.asarray(diffusion.take(rows).predict_noise(z[rows], n)[0], np.float64) for rows in copies])
