"""A network of one's own that is told the noise level: a trained share of the noise that there would be in standard normal data."""

import equinox as eqx
import jax

import probdiff


class Shrink(probdiff.networks.AbstractNetwork):
    """A trained share of the noise of standard normal data."""

    dim: int = eqx.field(static=True)
    share: jax.Array
    activation: object  # what is neither an array nor static is a constant, such as a function

    def __call__(self, z, log_snr):
        """The noise in ``z``, shape ``(*batch, dim)``, of log-SNR ``log_snr``, shape ``batch``."""
        return self.activation(self.share) * z * jax.nn.sigmoid(-log_snr)[..., None] ** 0.5
