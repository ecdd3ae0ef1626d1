r"""The control variate: the shortfall of the best linear prediction of the noise, whose expectation is closed-form.

For data of mean m and covariance :math:`S = U \mathrm{diag}(\lambda) U^T` the best linear :math:`\hat\epsilon` is, in the
basis U, :math:`a_n (z_n - \sqrt{\bar\alpha_n} m)` with
:math:`a_n = \sqrt{1-\bar\alpha_n} / (\bar\alpha_n \lambda + 1 - \bar\alpha_n)`. With that prediction

    E[w_n ‖ε − ε̂‖² | x_0] = w_n Σ_j [ (ᾱ_n λ_j / (ᾱ_n λ_j + 1 − ᾱ_n))² + a_nj² ᾱ_n (Uᵀ(x_0 − m))_j² ],

exact for *any* x_0, whether or not the data are Gaussian. So the moments may be taken from the batch at hand.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp

from probdiff.chain.schedules import at_step, per_step

# Accelerators would round the factors to fewer bits, and the value would miss its closed-form mean.
_product = functools.partial(jnp.matmul, precision="highest")


class LinearControl(eqx.Module):
    """The control variate for one batch.

    Attributes:
        mean, basis: Mean, shape ``(dim,)``, and eigenvectors, shape ``(dim, dim)``, of the data that it was fitted to.
        gain: a_n, shape ``(num_steps, dim)``.
        noise_part: The first sum above without w_n, shape ``(num_steps,)``.
        data_part: The factor of (Uᵀ(x_0 − m))² without w_n, shape ``(num_steps, dim)``.
        signal, weight: √ᾱ_n and w_n, shape ``(num_steps,)``.
    """

    mean: jax.Array
    basis: jax.Array
    gain: jax.Array
    noise_part: jax.Array
    data_part: jax.Array
    signal: jax.Array
    weight: jax.Array

    def __init__(self, diffusion, x0):
        """Fit to encoded data, shape ``(datum, dim)``."""
        x0 = jax.lax.stop_gradient(x0)
        self.mean = x0.mean(0)
        centred = x0 - self.mean
        eigenvalues, self.basis = jnp.linalg.eigh(_product(centred.T, centred) / len(x0))
        schedule = diffusion.schedule
        alpha_bar, noise = (jnp.asarray(t, x0.dtype) for t in (schedule.alpha_bar, schedule.one_minus_alpha_bar))
        explained = alpha_bar[:, None] * jnp.maximum(eigenvalues, 0)
        self.gain = jnp.sqrt(noise)[:, None] / (explained + noise[:, None])
        self.noise_part = jnp.square(explained / (explained + noise[:, None])).sum(-1)
        self.data_part = jnp.square(self.gain) * alpha_bar[:, None]
        self.signal = jnp.sqrt(alpha_bar)
        self.weight = jnp.asarray(per_step(diffusion.kernel.weight(schedule)), x0.dtype)

    def value(self, z, n, eps):
        """w_n ‖ε − ε̂‖² at ``z``, shape ``(*batch, dim)``, made from ``eps``; n of shape ``batch``."""
        predicted = at_step(self.gain, n, z.dtype) * _product(z - self.signal[n - 1][..., None] * self.mean, self.basis)
        return self.weight[n - 1] * jnp.square(_product(eps, self.basis) - predicted).sum(-1)

    def expected(self, coefficient, x0):
        """Σ_n coefficient_n E[w_n ‖ε − ε̂‖² | x_0], shape ``(datum,)``; ``coefficient`` of shape ``(num_steps,)``."""
        scaled = coefficient * self.weight
        squares = jnp.square(_product(x0 - self.mean, self.basis))
        return _product(squares, _product(scaled, self.data_part)) + _product(scaled, self.noise_part)
