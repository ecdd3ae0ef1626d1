"""A user-defined schedule: log-SNR along a straight line between two trained ends."""

import equinox as eqx
import jax
import jax.numpy as jnp

import probdiff


class Straight(probdiff.chain.AbstractSchedule):
    """Log-SNR along a straight line between two trained ends."""

    ends: jax.Array
    num_steps: int = eqx.field(static=True)

    def tables(self):
        """The tables for the present values of the ends."""
        return probdiff.chain.ScheduleTables.from_log_snr(jnp.linspace(self.ends[0], self.ends[1], self.num_steps))
