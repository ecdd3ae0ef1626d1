r"""The analytic bound: the bound of a network that knows the noise, minus the excess of every step.

A network that knew the noise, :math:`\hat\epsilon = \epsilon`, would attain

    noise_free_bound(x) = − prior KL − Σ_{n≥2} d · constant_n + log p(x | x_0, v_1),

which has no sampling error: the noise-free bound. The remainder is one term per step, the excess, positive for Gaussian steps (at n = 1: nearly always);
for a :class:`~probdiff.chain.GaussianKernel`,

    excess_n = w_n ‖ε − ε̂(z_n, n)‖²   (n ≥ 2, and n = 1 under a normal likelihood),

and the bound is L(x) = noise_free_bound(x) − Σ_n E excess_n. Every estimator of the analytic bound is a way to estimate that
sum; large constants such as the log-density of a peaked p(x | z_1) never get into its variance.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.chain.forward import prior_kl
from probdiff.chain.reverse import SampledStep
from probdiff.chain.schedules import TableByDim
from probdiff.diffusion import Diffusion
from probdiff.elbo.objective import StepObjective
from probdiff.elbo.sampled_terms import AbstractTerm
from probdiff.elbo.steps import AbstractSteps
from probdiff.programs.sites import Data


class BoundTerm(AbstractTerm):
    """The terms of the bound, in the form that a :class:`~probdiff.elbo.objective.StepObjective` sums."""

    def kl_weight(self, diffusion: Diffusion) -> TableByDim:
        """The weight w_n of squared errors of the noise at each step, shape ``(num_steps,)`` or, by dimension, ``(num_steps, dim)``."""
        return diffusion.kernel.kl_weight(diffusion.schedule)

    def noise_free_bound(self, diffusion: Diffusion, x: Data, x0: Float[Array, "datum dim"]) -> Float[Array, "datum"]:
        """The bound of a network that knew the noise, in nats, shape ``(datum,)``."""
        constant = diffusion.kernel.constants(diffusion.schedule, x0.shape[-1]).sum()
        return self._reconstruction(diffusion, x, x0) - constant - prior_kl(diffusion.schedule, x0)

    def __call__(self, diffusion: Diffusion, step: SampledStep) -> Float[Array, "row datum"]:
        """How much each term lowers the bound compared with the noise-free bound, in nats.

        Args:
            diffusion: The model.
            step: A :class:`~probdiff.chain.reverse.SampledStep` of steps n, shape ``(row, datum)``.

        Returns:
            Shape ``(row, datum)``.
        """
        later = diffusion.kernel.excess(diffusion.schedule, step)
        return jnp.where(step.n == 1, self._first_excess(diffusion, step), later)

    def _first_excess(self, diffusion: Diffusion, step: SampledStep) -> Float[Array, "row datum"]:
        return self._reconstruction(diffusion, step.x, step.x0) - diffusion.log_likelihood(step)

    def _reconstruction(self, diffusion: Diffusion, x: Any, x0: Any) -> Float[Array, "datum"]:
        return diffusion.kernel.noise_free_reconstruction(diffusion.schedule, diffusion.likelihood, x, x0)


class AnalyticELBO(StepObjective):
    """The analytic bound as an objective for ``SVI``, in place of ``Trace_ELBO``.

    The estimate consists of parts; each option is an object, or the name of one.

    Args:
        diffusion: The model. ``SVI`` must be given its ``model``, and its ``guide`` or ``posterior_guide``, or this objective's ``guide``, which also has the
            site of the learned probabilities and coefficients; without that site they keep their initial values, and a warning says so.
        steps: An :class:`~probdiff.elbo.AbstractSteps`. ``"all"``: every step, N network evaluations per datum. Otherwise one step n per datum, whose term is divided
            by the probability of n: ``"uniform"`` on 1 … N; ``"stratified"``: the same, spread evenly over the data of the batch; ``"importance"``: drawn with learned
            probabilities; ``"stratified_importance"``: both.
        noise: An :class:`~probdiff.elbo.AbstractNoise`. ``"independent"`` (if not given); ``"antithetic"``: each term twice, with ε and −ε; ``"path"``: the noise of
            one path z_1 … z_N of the forward chain (all steps only).
        control: A class of :class:`~probdiff.elbo.AbstractControl`. ``"linear"`` subtracts a control variate, the excess of the best linear prediction of the noise,
            with a coefficient that is learned (with all steps: 1); None (if not given) subtracts nothing.
        points: None (if not given), or the data whose mean bound is estimated, such as the whole training set, shape ``(point, dim)``: the noise in each step KL is then
            replaced by its conditional mean and variance given z_n, with x_0 one of the points. The estimate is unbiased for the mean over ``points`` when ``x`` is
            drawn from them, and not for a single datum. ``"batch"``: the points are ``x`` itself, each with its weight by ``handlers.scale`` or
            ``handlers.mask``. With a conditional model, only None or ``"batch"`` (over data of the same context); with a kernel whose KL is sampled, only None.
        adapt_to: The variance that the learned probabilities reduce: of the ``"gradient"`` (if not given; for training) or of the ``"value"``.
        schedule_loss: The objective for the shape of a :class:`~probdiff.LearnedSchedule`: ``"bound"`` (if not given), as for all other parameters, or ``"variance"``: the
            least variance of the estimate, with random steps only (the first and the last log-SNR still raise the bound). It costs a second evaluation of the network.
            Source: Kingma et al. (2021), arXiv:2107.00630, appendix I.2.
        options: ``num_particles``, independent estimates to average, and ``vectorize_particles``, as in NumPyro.

    Raises:
        ValueError: If an option has none of these values; in use, if ``SVI`` was given the model or the guide of another Diffusion.

    Example:
        >>> import jax, optax, probdiff
        >>> from numpyro.infer import SVI
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1))
        >>> elbo = probdiff.AnalyticELBO(diffusion, steps="uniform")
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), elbo)
        >>> svi.run(jax.random.key(1), 3, jax.numpy.zeros((4, 2)), progress_bar=False).losses.shape
        (3,)
    """

    def __init__(self, diffusion: Diffusion, steps: AbstractSteps | str = "all", **options: Any) -> None:
        super().__init__(diffusion, BoundTerm(), steps, **options)
