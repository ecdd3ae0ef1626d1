"""A user-defined network with the log-SNR as its input: a trained multiple of the exact noise prediction for standard normal data."""

import equinox as eqx
import jax

import probdiff


class Shrink(probdiff.networks.AbstractNetwork):
    """A trained multiple of the exact noise prediction for standard normal data."""

    dim: int = eqx.field(static=True)
    share: jax.Array
    activation: object  # neither an array nor static, here a function: not trained

    def __call__(self, z, log_snr):
        """The predicted noise in ``z``, shape ``(*batch, dim)``, at log-SNR ``log_snr``, shape ``batch``."""
        return self.activation(self.share) * z * jax.nn.sigmoid(-log_snr)[..., None] ** 0.5
