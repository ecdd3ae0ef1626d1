"""How the noise of the terms of the bound is drawn: row by row, in pairs, or along one path of the forward chain."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp


class RowNoise(eqx.Module):
    """Noise of its own for every row; with ``copies`` = 2, each second row has the noise of the one before, negated."""

    key: jax.Array
    like: jax.Array
    copies: int = eqx.field(static=True)

    def __call__(self, rows):
        """Noise of some rows, shape ``(row, datum, dim)``."""

        def one(row):
            eps = jax.random.normal(jax.random.fold_in(self.key, row // self.copies), self.like.shape, self.like.dtype)
            return eps * (1 - 2 * (row % self.copies)).astype(eps.dtype)

        return jax.vmap(one)(rows)


class PathNoise(eqx.Module):
    """The noise in z_1 … z_N of one path of the forward chain: row r is step r + 1."""

    eps: jax.Array

    def __call__(self, rows):
        """Noise of some rows, shape ``(row, datum, dim)``."""
        return self.eps[rows]


def _row_noise(key, diffusion, x0, copies):
    return RowNoise(key, x0, copies)


def _path_noise(key, diffusion, x0):
    """z_n = √α_n z_{n−1} + √β_n ξ_n, as a recursion of the noise: z_n = √ᾱ_n x_0 + √(1−ᾱ_n) ε_n."""
    schedule = diffusion.schedule
    # (Whatever the schedule, the noise of each step is standard normal: it has no gradient in expectation.)
    tables = schedule.alpha * schedule.posterior_variance / schedule.beta, schedule.beta / schedule.one_minus_alpha_bar
    kept, added = (jax.lax.stop_gradient(jnp.asarray(table**0.5, x0.dtype)) for table in tables)

    def step(eps, each):
        kept, added, key = each
        eps = kept * eps + added * jax.random.normal(key, eps.shape, eps.dtype)
        return eps, eps

    keys = jax.random.split(key, schedule.num_steps)
    return PathNoise(jax.lax.scan(step, jnp.zeros_like(x0), (kept, added, keys))[1])


# How the noise of the rows is drawn, and how many rows share a step.
NOISE = {
    "independent": (functools.partial(_row_noise, copies=1), 1),
    "antithetic": (functools.partial(_row_noise, copies=2), 2),
    "path": (_path_noise, 1),
}
