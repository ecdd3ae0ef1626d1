"""Networks that are broken on purpose, one compiled program for all: what is wrong with each is in its arrays."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import probdiff
from probdiff.chain import AbstractReverseVariance
from probdiff.oracles import GaussianMixture

N, DIM = 20, 2
COVARIANCES = [[[0.03, 0.01], [0.01, 0.02]], [[0.02, -0.005], [-0.005, 0.05]]]
ORACLE = GaussianMixture([0.5, 0.5], [[0.6, 0.2], [-0.5, -0.3]], COVARIANCES)
SCHEDULE = probdiff.log_snr_schedule(N)
X = ORACLE.sample(np.random.default_rng(0), 128).astype(np.float32)
STEPS = np.arange(1, N + 1)


class Broken(eqx.Module):
    """The answer a_n ε̂ + b_n z, with ε̂ the oracle's, asked for the step m_n, plus a share of the mean of the batch.

    Right are a = 1, b = 0, m = n and no share.
    """

    network: eqx.Module
    log_snr: jax.Array
    of_noise: jax.Array
    of_z: jax.Array
    share: jax.Array

    def __call__(self, z, n):
        eps_hat = self.network(z, self.log_snr[n - 1])
        answer = self.of_noise[n - 1][..., None] * eps_hat + self.of_z[n - 1][..., None] * z
        return answer + self.share * answer.mean(-2, keepdims=True)


class Times(AbstractReverseVariance):
    """β̃_n times a factor."""

    log_factor: jax.Array

    def __call__(self, schedule):
        return jnp.full(schedule.num_steps, self.log_factor)


def broken(of_noise=1.0, of_z=0.0, asked=STEPS, share=0.0, factor=1.0, schedule=SCHEDULE, network=None):
    """A model with a network, the oracle's or one that is told the noise level, that is broken in these ways, or in none."""
    log_snr = jnp.asarray(schedule.log_snr[asked - 1], jnp.float32)
    tables = (jnp.asarray(np.broadcast_to(each, N), jnp.float32) for each in (of_noise, of_z))
    network = Broken(network or ORACLE.network(schedule), log_snr, *tables, jnp.float32(share))
    return probdiff.Diffusion(schedule, network, reverse_variance=Times(jnp.log(jnp.float32(factor))), dim=DIM)


SIGNAL, NOISE = SCHEDULE.signal_scale, SCHEDULE.noise_scale
# By what the audit must call it, and a word that tells two of one name apart.
OPTIONS = {
    "steps out of order": dict(asked=STEPS[::-1]),
    "off by a step: asked late": dict(asked=np.minimum(STEPS + 1, N)),
    "off by a step: asked early": dict(asked=np.maximum(STEPS - 1, 1)),
    "off by a scale: too small": dict(of_noise=0.8),
    "off by a scale: too large": dict(of_noise=1.2),
    "predicts minus the noise": dict(of_noise=-1.0),
    "predicts v": dict(of_noise=1 / SIGNAL, of_z=-NOISE / SIGNAL),
    "predicts minus v": dict(of_noise=-1 / SIGNAL, of_z=NOISE / SIGNAL),
    "predicts x_0": dict(of_noise=-NOISE / SIGNAL, of_z=1 / SIGNAL),
    "predicts the score of z_n": dict(of_noise=-1 / NOISE),
    "predicts the score of z_n/√ᾱ_n": dict(of_noise=-SIGNAL / NOISE),
    "coupled batch": dict(share=0.5),
    "reverse variance": dict(factor=20.0),
    "predicts no noise": dict(of_noise=0.0),
    "output not finite": dict(of_noise=np.where(STEPS == 3, np.inf, 1.0)),
}
FAULTS = {fault: broken(**options) for fault, options in OPTIONS.items()}
# What the data are of those that the network knows: a multiple and a shift.
RANGES = {
    "[0, 1] for [−1, 1]": (0.5, 0.5),
    "0 … 255 for [−1, 1]": (127.5, 127.5),
    "half": (0.5, 0.0),
    "double": (2.0, 0.0),
    "a shift": (1.0, 1.0),
    "not standardised": (np.array([1.0, 3.0]), np.array([0.0, -2.0])),
}
