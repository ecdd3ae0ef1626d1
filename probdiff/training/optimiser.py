"""The optimiser of a fit: Adam, with the updates of convolutions orthogonalised, and an average of the parameters.

Source: Polyak and Juditsky (1992), doi:10.1137/0330046, for the average.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probdiff._checks import Number, Whole, require

WARM_UP = 200
WEIGHT_DECAY = 0.2  # weight decay of convolutions, in units of the learning rate


class EMAState(NamedTuple):
    """State of :func:`parameter_ema`: the number of updates and the averaged parameters.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> state = probdiff.training.parameter_ema(0.99).init({"w": jnp.ones(2)})  # an EMAState
        >>> state.updates.item(), state.ema_params["w"].tolist()
        (0, [1.0, 1.0])
    """

    updates: jax.Array
    ema_params: optax.Params


def parameter_ema(decay: float) -> optax.GradientTransformation:
    """Exponential moving average of the *parameters*; put it last in ``optax.chain``. Updates pass unchanged.

    The decay of update t = 1, 2, … is (1 + t) / (10 + t) until that exceeds ``decay``, so that the initial weights are soon forgotten.

    Example:
        >>> import jax.numpy as jnp, optax, probdiff
        >>> optimiser = optax.chain(optax.sgd(1.0), probdiff.training.parameter_ema(0.99))
        >>> params = {"w": jnp.array([1.0])}
        >>> updates, state = optimiser.update({"w": jnp.array([0.5])}, optimiser.init(params), params)
        >>> round(state[-1].ema_params["w"].item(), 3)  # of 1.0 and, at decay 2/11, the new 0.5
        0.591
    """

    def init(params: Any) -> EMAState:
        return EMAState(jnp.zeros((), jnp.int32), params)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, EMAState]:
        count = state.updates + 1
        rate = 1 - jnp.minimum(decay, (1 + count) / (10 + count))
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda old, p: old + (rate * (p - old)).astype(p.dtype), state.ema_params, new)
        return updates, EMAState(count, ema)

    return optax.GradientTransformation(init, update)


def orthogonalised_convolutions() -> optax.GradientTransformation:
    r"""Orthogonalise the update of each convolution, so that its singular values are nearly equal. All other updates pass unchanged. There is no state.

    An array of four axes is a convolution. It is treated as a matrix of shape (m, n): one side is the longer of the first and the last axis (the outputs),
    the other side all other axes. :math:`U = A \Sigma B^T` becomes :math:`0.2 \sqrt{\max(m, n)}\, A B^T`, by five Newton–Schulz iterations, after which
    the singular values are between 0.7 and 1.2 instead of 1. The factor gives the update the size of an update of Adam, so that one learning rate suits both.
    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon, where the momentum is orthogonalised; for the factor, Liu et al.
    (2025), arXiv:2502.16982, section 2.2.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> optimiser = probdiff.training.orthogonalised_convolutions()
        >>> update = {"filter": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)), "bias": jnp.ones(4)}
        >>> new, _ = optimiser.update(update, optimiser.init(update))
        >>> sizes = jnp.linalg.svd(new["filter"].reshape(-1, 4), compute_uv=False)
        >>> bool(sizes[0] < 2 * sizes[-1]), new["bias"].tolist()
        (True, [1.0, 1.0, 1.0, 1.0])
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: _orthogonalised(u) if _is_convolution(u) else u, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _is_convolution(array: jax.Array) -> bool:
    return array.ndim == 4


def _orthogonalised(update: jax.Array) -> jax.Array:
    first, last = update.shape[0], update.shape[-1]
    matrix = update.reshape((first, -1) if first >= last else (-1, last))
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return 0.2 * max(matrix.shape) ** 0.5 * (x.T if tall else x).reshape(update.shape)


class PaceState(NamedTuple):
    """State of :func:`scale_by_pace`: the number of updates, the spent fraction of the budget, and the fraction that each update spends."""

    updates: jax.Array
    spent: jax.Array
    pace: jax.Array


def scale_by_pace(peak: Number) -> optax.GradientTransformation:
    """The learning rate of a fit with an unknown number of updates: after the warm-up, a cosine of the spent fraction of a budget.

    The fraction that each update spends is 0 until it is set, with ``optax.tree_utils.tree_set(state, pace=…)``.
    """

    def init(params: Any) -> PaceState:
        return PaceState(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PaceState]:
        rate = peak * jnp.minimum(1, state.updates / WARM_UP) * (1 + jnp.cos(jnp.pi * state.spent)) / 2
        spent = jnp.minimum(1, state.spent + state.pace)
        return jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates), PaceState(state.updates + 1, spent, state.pace)

    return optax.GradientTransformation(init, update)


def build_optimiser(
    learning_rate: Number | optax.Schedule | optax.GradientTransformation, iterations: Whole | None, ema_decay: Number
) -> optax.GradientTransformation:
    """The optimiser of a fit, and the average of its parameters.

    Args:
        learning_rate: Peak of the learning rate, or a schedule or an optimiser in its place.
        iterations: Number of updates, at the end of which the learning rate is 0; None for a fit with a given time (:func:`scale_by_pace`).
        ema_decay: Decay of the average.
    """
    if isinstance(learning_rate, optax.GradientTransformation):
        return optax.chain(learning_rate, parameter_ema(float(ema_decay)))
    schedule = learning_rate
    if not callable(schedule):
        numeric = isinstance(schedule, Number) and np.isfinite(schedule) and schedule > 0
        require(numeric, "learning_rate", "a positive number, a schedule or an optimiser of optax", repr(schedule))
        if iterations is None:
            scaled = scale_by_pace(schedule)
        else:
            warm_up = min(WARM_UP, iterations // 10)
            scaled = optax.scale_by_learning_rate(optax.warmup_cosine_decay_schedule(0.0, schedule, warm_up, iterations))
    else:
        scaled = optax.scale_by_learning_rate(schedule)
    optimiser = optax.chain(
        optax.scale_by_adam(),
        orthogonalised_convolutions(),
        optax.add_decayed_weights(WEIGHT_DECAY, lambda params: jax.tree.map(_is_convolution, params)),
        scaled,
    )
    return optax.chain(optimiser, parameter_ema(float(ema_decay)))
