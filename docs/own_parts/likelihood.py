"""A likelihood of one's own: data with heavy tails, Student-t around the chain's x_0 with degrees of freedom that are trained."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist

import probdiff


class StudentTLikelihood(probdiff.likelihoods.AbstractLikelihood):
    """Real data x = unit · x_0, with a Student-t distribution in the place of a normal one."""

    log_df: jax.Array
    unit: float = eqx.field(static=True)
    levels = None  # a density

    def check_data(self, x):
        """Refuse what is no floating-point number."""
        if not np.issubdtype(x.dtype, np.floating):
            raise TypeError(f"x: Expected floats for StudentTLikelihood; got dtype {x.dtype}")

    def encode(self, x):
        """In the chain, one unit is 1."""
        return jnp.asarray(x) / self.unit

    def decode(self, x0):
        """The inverse."""
        return x0 * self.unit

    def log_jacobian(self, dim):
        """The same for every datum."""
        return -dim * np.log(self.unit)

    def __call__(self, loc, scale):
        """Student-t with the mean and the scale of the last reverse step."""
        return dist.StudentT(jnp.exp(self.log_df), self.unit * loc, self.unit * scale).to_event(1)
