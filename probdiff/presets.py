"""Complete models: the default of ``probdiff fit`` for a data set, and the model that a configuration of diffusers describes."""

from typing import Any

import jax
import numpy as np

from probdiff._checks import Number, Whole, require, require_type
from probdiff.chain.conventions import diffusers_schedule, settings_of
from probdiff.chain.named_schedules import log_snr_schedule
from probdiff.datasets import Dataset
from probdiff.diffusion import Diffusion
from probdiff.likelihoods import AbstractLikelihood
from probdiff.networks.base import AbstractNetwork, Network
from probdiff.networks.conventions import from_timesteps
from probdiff.networks.convnet import ConvNet
from probdiff.networks.heads import ClipHead, DensityHead, VarianceHead, VHead, X0Head
from probdiff.networks.level_heads import CategoricalHead, ColumnHead, LevelMixtureHead
from probdiff.networks.mlp import MLP
from probdiff.networks.unet import UNet, has_fast_bfloat16

MOST_LOGITS = 2**14
COMPONENTS = 3  # of a LevelMixtureHead
ITERATIONS_PER_ROW, TABLE_ITERATIONS = 5, (500, 25_000)
# The values of entries in the configuration of a diffusers scheduler.
PREDICTIONS: dict[str, type[VHead] | type[X0Head] | None] = {"epsilon": None, "v_prediction": VHead, "sample": X0Head}
VARIANCES = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "forward", "learned_range": "predicted"}


def default_options(dataset: Dataset) -> dict[str, Any]:
    """Number of steps, iterations, batch size, peak learning rate, seed and iterations between validations for a data set, as a dict.

    The parameters with the best validation bound are kept. A small table is overfitted after a few hundred passes, and therefore has fewer iterations.

    Example:
        >>> import numpy as np, probdiff
        >>> data = probdiff.datasets.split(np.random.default_rng(0).normal(size=(50, 3)))
        >>> probdiff.presets.default_options(data)["num_steps"]
        2000
    """
    if _has_few_levels(dataset):
        options = {"num_steps": 1000, "iterations": 2_000, "batch_size": 64, "learning_rate": 4e-3}
    elif _is_fine_image(dataset):
        options = {"num_steps": 1000, "iterations": 8_000, "batch_size": 64, "learning_rate": 3e-3}
    elif dataset.levels is not None:
        options = {"num_steps": 1000, "iterations": 4_000, "batch_size": 128, "learning_rate": 1e-3}
    else:
        passes = int(np.clip(len(dataset.train) * ITERATIONS_PER_ROW, *TABLE_ITERATIONS))
        options = {"num_steps": 2000, "iterations": passes, "batch_size": 256, "learning_rate": 4e-3}
    most = 1000 if _is_fine_image(dataset) else 500
    return options | {"seed": 0, "validate_every": min(most, options["iterations"] // (4 if dataset.levels else 20))}


def default_diffusion(dataset: Dataset, num_steps: Whole, seed: int = 0) -> Diffusion:
    r"""The untrained model for a data set.

    On a grid σ_1, the noise of the first step, is 0.3 times the half-width 1/(L−1) of a level, so that the reconstruction term is nearly 0.
    With few levels the network predicts probabilities of the levels; for images it is convolutional. For images with many levels the network is a U-Net
    that predicts a mixture on the levels, with matrix products in bfloat16 where these are fast. For other data with many levels it predicts
    the noise, and its inputs include harmonics up to the period of the grid. Continuous data are assumed to have a density
    without atoms: the optimal reverse variance is then near :math:`\beta_n`, and is computed after the fit. Where some columns are discrete
    the variance is learned for each dimension, as the optimal variance of discrete columns is near :math:`\tilde\beta_n`. With a context, the model is conditional.

    Args:
        dataset: A :class:`~probdiff.datasets.Dataset`.
        num_steps: N.
        seed: Seed of the initial weights.

    Raises:
        TypeError: If ``dataset`` is not a Dataset.

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
    if _is_fine_image(dataset):
        assert dataset.image_shape is not None
        outputs, products = LevelMixtureHead.outputs(COMPONENTS), "bfloat16" if has_fast_bfloat16() else None
        unet = UNet(dataset.image_shape, key=key, outputs=outputs, context_dim=context_dim, products=products)
        network = LevelMixtureHead(unet, dataset.levels, COMPONENTS)
    elif not _has_few_levels(dataset):
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
    """Whether the data have so few levels that a network can predict a probability for each level of each dimension."""
    return dataset.levels is not None and dataset.levels * dataset.dim <= MOST_LOGITS


def _is_fine_image(dataset: Dataset) -> bool:
    """Whether data are images with more levels than a network can give probabilities of."""
    return dataset.image_shape is not None and dataset.levels is not None and not _has_few_levels(dataset)


def from_diffusers(
    network: Network, config: Any, likelihood: AbstractLikelihood | None = None, dim: Whole | None = None
) -> Diffusion:
    r"""The model of a network that was trained with diffusers, from the configuration of its scheduler; its reverse step is that of the DDPMScheduler.

    ``beta_schedule`` and the other entries of the schedule are read by :func:`probdiff.chain.diffusers_schedule`; timestep t = 0 … N − 1 is step n = t + 1, and
    the network is told t. ``prediction_type`` is ``"epsilon"`` (if absent), ``"v_prediction"`` (a :class:`~probdiff.networks.VHead`) or ``"sample"`` (an
    :class:`~probdiff.networks.X0Head`). ``clip_sample`` and ``clip_sample_range`` make a :class:`~probdiff.networks.ClipHead`. ``variance_type`` is ``"fixed_small"`` (if absent) or
    ``"fixed_small_log"``, ``"posterior"`` here; ``"fixed_large"``, ``"forward"`` here; or ``"learned_range"``, ``"predicted"`` here, with a :class:`~probdiff.networks.VarianceHead`.

    The last step of diffusers, at t = 0, returns the mean; here p(x | z_1) is a distribution around that mean.

    Args:
        network: A callable ``network(z, t)`` on flat data, z of shape ``(*batch, dim)`` and t = 0 … N − 1 of shape ``batch`` (the network must not subtract 1
            again): images of C channels are flattened with the channel first. Its output is shaped like z, or ``(*batch, 2 · dim)`` with ``"learned_range"``.
        config: The configuration, a dict such as that of a scheduler_config.json, or the scheduler itself (anything with ``.config``).
        likelihood: p(x | z_1); ``NormalLikelihood()`` if not given. For images of 256 levels, ``DiscretizedNormalLikelihood(256)``.
        dim: Dimension of the data; needed to generate.

    Raises:
        ValueError, TypeError: If the configuration has a setting that the chain cannot represent: ``thresholding`` (by quantiles of a whole image),
            ``rescale_betas_zero_snr``, ``variance_type`` ``"learned"`` (no range) or ``"fixed_large_log"`` (its step uses the root of a negative logarithm
            as a standard deviation), or an unknown name; or if ``clip_sample`` is missing, for which schedulers have different defaults.

    Example:
        >>> import jax.numpy as jnp, probdiff
        >>> config = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": True}
        >>> probdiff.presets.from_diffusers(lambda z, t: 0 * z, config, dim=2)
        Diffusion(N = 100 steps, dim = 2: NoiseSchedule, ClipHead, NormalLikelihood, reverse kernel posterior; 0 parameters, not bound)
    """
    settings = settings_of(config)
    prediction: Any = settings.get("prediction_type", "epsilon")
    require(prediction in list(PREDICTIONS), "prediction_type", f"one of {list(PREDICTIONS)}", repr(prediction))
    variance: Any = settings.get("variance_type", "fixed_small")
    require(variance in list(VARIANCES), "variance_type", f"one of {list(VARIANCES)}", repr(variance))
    thresholding, clip, bound = settings.get("thresholding"), settings.get("clip_sample"), settings.get("clip_sample_range", 1.0)
    require(not thresholding, "thresholding", "False: clip_sample cuts off at a fixed range", thresholding)
    require(isinstance(clip, bool), "clip_sample", "True or False in the configuration", repr(clip))
    require(isinstance(bound, Number) and bound > 0, "clip_sample_range", "a positive number", repr(bound))
    schedule, told = diffusers_schedule(settings), from_timesteps(network)
    head = PREDICTIONS[prediction]
    own: AbstractNetwork = told if head is None else head(told)
    own = ClipHead(own, bound) if clip else own
    own = VarianceHead(own) if VARIANCES[variance] == "predicted" else own
    return Diffusion(schedule, own, likelihood, VARIANCES[variance], dim)
