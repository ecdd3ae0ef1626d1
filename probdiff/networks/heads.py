r"""Heads: what a network predicts, turned into the noise.

A head is an ε-network made of a network that predicts something else. In :math:`z_n = \sqrt{\bar\alpha_n} x_0 +
\sqrt{1-\bar\alpha_n}\, \epsilon` each prediction is an affine function of any other, given z_n; so the programs, the bound and the
samplers know only :math:`\hat\epsilon`. A bare network predicts ε.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from probdiff._checks import require, require_count
from probdiff.chain.schedules import at_step
from probdiff.networks.base import takes_key, with_schedule


class Head(eqx.Module):
    """An ε-network around another network, whose output a subclass turns into the noise (``eps``).

    Attributes:
        network: The network, ``network(z, n)``, with the options of :mod:`probdiff.networks.base`.
        schedule: That of the model; ``Diffusion`` tells it.
    """

    network: Callable
    schedule: object

    def __init__(self, network):
        require(callable(network), "network", "a callable network(z, n)", type(network).__name__, TypeError)
        self.network = network
        self.schedule = None

    @property
    def dim(self):
        """Dimension of the data, if the network knows it."""
        return getattr(self.network, "dim", None)

    @property
    def arguments(self):
        """The arguments that this head was made with."""
        return {"network": self.network}

    def on_schedule(self, schedule):
        """This head on a schedule."""
        parts = with_schedule(self.network, schedule), schedule
        return eqx.tree_at(lambda h: (h.network, h.schedule), self, parts, is_leaf=lambda leaf: leaf is None)

    def output(self, z, n, key=None):
        """The network's output, whose shape is checked."""
        output = self.network(z, n, key=key) if key is not None and takes_key(self.network) else self.network(z, n)
        shape = self.output_shape(z)
        got = getattr(output, "shape", type(output).__name__)
        require(got == shape, "network(z, n)", f"shape {shape} for a {type(self).__name__}", got)
        return output.astype(z.dtype)

    def output_shape(self, z):
        """The shape that the network must return for ``z``."""
        return z.shape

    def levels_of(self, n, dtype):
        r"""√ᾱ_n and √(1−ᾱ_n), with an axis for the dimensions."""
        require(self.schedule is not None, type(self).__name__, "a schedule: use it in a Diffusion", "none")
        return (at_step(table, n, dtype)[..., None] for table in (self.schedule.signal_scale, self.schedule.noise_scale))


class X0Head(Head):
    r"""The network predicts the data: :math:`\hat\epsilon = (z - \sqrt{\bar\alpha}\,\hat x_0) / \sqrt{1-\bar\alpha}`.

    Args:
        network: Returns :math:`\hat x_0`, shaped like ``z``.
    """

    def __call__(self, z, n, *, key=None):
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        signal, noise = self.levels_of(n, z.dtype)
        return (z - signal * self.output(z, n, key)) / noise


class VHead(Head):
    r"""The network predicts the velocity :math:`v = \sqrt{\bar\alpha}\,\epsilon - \sqrt{1-\bar\alpha}\,x_0`:
    :math:`\hat\epsilon = \sqrt{\bar\alpha}\,\hat v + \sqrt{1-\bar\alpha}\, z`.

    Source: Salimans and Ho (2022), arXiv:2202.00512, section 4 and appendix D.

    Args:
        network: Returns :math:`\hat v`, shaped like ``z``.
    """

    def __call__(self, z, n, *, key=None):
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        signal, noise = self.levels_of(n, z.dtype)
        return signal * self.output(z, n, key) + noise * z


class DensityHead(Head):
    r"""For data with a density: the network predicts the noise on a scale that falls with it, :math:`\hat\epsilon = (1-\bar\alpha)^{1/4}\,\hat y`.

    The best prediction is :math:`-\sqrt{1-\bar\alpha}` times a score, and that of noise finer than the data nearly 0. Where the density is smooth it
    falls like :math:`\sigma = \sqrt{1-\bar\alpha}`. Where it jumps, the score is of order 1/σ within σ of the jump, which has probability
    of order σ: the root of the mean square falls like :math:`\sqrt\sigma`, the factor here. So the network errs by as little as
    there is to say, instead of by the same at every step.

    Args:
        network: Returns :math:`\hat y`, shaped like ``z``.
    """

    def __call__(self, z, n, *, key=None):
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        _, noise = self.levels_of(n, z.dtype)
        return jnp.sqrt(noise) * self.output(z, n, key)


class CategoricalHead(Head):
    r"""For data on a grid: the network predicts a probability for each level of each dimension.

    The network gives logits of what the *other* dimensions say; what z says of its own dimension is known exactly and is added,

        log p(v | z_n) = logit_v − (z_n − √ᾱ_n v)² / (2 (1−ᾱ_n)) + const,

    with v on the grid of :class:`~probdiff.DiscretizedNormalLikelihood`. :math:`\hat x_0` is the mean of that
    distribution. Where the noise is finer than the grid the network has nothing to do.

    Args:
        network: Returns logits of shape ``(*z.shape, levels)``, such as ``MLP(…, outputs=levels)``.
        levels: Number of levels L.
    """

    levels: int

    def __init__(self, network, levels):
        super().__init__(network)
        require_count("levels", levels)
        require(levels >= 2, "levels", "at least 2", levels)
        self.levels = int(levels)

    @property
    def arguments(self):
        """The arguments that this head was made with."""
        return {"network": self.network, "levels": self.levels}

    @property
    def grid(self):
        """The levels as the chain sees them, from −1 to 1, shape ``(levels,)``."""
        return jnp.linspace(-1.0, 1.0, self.levels)

    def output_shape(self, z):
        """The shape that the network must return for ``z``."""
        return (*z.shape, self.levels)

    def log_probabilities(self, z, n, *, key=None):
        """log p(v | z_n) of every level, normalised, shape ``(*z.shape, levels)``."""
        signal, noise = self.levels_of(n, z.dtype)
        distance = (z[..., None] - signal[..., None] * self.grid.astype(z.dtype)) / noise[..., None]
        return jax.nn.log_softmax(self.output(z, n, key) - jnp.square(distance) / 2)

    def __call__(self, z, n, *, key=None):
        """Predict the noise in ``z`` of shape ``(*batch, dim)`` after ``n`` steps, shape ``batch``."""
        signal, noise = self.levels_of(n, z.dtype)
        mean = jnp.exp(self.log_probabilities(z, n, key=key)) @ self.grid.astype(z.dtype)
        return (z - signal * mean) / noise
