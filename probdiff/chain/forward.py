r"""The forward chain in closed form, as NumPyro distributions.

Everything here follows from :math:`q(z_n | z_{n-1}) = N(\sqrt{\alpha_n} z_{n-1}, \beta_n I)` and
:math:`z_0 = x_0`. Source: Ho et al. (2020), arXiv:2006.11239, eqs. 2, 4, 6 and 7. Steps are 1-based integers and
may be arrays that broadcast against the batch; distributions have ``event_shape == (dim,)``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist

from probdiff._checks import AnyArray, Step, require_step
from probdiff.chain.schedules import AbstractSchedule, Table, array_module, at_step, require_schedule


def isotropic_normal(loc: Float[Array, "*batch dim"], variance: Float[Array, "*#batch"]) -> dist.Independent:
    """N(loc, variance · I): ``loc`` of shape ``(*batch, dim)``, ``variance`` a scalar or of shape ``batch``."""
    return dist.Normal(loc, jnp.sqrt(jnp.asarray(variance))[..., None]).to_event(1)


def _table(table: Table, n: Step, like: Float[Array, "*batch dim"]) -> Float[Array, "*#batch"]:
    return at_step(table, n, like.dtype)


def forward_step(schedule: AbstractSchedule, z_prev: Float[AnyArray, "*batch dim"], n: Step) -> dist.Independent:
    r"""Distribution of one step of the chain, :math:`q(z_n | z_{n-1})`; with n = 1, ``z_prev`` is :math:`x_0`.

    Args:
        schedule: The noise schedule.
        z_prev: :math:`z_{n-1}`, shape ``(*batch, dim)``.
        n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.

    Raises:
        ValueError: If n is outside [1, N]; TypeError if it is not an integer.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.NoiseSchedule.from_betas([0.1, 0.2, 0.3])
        >>> q = probdiff.forward_step(schedule, jnp.zeros((4, 2)), n=3)
        >>> q.event_shape, round(q.variance[0, 0].item(), 3)
        ((2,), 0.3)
    """
    require_schedule(schedule)
    require_step(n, 1, schedule.num_steps)
    z_prev = jnp.asarray(z_prev)
    alpha = _table(schedule.alpha, n, z_prev)
    return isotropic_normal(jnp.sqrt(alpha)[..., None] * z_prev, _table(schedule.beta, n, z_prev))


def forward_marginal(schedule: AbstractSchedule, x0: Float[AnyArray, "*batch dim"], n: Step) -> dist.Independent:
    r"""The marginal distribution after n steps, :math:`q(z_n | x_0) = N(\sqrt{\bar\alpha_n} x_0, (1-\bar\alpha_n) I)`.

    Args:
        schedule: The noise schedule.
        x0: Encoded data, shape ``(*batch, dim)``.
        n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.

    Raises:
        ValueError: If n is outside [1, N]; TypeError if it is not an integer.

    Example:
        >>> import jax, jax.numpy as jnp, probdiff
        >>> schedule = probdiff.cosine_schedule(10)
        >>> q = probdiff.forward_marginal(schedule, jnp.ones((4, 2)), n=jnp.array([1, 4, 7, 10]))  # a step for each datum
        >>> q.sample(jax.random.key(0)).shape
        (4, 2)
    """
    require_schedule(schedule)
    require_step(n, 1, schedule.num_steps)
    x0 = jnp.asarray(x0)
    alpha_bar = _table(schedule.alpha_bar, n, x0)
    return isotropic_normal(jnp.sqrt(alpha_bar)[..., None] * x0, _table(schedule.one_minus_alpha_bar, n, x0))


def forward_posterior(
    schedule: AbstractSchedule, z: Float[AnyArray, "*batch dim"], x0: Float[AnyArray, "*#batch dim"], n: Step
) -> dist.Independent:
    r"""Bayes' rule on the chain, :math:`q(z_{n-1} | z_n, x_0)`, variance :math:`\tilde\beta_n`.

    Args:
        schedule: The noise schedule.
        z: :math:`z_n`, shape ``(*batch, dim)``.
        x0: Encoded data, of the same shape or one that broadcasts to it.
        n: Step, 2 ≤ n ≤ N (:math:`z_0` is :math:`x_0` itself), an integer or an integer array that broadcasts to ``batch``.

    Raises:
        ValueError: If n is outside [2, N]; TypeError if it is not an integer.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> schedule = probdiff.NoiseSchedule.from_betas([0.1, 0.2, 0.3])
        >>> q = probdiff.forward_posterior(schedule, jnp.zeros(2), jnp.zeros(2), n=2)
        >>> round(q.variance[0].item(), 3)  # β̃_2 = 0.1 · 0.2 / 0.28
        0.071
    """
    require_schedule(schedule)
    require_step(n, 2, schedule.num_steps)
    z, x0 = jnp.asarray(z), jnp.asarray(x0)
    beta = _table(schedule.beta, n, z)
    variance = _table(schedule.posterior_variance, n, z)
    variance_z = _table(schedule.one_minus_alpha_bar, n, z)
    alpha = _table(schedule.alpha, n, z)
    alpha_bar_prev = _table(schedule.alpha_bar / schedule.alpha, n, z)
    from_x0 = jnp.sqrt(alpha_bar_prev) * beta / variance_z
    from_z = jnp.sqrt(alpha) * variance / beta
    return isotropic_normal(from_x0[..., None] * x0 + from_z[..., None] * z, variance)


def prior_kl(schedule: AbstractSchedule, x0: Float[AnyArray, "*batch dim"]) -> Float[Array, "*batch"]:
    r"""The prior KL, :math:`KL[q(z_N | x_0) \| N(0, I)]`, in nats, shape ``batch`` for ``x0`` of shape ``(*batch, dim)``.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> kl = probdiff.chain.prior_kl(probdiff.cosine_schedule(10), jnp.ones((3, 2)))
        >>> kl.shape, bool((kl < 0.01).all())  # hardly anything of the data is left at the last step
        ((3,), True)
    """
    alpha_bar = schedule.alpha_bar[-1]
    constant = -alpha_bar - 2 * array_module(schedule.noise_scale).log(schedule.noise_scale[-1:])[0]
    return (jnp.asarray(alpha_bar, x0.dtype) * jnp.square(x0).sum(-1) + x0.shape[-1] * constant) / 2
