"""What ``probdiff fit`` fits when it is told nothing but the data: model and options, by the kind of data."""

import jax
import numpy as np

from probdiff.networks import MLP
from probdiff.programs import Diffusion
from probdiff.schedules import log_snr_schedule


def default_options(dataset):
    """Number of steps, iterations, batch size and peak learning rate for a data set, as a dict."""
    if dataset.levels is not None:
        return {"num_steps": 1000, "iterations": 4_000, "batch_size": 128, "learning_rate": 1e-3, "seed": 0}
    return {"num_steps": 500, "iterations": 6_000, "batch_size": 512, "learning_rate": 2e-3, "seed": 0}


def default_diffusion(dataset, num_steps, seed=0):
    r"""The untrained model for a data set.

    On a grid the last noise is a third of the half-width 1/(L−1) of a level, so that the reconstruction costs next to
    nothing, and the network gets harmonics up to the period of the grid. Continuous data are taken to have a density
    without atoms: the reverse variance :math:`\beta_n` is then nearly the best (it is exact for a standard normal), and
    a few hundred steps suffice.

    Args:
        dataset: A :class:`~probdiff.datasets.Dataset`.
        num_steps: N.
        seed: Seed of the initial weights.
    """
    key = jax.random.key(seed)
    if dataset.levels is not None:
        width = dataset.levels - 1
        schedule = log_snr_schedule(num_steps, 2 * float(np.log(3.4 * width)), -6.0)
        harmonics = int(np.ceil(np.log2(width))) + 1
        network = MLP(dataset.dim, key=key, hidden=256, num_blocks=2, dropout=0.1, num_harmonics=harmonics)
        return Diffusion(schedule, network, dataset.likelihood(), "posterior")
    schedule = log_snr_schedule(num_steps, 13.0, -8.0)
    network = MLP(dataset.dim, key=key, hidden=128, num_blocks=3, num_harmonics=3)
    return Diffusion(schedule, network, dataset.likelihood(), "forward")
