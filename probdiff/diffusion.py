r"""A diffusion model: schedule, network, reverse kernel and likelihood, with their parameters.

Programs, bounds, estimators and samplers are functions or methods of it.

Source: Ho et al. (2020), arXiv:2006.11239, section 2; Kingma et al. (2021), arXiv:2107.00630, for the chain in terms of its log-SNR.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray
from numpyro import distributions as dist

from probdiff._checks import AnyArray, Number, PyTree, Step, Whole, is_concrete, is_trainable, require, require_type
from probdiff._chunks import take
from probdiff._context import num_rows, of_batch, read_context
from probdiff._static import Static
from probdiff.chain.predicted import named_kernel
from probdiff.chain.reverse import AbstractKernel, NoiseMoments, SampledStep
from probdiff.chain.schedules import AbstractSchedule, at_step, require_schedule
from probdiff.chain.variances import AbstractReverseVariance
from probdiff.likelihoods import AbstractLikelihood, NormalLikelihood
from probdiff.networks.base import (
    Network,
    Prediction,
    check_context,
    evaluate,
    is_conditional,
    is_told_step,
    predict_noise,
    takes,
)
from probdiff.networks.heads import AbstractHead
from probdiff.networks.host import require_of_jax
from probdiff.networks.nnx import require_pure
from probdiff.programs import scan
from probdiff.programs.sites import PARAMS, AbstractDiffusion, Data, Size, svi_begins

UNTRAINED = (
    "network: Expected something to train: a network that is a module of equinox or Flax NNX, or probdiff.networks.from_apply(apply, params); got a {} without "
    "any: parameters in the closure of a function are not trained. diffusion.bind({{}}) is a model that is not to be trained"
)


class Diffusion(AbstractDiffusion):
    r"""A denoising diffusion model: schedule, ε-network, reverse kernel and likelihood.

    Args:
        schedule: A :class:`~probdiff.NoiseSchedule`, or one that is trained, such as a :class:`~probdiff.LearnedSchedule`.
        network: An ε-network, any callable ``network(z, n) -> eps_hat`` or ``network(z, log_snr)`` (see
            :mod:`probdiff.networks.base`), or a head around a network that predicts something else
            (:mod:`probdiff.networks.heads`). Its floating-point JAX arrays are trained.
        likelihood: :math:`p_\theta(x | z_1)`; ``NormalLikelihood()`` if not given.
        reverse_variance: ``"posterior"`` (:math:`v_n = \tilde\beta_n`), ``"forward"`` (:math:`v_n = \beta_n`), ``"learned"``
            (between the two, by dimension), ``"optimal"`` (of least expected KL for the network, estimated): see
            :mod:`probdiff.chain.variances`; an :class:`~probdiff.chain.AbstractReverseVariance`; or ``"predicted"`` (between the two, by the
            network, a :class:`~probdiff.networks.VarianceHead`): :class:`~probdiff.chain.PredictedVarianceKernel`.
        dim: Dimension of the data; ``network.dim`` if not given. Needed to generate, for inference and for ``"learned"``.
        kernel: A reverse kernel in place of the Gaussian one, such as a :class:`~probdiff.chain.MixtureKernel`.

    It is a tree of JAX arrays alone: ``jax.jit(f)(diffusion)`` works; everything else in the network is static.

    Until it is bound (:meth:`bind`), its programs have the parameters as a NumPyro ``param`` site, and a model that is given
    data is assumed to be in training: its network is given ``key=``, also in ``svi.evaluate``, as NumPyro does not distinguish the two.
    A bound model is frozen: inside another program it is not trained. :meth:`unbind` is the inverse.

    With a network that accepts ``context=`` the model is conditional, p(x | c): its programs, and all functions of data, take ``context=`` with a row
    for each datum. Or the model is :meth:`given` the context once.

    Example:
        >>> import jax, probdiff
        >>> from numpyro import handlers
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(0), hidden=8))
        >>> handlers.seed(diffusion.model, 0)(None, num_data=3).shape  # SVI(diffusion.model, diffusion.guide, …) fits it
        (3, 2)
    """

    schedule: AbstractSchedule
    _arrays: Any  # the network with everything but its JAX arrays replaced by None, and
    _constants: Static = eqx.field(static=True)  # the rest of the network
    kernel: AbstractKernel
    likelihood: AbstractLikelihood
    dim: int | None = eqx.field(static=True)
    training: bool = eqx.field(static=True)
    frozen: bool = eqx.field(static=True)
    context: PyTree  # a row for each datum, if the model was given a context; otherwise None

    def __init__(
        self,
        schedule: AbstractSchedule,
        network: Network,
        likelihood: AbstractLikelihood | None = None,
        reverse_variance: str | AbstractReverseVariance = "posterior",
        dim: Whole | None = None,
        kernel: AbstractKernel | None = None,
    ) -> None:
        require_schedule(schedule)
        require(callable(network), "network", "a callable network(z, n)", type(network).__name__, TypeError)
        require_of_jax(network)
        require_pure(network)
        likelihood = NormalLikelihood() if likelihood is None else likelihood
        require(isinstance(likelihood, AbstractLikelihood), "likelihood", "an instance of a likelihood", repr(likelihood), TypeError)
        require(dim is None or (isinstance(dim, int | np.integer) and dim >= 1), "dim", "a positive integer", repr(dim))
        own_dim = getattr(network, "dim", None)
        require(dim is None or own_dim in (None, dim), "dim", f"{own_dim}, the network's", dim)
        self.schedule = schedule
        self._arrays, constants = eqx.partition(network, lambda leaf: isinstance(leaf, jax.Array))
        self._constants = Static(constants)
        self.likelihood = likelihood
        self.dim = own_dim if dim is None else int(dim)
        self.kernel = named_kernel(reverse_variance, schedule, self.dim) if kernel is None else kernel
        require_type("kernel", self.kernel, AbstractKernel)
        self.kernel.check_parts(network, likelihood)
        if isinstance(network, AbstractHead):
            network.check_likelihood(likelihood)
        self.training, self.frozen, self.context = True, False, None

    def __repr__(self) -> str:
        """The parts by name, and the number of parameters."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.trainable()))
        parts = ", ".join(type(part).__name__ for part in (self.schedule, self.network, self.likelihood))
        bound = "bound" if self.frozen else "not bound"
        given = "" if not self.is_conditional else ", conditional" if self.context is None else f", given {num_rows(self.context)} contexts"
        return (
            f"Diffusion(N = {self.schedule.num_steps} steps, dim = {self.dim}: {parts}, reverse kernel {self.kernel.name}; "
            f"{parameters} parameters, {bound}{given})"
        )

    def with_kernel(self, kernel: AbstractKernel) -> "Diffusion":
        """This model with another reverse kernel, which must suit the network and the likelihood (ValueError)."""
        require_type("kernel", kernel, AbstractKernel)
        kernel.check_parts(self.network, self.likelihood)
        return self._replaced(kernel=kernel)

    def with_likelihood(self, likelihood: AbstractLikelihood) -> "Diffusion":
        """This model with another likelihood."""
        return self._replaced(likelihood=likelihood)

    @property
    def network(self) -> Network:
        """The network, with the current parameters of the model."""
        return eqx.combine(self._arrays, self._constants.tree)

    def with_network(self, network: Network) -> "Diffusion":
        """This model with another network."""
        require_pure(network)
        arrays, constants = eqx.partition(network, lambda leaf: isinstance(leaf, jax.Array))
        return self._replaced(_arrays=arrays, _constants=Static(constants))

    @property
    def is_conditional(self) -> bool:
        """Whether the network takes ``context=``."""
        return is_conditional(self.network)

    def given(self, context: Any) -> "Diffusion":
        """This model given a context, p(x | c) for each row c: a Diffusion for as many data as the context has rows, in the same order.

        Args:
            context: Covariates or labels, an array or a tree of arrays (or data frames of numbers) whose leading axis is the datum, in the form that the
                network needs; None for this model unchanged.

        Raises:
            ValueError: If the model takes no context or has been given one, or the context is empty, not finite or of the wrong shape.
            TypeError: If it contains anything but numbers.
        """
        if context is None:
            return self
        unconditional = "None, for a network that takes no context="
        require(self.is_conditional, "context", unconditional, f"a {type(context).__name__}")
        require(self.context is None, "context", "None, for a model that was given one", f"a {type(context).__name__}")
        context = read_context(context)
        check_context(self.network, context)
        return self._replaced(context=context)

    def take(self, rows: Any) -> "Diffusion":
        """This model with some rows of its context, if it was given one; corresponds to ``x[rows]`` of the data."""
        return self.with_context(take(self.context, rows))

    def with_context(self, context: PyTree) -> "Diffusion":
        """This model with another context, which is not checked."""
        return self._replaced(context=context)

    def model(self, x: Data | None, num_data: Size | None = None, *, context: Any = None) -> Data:
        """The reverse chain, a NumPyro program: :func:`probdiff.programs.scan.model`.

        Args:
            x: Data as the user has it, shape ``(datum, dim)``, or None to generate.
            num_data: Size of the full data set, of which ``x`` is a minibatch: log densities are scaled by
                ``num_data / len(x)``. With ``x=None``, the number of data to draw: with a context, one for each row.
            context: Of a conditional model, as for :meth:`given`.
        """
        return scan.model(self.given(context), x, num_data)

    def guide(self, x: Data | None, num_data: Size | None = None, *, context: Any = None) -> None:
        """The forward chain, z_1 first: :func:`probdiff.programs.scan.guide`. Arguments as for :meth:`model`; ``x`` is required."""
        scan.guide(self.given(context), x, num_data)

    def posterior_guide(self, x: Data | None, num_data: Size | None = None, *, context: Any = None) -> None:
        """The forward chain after Bayes' rule, in the model's order: :func:`probdiff.programs.scan.posterior_guide`.

        The guide for ``TraceMeanField_ELBO``. Arguments as for :meth:`model`; ``x`` is required.
        """
        scan.posterior_guide(self.given(context), x, num_data)

    def reverse_kernel(self, z: Float[AnyArray, "*batch dim"], n: Step, key: PRNGKeyArray | None = None) -> dist.Distribution:
        r"""The distribution :math:`p_\theta(z_{n-1} | z_n)`; at n = 1, the Gaussian from which the likelihood is made.

        Args:
            z: :math:`z_n`, shape ``(*batch, dim)``.
            n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.
            key: For the network's dropout while training.
        """
        return self.kernel(self.schedule, jnp.asarray(z), self.predict(z, n, key), n)

    def predict(self, z: Float[AnyArray, "*batch dim"], n: Step, key: PRNGKeyArray | None = None) -> Prediction:
        """The network's prediction at ``z``: the noise, shaped like ``z``, or another quantity that the kernel needs.

        Arguments as for :meth:`reverse_kernel`.
        """
        asked = self._network(key), *self._noise_level(z, n), key, self._context(jnp.shape(z)[:-1])
        return predict_noise(*asked) if self.kernel.prediction == "noise" else evaluate(*asked, method=self.kernel.prediction)

    def predict_noise(self, z: Float[AnyArray, "*batch dim"], n: Step) -> Float[Array, "*batch dim"]:
        """The noise that the network predicts in ``z``, same shape; arguments as for :meth:`reverse_kernel`."""
        return predict_noise(self._network(), *self._noise_level(z, n), context=self._context(jnp.shape(z)[:-1]))

    def log_probabilities(self, z: Float[AnyArray, "*batch dim"], n: Step) -> Float[Array, "*batch dim level"] | None:
        """log p(v | z_n) of every level v, nats, shape ``(*batch, dim, level)``; None if the network does not predict probabilities of levels."""
        if not hasattr(self.network, "log_probabilities"):
            return None
        asked = *self._noise_level(z, n), None, self._context(jnp.shape(z)[:-1])
        return evaluate(self._network(), *asked, method="log_probabilities")

    def predict_noise_at(
        self, z: Float[AnyArray, "*batch dim"], log_snr: Number | Float[AnyArray, "*#batch"]
    ) -> Float[Array, "*batch dim"]:
        """The noise that the network predicts in ``z``, same shape, between steps: ``log_snr`` broadcasts to ``batch``.

        Raises:
            ValueError: If the network is told the step (:attr:`is_told_step`).
        """
        z = jnp.asarray(z)
        log_snr = jnp.broadcast_to(jnp.asarray(log_snr, z.dtype), z.shape[:-1])
        return predict_noise(self._network(), z, log_snr, context=self._context(z.shape[:-1]))

    @property
    def is_told_step(self) -> bool:
        """Whether the network is told the step, and not the log-SNR: it is then defined at the steps only."""
        return is_told_step(self.network)

    def _network(self, key: PRNGKeyArray | None = None) -> Network:
        """The network; without a key, its dropout is off."""
        return eqx.nn.inference_mode(self.network) if key is None else self.network

    def _context(self, batch: tuple[int, ...]) -> PyTree:
        """The context for latents with these batch axes, the last of which is the datum."""
        of_one = self.context is not None and num_rows(self.context) == 1
        self.require_context(batch[-1] if batch and not of_one else 1)
        return of_batch(self.context, batch)

    def _noise_level(
        self, z: Float[AnyArray, "*batch dim"], n: Step
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"], Int[Array, "*batch"]]:
        """z, its log-SNR and its step, both of shape ``batch``."""
        z, n = jnp.asarray(z), jnp.broadcast_to(jnp.asarray(n, jnp.int32), z.shape[:-1])
        return z, at_step(self.schedule.log_snr, n, z.dtype), n

    def sampled_step(
        self,
        x: Data,
        x0: Float[AnyArray, "datum dim"],
        n: Integer[AnyArray, "*#batch"],
        eps: Float[Array, "*batch dim"],
        key: PRNGKeyArray | None = None,
        known_noise: Callable[..., NoiseMoments] | None = None,
        extra_noise: Callable[[], Array] | None = None,
    ) -> SampledStep:
        """z_n made from encoded data and ``eps``, and the prediction of the network: a :class:`~probdiff.chain.reverse.SampledStep`.

        Args:
            x, x0: Data, and the same encoded, shape ``(datum, dim)``.
            n: Step, an integer array of shape ``(*batch, datum)`` or of one that broadcasts to it.
            eps: Noise, shape ``(*batch, datum, dim)``.
            key: For the network's dropout while training.
            known_noise: A function of the schedule, z_n and n that returns the conditional :class:`~probdiff.chain.reverse.NoiseMoments`
                of the noise; mean ``eps`` and variance 0 if not given.
            extra_noise: A function that gives noise shaped like ``eps``, for a kernel whose KL is sampled.
        """
        signal = at_step(self.schedule.signal_scale, n, x0.dtype)
        noise = at_step(self.schedule.noise_scale, n, x0.dtype)
        z = signal[..., None] * x0 + noise[..., None] * eps
        known = NoiseMoments(eps, 0.0) if known_noise is None else known_noise(self.schedule, z, n)
        return SampledStep(x, x0, n, z, known, self.predict(z, n, key), extra_noise)

    def step_kl(self, step: SampledStep) -> Float[Array, "*batch"]:
        """KL of steps 2 … N, in nats, shape ``batch``; entries of n = 1 have no meaning.

        Args:
            step: A :class:`~probdiff.chain.reverse.SampledStep`.
        """
        return self.kernel.step_kl(self.schedule, step)

    def log_likelihood(self, step: SampledStep) -> Float[Array, "*batch"]:
        """The reconstruction log p(x | z_1), in nats, shape ``batch``; entries of n > 1 have no meaning. Argument as for :meth:`step_kl`."""
        last = self.kernel(self.schedule, step.z, step.prediction, step.n)
        return self.kernel.observation(self.likelihood, last).log_prob(step.x)

    def bind(self, params: Mapping[str, Any]) -> "Diffusion":
        """The trained model: these parameters in place of the initial ones, frozen, dropout off.

        Its programs have no ``param`` site, so that it can be part of another program without being trained along with it. JAX
        gradients with respect to its arrays are unchanged.

        Args:
            params: ``SVIRunResult.params`` or ``svi.get_params(state)``; an empty mapping keeps the weights.

        Raises:
            ValueError: If the parameters do not fit this model; TypeError if ``params`` is not a mapping.
        """
        require_type("params", params, Mapping)
        unknown = sorted(set(params) - {PARAMS}, key=str)
        require(not unknown, "params", f"only the site {PARAMS!r}", f"{unknown}")
        trained = self.unbind()
        if PARAMS in params:
            trained = trained._with(params[PARAMS])
        return trained._replaced(frozen=True, training=False)

    def unbind(self) -> "Diffusion":
        """The model with its present parameters as a ``param`` site, and with dropout: the inverse of :meth:`bind`, for further training."""
        return self._replaced(frozen=False, training=True)

    def evaluated(self) -> "Diffusion":
        """The bound model, with a learned schedule whose values are known replaced by its :class:`~probdiff.NoiseSchedule`."""
        known = all(map(is_concrete, jax.tree.leaves(self.schedule)))
        return self._replaced(frozen=True, training=False, schedule=self.schedule.fixed() if known else self.schedule)

    def is_like(self, other: "Diffusion") -> bool:
        """Whether another model has the same structure: it may differ in its parameters and in being bound or not."""
        own: object = jax.tree.structure(self.unbind().with_context(None))
        return own == jax.tree.structure(other.unbind().with_context(None))

    def trainable_without_dropout(self) -> "Diffusion":
        """The model with its ``param`` site and without dropout: for gradients of the function that :meth:`evaluated` computes."""
        return self._replaced(frozen=False, training=False)

    def _replaced(self, **parts: Any) -> "Diffusion":
        """This model with some of its fields replaced."""
        if all(getattr(self, name) is part for name, part in parts.items()):
            return self
        other = object.__new__(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(other, field.name, parts.get(field.name, getattr(self, field.name)))
        return other

    def trainable(self) -> "Diffusion":
        """This model with everything but its parameters replaced by None: the value of its ``param`` site."""
        return eqx.filter(self.with_context(None), is_trainable)

    def with_param_site(self) -> "Diffusion":
        """This model with its parameters taken from the NumPyro ``param`` site (if it has any), for use inside a program."""
        return self.from_param_site().tabulated()

    def from_param_site(self) -> "Diffusion":
        """:meth:`with_param_site` before :meth:`tabulated`."""
        own = self.trainable()
        if not self.frozen and not jax.tree.leaves(own._arrays) and svi_begins():
            warnings.warn(UNTRAINED.format(type(self.network).__name__), stacklevel=2)
        return self._with(numpyro.param(PARAMS, own)) if jax.tree.leaves(own) and not self.frozen else self

    def tabulated(self) -> "Diffusion":
        """This model with the tables of a learned schedule computed once, not in every step of a scan."""
        known = self.evaluated() if self.frozen else self
        return known._replaced(schedule=known.schedule.tabulated())

    def guide_schedule(self) -> AbstractSchedule:
        """The schedule for a guide: the guide has parameters only if the schedule has."""
        return self.with_param_site().schedule if self.schedule.is_trained else self.schedule

    def _with(self, params: "Diffusion") -> "Diffusion":
        """This model with other parameters, shaped like :meth:`trainable`."""
        own, given = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (self.trainable(), params))
        shapes, got = ({jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves} for leaves in (own, given))
        require(shapes == got, "params", "the parameters of this model", "another structure or other shapes")
        filled = jax.tree.unflatten(jax.tree.structure(self.trainable()), [leaf for _, leaf in given])
        return eqx.combine(filled, self.with_context(None)).with_context(self.context)

    def training_key(self, x: Data | None) -> PRNGKeyArray | None:
        """A key for the network's ``key=``, drawn from the ``seed`` handler; None when not training on data."""
        wanted = self.training and x is not None and takes(self.network, "key")
        return numpyro.prng_key() if wanted else None
