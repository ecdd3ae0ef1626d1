r"""Denoising score matching, as an objective for ``SVI``.

    Σ_n λ_n E‖s_θ(x_n, n) + ε/σ_n‖²,   s_θ = −ε_θ/σ_n  (:mod:`probdiff.chain.score`),

the expected squared distance between the score of the model and the score of the noising, whose conditional mean is the score of the
noisy data. As the distance is ‖ε − ε_θ‖/σ_n, a weight λ_n of the score error is a weight λ_n/σ_n² of the noise error. Two choices have a name:

    λ_n = σ_n²          every noise level counts the same; the loss is Σ_n E‖ε − ε_θ‖²
    λ_n = w_n σ_n²      the bound itself: each term n ≥ 2 is the part of step KL n that depends on the network, and the
                        whole KL for v_n = β̃_n, where λ_n = ½ σ_n² (σ_n²/σ_{n−1}² − 1)

The likelihood weights of continuous time are the limit of the second choice for many steps, and are not exact on a discrete chain.

Sources: Vincent (2011), doi:10.1162/NECO_a_00142; Song and Ermon (2019), arXiv:1907.05600, eqs. 5 and 6; Ho et al. (2020),
arXiv:2006.11239, eqs. 12 and 14; Song et al. (2021), arXiv:2101.09258, theorem 1, for continuous time.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from probdiff._checks import Whole, require, require_finite, require_type
from probdiff.chain.reverse import SampledStep, weighted_error
from probdiff.diffusion import Diffusion
from probdiff.elbo.objective import StepObjective
from probdiff.elbo.sampled_terms import AbstractTerm
from probdiff.elbo.steps import AbstractSteps


def sigma_squared_weights(diffusion: Diffusion) -> Float[np.ndarray, "num_steps"]:
    r"""The usual weights, :math:`\lambda_n = \sigma_n^2`, shape ``(num_steps,)``, float64."""
    return np.asarray(diffusion.schedule.sigma) ** 2


def likelihood_weights(diffusion: Diffusion) -> Float[np.ndarray, "num_steps"]:
    r"""The weights of the bound, :math:`\lambda_n = w_n \sigma_n^2`, shape ``(num_steps,)``, float64.

    :math:`w_n = \beta_n^2 / (2 v_n \alpha_n (1-\bar\alpha_n))`; with :math:`v_n = \tilde\beta_n`, that is
    :math:`\tfrac12 \sigma_n^2 (\sigma_n^2/\sigma_{n-1}^2 - 1)` for n ≥ 2. The first, :math:`w_1 = 1/(2\alpha_1)`, makes the
    first term minus the reconstruction of a :class:`~probdiff.NormalLikelihood`, up to a constant.

    Raises:
        ValueError, TypeError: If the model has a learned schedule, or reverse steps other than Gaussian ones with one variance for each step.

    Example:
        >>> import jax, probdiff
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> weights = probdiff.elbo.likelihood_weights(diffusion)
        >>> loss = probdiff.elbo.ScoreMatching(diffusion, weights)  # the same as weights="likelihood"
        >>> weights.shape
        (5,)
    """
    require_type("diffusion", diffusion, Diffusion)
    _require_fixed(diffusion)
    return np.asarray(diffusion.kernel.kl_weight(diffusion.schedule) * diffusion.schedule.sigma**2)


def _require_fixed(diffusion: Diffusion) -> None:
    """Refuse a model whose terms are not squared errors of the noise times constants, one for each step."""
    schedule = type(diffusion.schedule).__name__
    require(not diffusion.schedule.is_trained, "diffusion", "a NoiseSchedule for score matching", f"a {schedule}")
    kernel = diffusion.kernel
    fixed = kernel.closed_form and kernel.prediction == "noise" and np.ndim(kernel.kl_weight(diffusion.schedule)) == 1
    require(fixed, "diffusion", "a Gaussian kernel with one variance a step for score matching", kernel.name)


WEIGHTS = {"sigma_squared": sigma_squared_weights, "likelihood": likelihood_weights}


class ScoreMatching(StepObjective):
    r"""Denoising score matching, :math:`\sum_n \lambda_n E\|s_\theta + \epsilon/\sigma_n\|^2`, in place of an ELBO.

    ``SVI(diffusion.model, diffusion.guide, optim, ScoreMatching(diffusion))`` minimises this loss, summed over the data and the
    dimensions. With ``weights="likelihood"`` and a :class:`~probdiff.NormalLikelihood` the loss is minus the bound, up to a
    constant that the network does not change.

    Args:
        diffusion: The model. ``SVI`` must be given this model's ``model`` and ``guide``.
        weights: ``"sigma_squared"``, ``"likelihood"`` (:func:`likelihood_weights`), or :math:`\lambda_1 … \lambda_N`,
            shape ``(num_steps,)``, positive.
        steps: As in :class:`~probdiff.AnalyticELBO`: ``"stratified"`` is one step per datum, spread evenly over the batch.
        num_particles, vectorize_particles: As in NumPyro.

    Raises:
        ValueError: If an option has none of these values, or the weights are not N positive numbers.

    Example:
        >>> import jax, optax, probdiff
        >>> from numpyro.infer import SVI
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> loss = probdiff.elbo.ScoreMatching(diffusion, weights="likelihood")
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), loss)
        >>> svi.run(jax.random.key(1), 3, jax.numpy.zeros((4, 2)), progress_bar=False).losses.shape
        (3,)
    """

    def __init__(
        self,
        diffusion: Diffusion,
        weights: str | ArrayLike = "sigma_squared",
        *,
        steps: AbstractSteps | str = "stratified",
        num_particles: Whole = 1,
        vectorize_particles: bool = True,
    ) -> None:
        require_type("diffusion", diffusion, Diffusion)
        _require_fixed(diffusion)
        if isinstance(weights, str):
            require(weights in WEIGHTS, "weights", f"one of {list(WEIGHTS)} or an array", repr(weights))
            weights = WEIGHTS[weights](diffusion)
        weights = np.asarray(weights, np.float64)
        shape = (diffusion.schedule.num_steps,)
        require(weights.shape == shape, "weights", f"shape (num_steps,) = {shape}", f"shape {weights.shape}")
        require_finite("weights", weights)
        require(np.all(weights > 0), "weights", "positive numbers", weights.min())
        term = ScoreError(tuple((weights / diffusion.schedule.sigma**2).tolist()))
        super().__init__(diffusion, term, steps, num_particles=num_particles, vectorize_particles=vectorize_particles)


class ScoreError(AbstractTerm):
    r"""The term :math:`\lambda_n \|s_\theta + \epsilon/\sigma_n\|^2 = (\lambda_n/\sigma_n^2) \|\epsilon - \epsilon_\theta\|^2`.

    Args:
        noise_weights: :math:`\lambda_n/\sigma_n^2`, N numbers.
    """

    noise_weights: tuple[float, ...] = eqx.field(static=True)

    def kl_weight(self, diffusion: Diffusion) -> Float[np.ndarray, "num_steps"]:
        """The weight of squared errors of the noise at each step, shape ``(num_steps,)``, float64."""
        return np.asarray(self.noise_weights)

    def noise_free_bound(
        self, diffusion: Diffusion, x: jax.Array, x0: Float[Array, "datum dim"]
    ) -> Float[Array, "datum"]:
        """Minus the loss of a network that knows the noise: 0, shape ``(datum,)``."""
        return jnp.zeros(len(x0), x0.dtype)

    def __call__(self, diffusion: Diffusion, step: SampledStep) -> Float[Array, "row datum"]:
        """The terms of the steps, shape ``(row, datum)``; see :class:`~probdiff.elbo.analytic.BoundTerm`."""
        return weighted_error(self.kl_weight(diffusion), step.n, step.noise, step.prediction)
