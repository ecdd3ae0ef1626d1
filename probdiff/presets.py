"""The model and the options of ``probdiff fit`` where nothing is given but the data, by the kind of data."""

from typing import Any

import jax
import numpy as np

from probdiff._checks import Whole, require_type
from probdiff.chain.named_schedules import log_snr_schedule
from probdiff.datasets import Dataset
from probdiff.diffusion import Diffusion
from probdiff.networks.base import AbstractNetwork
from probdiff.networks.convnet import ConvNet
from probdiff.networks.heads import CategoricalHead, ColumnHead, DensityHead
from probdiff.networks.mlp import MLP

MOST_LOGITS = 2**14
ITERATIONS_PER_ROW, TABLE_ITERATIONS = 5, (500, 25_000)


def default_options(dataset: Dataset) -> dict[str, Any]:
    """Number of steps, iterations, batch size, peak learning rate and iterations between validations for a data set, as a dict.

    The best in validation is kept, and a small table is learned by heart in a few hundred passes: it gets fewer iterations.

    Example:
        >>> import numpy as np, probdiff
        >>> data = probdiff.datasets.split(np.random.default_rng(0).normal(size=(50, 3)))
        >>> probdiff.presets.default_options(data)["num_steps"]
        2000
    """
    if _has_few_levels(dataset):
        options = {"num_steps": 1000, "iterations": 2_000, "batch_size": 64, "learning_rate": 4e-3}
    elif dataset.levels is not None:
        options = {"num_steps": 1000, "iterations": 4_000, "batch_size": 128, "learning_rate": 1e-3}
    else:
        passes = int(np.clip(len(dataset.train) * ITERATIONS_PER_ROW, *TABLE_ITERATIONS))
        options = {"num_steps": 2000, "iterations": passes, "batch_size": 256, "learning_rate": 4e-3}
    return options | {"seed": 0, "validate_every": min(500, options["iterations"] // 4 if dataset.levels else options["iterations"] // 20)}


def default_diffusion(dataset: Dataset, num_steps: Whole, seed: int = 0) -> Diffusion:
    r"""The untrained model for a data set.

    On a grid the last noise is a third of the half-width 1/(L−1) of a level, so that the reconstruction costs next to
    nothing. With few levels the network predicts probabilities of the levels; of images, it is convolutional. With many, it predicts
    the noise and gets harmonics up to the period of the grid. Continuous data are taken to have a density
    without atoms: the best reverse variance is then near :math:`\beta_n`, and is computed after the fit. Where columns are of several kinds
    it is learned for each dimension, as the best variance of discrete columns is near :math:`\tilde\beta_n`. With a context, the model is conditional.

    Args:
        dataset: A :class:`~probdiff.datasets.Dataset`.
        num_steps: N.
        seed: Seed of the initial weights.

    Example:
        >>> import numpy as np, probdiff
        >>> data = probdiff.datasets.split(np.random.default_rng(0).normal(size=(50, 3)))
        >>> probdiff.presets.default_diffusion(data, num_steps=10).dim
        3
    """
    require_type("dataset", dataset, Dataset)
    key, context_dim = jax.random.key(seed), dataset.context_dim
    if dataset.levels is None:
        likelihood, schedule = dataset.likelihood(), log_snr_schedule(num_steps, 15.0, -6.0)
        harmonics = 3 if dataset.dim == 2 else 0
        dim = likelihood.encoded_dim(dataset.dim)
        mlp = MLP(dim, key=key, hidden=96, num_blocks=3, num_harmonics=harmonics, context_dim=context_dim)
        if dataset.discrete:
            return Diffusion(schedule, ColumnHead(mlp, likelihood), likelihood, "learned")
        return Diffusion(schedule, DensityHead(mlp), likelihood, "optimal")
    network: AbstractNetwork
    width = dataset.levels - 1
    if not _has_few_levels(dataset):
        harmonics = int(np.ceil(np.log2(width))) + 1
        network = MLP(dataset.dim, key=key, hidden=256, num_blocks=2, dropout=0.1, num_harmonics=harmonics, context_dim=context_dim)
    elif dataset.image_shape is None:
        network = MLP(dataset.dim, key=key, num_blocks=2, dropout=0.3, outputs=dataset.levels, context_dim=context_dim)
    else:
        network = ConvNet(
            dataset.image_shape, key=key, channels=32, num_blocks=3, dropout=0.3, outputs=dataset.levels, context_dim=context_dim
        )
    if _has_few_levels(dataset):
        network = CategoricalHead(network, dataset.levels)
    schedule = log_snr_schedule(num_steps, 2 * float(np.log(3.4 * width)), -6.0)
    return Diffusion(schedule, network, dataset.likelihood(), "posterior")


def _has_few_levels(dataset: Dataset) -> bool:
    """Whether a probability for each level of each dimension is not too much to ask of a network."""
    return dataset.levels is not None and dataset.levels * dataset.dim <= MOST_LOGITS
