"""A schedule of one's own: log-SNR along a straight line between two ends that are trained."""

import equinox as eqx
import jax
import jax.numpy as jnp

import probdiff


class Straight(probdiff.chain.AbstractSchedule):
    """Log-SNR along a straight line between two trained ends."""

    ends: jax.Array
    num_steps: int = eqx.field(static=True)

    def tables(self):
        """The tables, from the ends as they are now."""
        return probdiff.chain.ScheduleTables.from_log_snr(jnp.linspace(self.ends[0], self.ends[1], self.num_steps))
