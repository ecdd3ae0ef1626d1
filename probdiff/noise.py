"""How the noise of the terms of the bound is drawn: row by row, in pairs, or along one path of the forward chain."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


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
    previous = np.concatenate([[0.0], schedule.one_minus_alpha_bar[:-1]])
    kept = jnp.asarray(np.sqrt(schedule.alpha * previous / schedule.one_minus_alpha_bar), x0.dtype)
    added = jnp.asarray(np.sqrt(schedule.beta / schedule.one_minus_alpha_bar), x0.dtype)

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
