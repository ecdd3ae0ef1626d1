"""A user-defined likelihood for data with heavy tails: Student-t around the chain's x_0, with trained degrees of freedom."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

import probdiff


class StudentTLikelihood(probdiff.likelihoods.AbstractLikelihood):
    """Real data x = unit · x_0, with a Student-t distribution instead of a normal one."""

    log_df: jax.Array
    unit: float = eqx.field(static=True)
    levels = None  # the data have a density

    def check_data(self, x):
        """Refuse data that are not floating-point numbers."""
        if not np.issubdtype(x.dtype, np.floating):
            raise TypeError(f"x: Expected floats for StudentTLikelihood; got dtype {x.dtype}")

    def encode(self, x):
        """Data divided by ``unit``."""
        return jnp.asarray(x) / self.unit

    def decode(self, x0):
        """The inverse of ``encode``."""
        return x0 * self.unit

    def log_jacobian(self, dim):
        """The log-determinant of ``encode``, the same for every datum."""
        return -dim * np.log(self.unit)

    def __call__(self, loc, scale):
        """Student-t around the mean of the last reverse step, with its scale."""
        return dist.StudentT(jnp.exp(self.log_df), self.unit * loc, self.unit * scale).to_event(1)
