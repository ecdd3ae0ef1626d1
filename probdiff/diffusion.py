r"""A diffusion model as data: schedule, network, reverse kernel and likelihood, and their parameters.

Its programs, its bounds and its samplers are ways to read it.
"""

import dataclasses
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from probdiff._checks import is_concrete, is_trainable, require, require_type
from probdiff.chain.reverse import GaussianKernel, MixtureKernel
from probdiff.chain.schedules import LearnedSchedule, NoiseSchedule, at_step, require_schedule
from probdiff.likelihoods import DiscretizedNormalLikelihood, NormalLikelihood
from probdiff.networks.base import predict_levels, predict_noise, takes_key, with_schedule
from probdiff.programs import scan
from probdiff.programs.sites import PARAMS, AbstractDiffusion


class Diffusion(AbstractDiffusion):
    r"""A denoising diffusion model: schedule, ε-network, reverse kernel and likelihood.

    Args:
        schedule: A :class:`~probdiff.NoiseSchedule`, or a :class:`~probdiff.LearnedSchedule`, which is trained.
        network: An ε-network, any callable ``network(z, n) -> eps_hat`` (see :mod:`probdiff.networks.base`), or a head around a
            network that predicts something else (:mod:`probdiff.networks.heads`). Its floating-point JAX arrays are trained.
        likelihood: :math:`p_\theta(x | z_1)`; ``NormalLikelihood()`` if not given.
        reverse_variance: ``"posterior"`` (:math:`v_n = \tilde\beta_n`), ``"forward"`` (:math:`v_n = \beta_n`), ``"learned"``
            (between the two, by dimension) or ``"optimal"`` (the best for the network, estimated): see
            :mod:`probdiff.chain.variances`.
        dim: Dimension of the data; ``network.dim`` if not given. Needed only to generate, and for ``"learned"``.
        kernel: A reverse kernel in the place of the Gaussian one: a :class:`~probdiff.chain.MixtureKernel`.

    Until it is bound (:meth:`bind`), its programs have the parameters as a NumPyro ``param`` site, and a model that is given
    data is taken to be training: its network gets ``key=``, also in ``svi.evaluate``, which NumPyro does not tell apart.
    A bound model is frozen: inside of another program nothing trains it. :meth:`unbind` goes back.
    """

    schedule: NoiseSchedule | LearnedSchedule
    network: Callable
    kernel: GaussianKernel | MixtureKernel
    likelihood: NormalLikelihood | DiscretizedNormalLikelihood
    dim: int | None
    training: bool = eqx.field(static=True)
    frozen: bool = eqx.field(static=True)

    def __init__(self, schedule, network, likelihood=None, reverse_variance="posterior", dim=None, kernel=None):
        require_schedule(schedule)
        require(callable(network), "network", "a callable network(z, n)", type(network).__name__, TypeError)
        likelihood = NormalLikelihood() if likelihood is None else likelihood
        require(
            isinstance(likelihood, NormalLikelihood | DiscretizedNormalLikelihood),
            "likelihood",
            "an instance of a likelihood",
            repr(likelihood),
            TypeError,
        )
        whole = dim is None or (isinstance(dim, int | np.integer) and dim >= 1)
        require(whole, "dim", "a positive integer", repr(dim))
        own_dim = getattr(network, "dim", None)
        require(dim is None or own_dim in (None, dim), "dim", f"{own_dim}, the network's", dim)
        self.schedule = schedule
        self.network = with_schedule(network, schedule)
        self.likelihood = likelihood
        self.dim = own_dim if dim is None else dim
        self.kernel = GaussianKernel(reverse_variance, schedule, self.dim) if kernel is None else kernel
        require_kernel(self.kernel, network, likelihood)
        self.training = True
        self.frozen = False

    def model(self, x, num_data=None):
        """The reverse chain, a NumPyro program: :func:`probdiff.programs.scan.model`.

        Args:
            x: Data as the user has it, shape ``(datum, dim)``, or None to generate.
            num_data: Size of the full data set, of which ``x`` is a minibatch: log densities are scaled by
                ``num_data / len(x)``. With ``x=None``, the number of data to draw.
        """
        return scan.model(self, x, num_data)

    def guide(self, x, num_data=None):
        """The forward chain, z_1 first: :func:`probdiff.programs.scan.guide`. Arguments as for :meth:`model`; ``x`` is required."""
        scan.guide(self, x, num_data)

    def posterior_guide(self, x, num_data=None):
        """The forward chain after Bayes' rule, in the model's order: :func:`probdiff.programs.scan.posterior_guide`.

        The guide for ``TraceMeanField_ELBO``. Arguments as for :meth:`model`; ``x`` is required.
        """
        scan.posterior_guide(self, x, num_data)

    def reverse_kernel(self, z, n, key=None):
        r"""The distribution :math:`p_\theta(z_{n-1} | z_n)`; at n = 1, the Gaussian that the likelihood reads.

        Args:
            z: :math:`z_n`, shape ``(*batch, dim)``.
            n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.
            key: For the network's dropout while training.
        """
        return self.kernel(self.schedule, z, self.predict(z, n, key), n)

    def predict(self, z, n, key=None):
        """The network's prediction at ``z``, as the kernel needs it: the noise, shaped like ``z``, or probabilities of levels.

        Arguments as for :meth:`reverse_kernel`.
        """
        ask = predict_levels if self.kernel.prediction == "levels" else predict_noise
        return ask(self.network, z, n, key)

    def predict_noise(self, z, n):
        """The noise that the network predicts in ``z``, same shape; arguments as for :meth:`reverse_kernel`."""
        return predict_noise(self.network, z, n)

    def noise_and_predict(self, x0, n, eps, key=None):
        """z_n made from encoded data and ``eps``, and :meth:`predict` there.

        Args:
            x0: Encoded data, shape ``(datum, dim)``.
            n: Step, an integer array of shape ``(*batch, datum)``, or what broadcasts to it.
            eps: Noise, shape ``(*batch, datum, dim)``.
            key: For the network's dropout while training.
        """
        signal = at_step(self.schedule.signal_scale, n, x0.dtype)
        noise = at_step(self.schedule.noise_scale, n, x0.dtype)
        z = signal[..., None] * x0 + noise[..., None] * eps
        return z, self.predict(z, n, key)

    def log_likelihood(self, x, z, n, prediction):
        """log p(x | z_1), in nats, shape ``batch``; n is 1, or what a masked-out entry has there."""
        last = self.kernel(self.schedule, z, prediction, n)
        return self.kernel.observation(self.likelihood, last).log_prob(x)

    def bind(self, params: Mapping):
        """The trained model: these parameters in place of the initial ones, frozen, dropout off.

        Its programs have no ``param`` site, so that it can be part of another program without being trained along with it. JAX
        gradients with respect to its arrays are as ever.

        Args:
            params: ``SVIRunResult.params`` or ``svi.get_params(state)``; an empty mapping keeps the weights.

        Raises:
            ValueError: If the parameters are not those of this model.
        """
        require_type("params", params, Mapping)
        unknown = sorted(set(params) - {PARAMS}, key=str)
        require(not unknown, "params", f"only the site {PARAMS!r}", f"{unknown}")
        trained = self.unbind()
        if PARAMS in params:
            own, given = (jax.tree.map(jnp.shape, tree) for tree in (trained.trainable(), params[PARAMS]))
            require(own == given, "params", "the parameters of this model", "another structure or other shapes")
            trained = trained._with(params[PARAMS])
        return trained._marked(frozen=True, training=False)

    def unbind(self):
        """The model before it was bound, at the parameters it has now: with its ``param`` site and dropout, to train on."""
        return self._marked(frozen=False, training=True)

    def evaluated(self):
        """The bound model, with a learned schedule whose values are known replaced by its :class:`~probdiff.NoiseSchedule`."""
        own = self._marked(frozen=True, training=False)
        learned = isinstance(self.schedule, LearnedSchedule) and is_concrete(self.schedule.start)
        return own._on_schedule(self.schedule.fixed()) if learned else own

    def trainable_without_dropout(self):
        """The model with its ``param`` site, whose network gets no ``key=``: for gradients of what :meth:`evaluated` gives."""
        return self._marked(frozen=False, training=False)

    def _marked(self, **marks):
        """This model with other static marks."""
        if all(getattr(self, name) == mark for name, mark in marks.items()):
            return self
        other = object.__new__(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(other, field.name, marks.get(field.name, getattr(self, field.name)))
        return other

    def trainable(self):
        """This model with everything but its parameters replaced by None: the value of its ``param`` site."""
        learned = jax.tree.leaves(eqx.filter(self.schedule, is_trainable))
        # The network looks up the schedule, too, but has no parameters of it.
        own = eqx.tree_at(lambda d: d.network, self, with_schedule(self.network, None)) if learned else self
        return eqx.filter(own, is_trainable)

    def with_param_site(self):
        """This model with its parameters taken from the NumPyro ``param`` site (if it has any), for a program to run."""
        return self.from_param_site().tabulated()

    def from_param_site(self):
        """:meth:`with_param_site` before :meth:`tabulated`."""
        own = self.trainable()
        return self._with(numpyro.param(PARAMS, own)) if jax.tree.leaves(own) and not self.frozen else self

    def tabulated(self):
        """This model with the tables of a learned schedule computed once, not in every step of a scan."""
        known = self.evaluated() if self.frozen else self
        learned = isinstance(known.schedule, LearnedSchedule)
        return known._on_schedule(known.schedule.tables()) if learned else known

    def guide_schedule(self):
        """The schedule for a guide: the guide has parameters only if the schedule has."""
        return self.schedule if isinstance(self.schedule, NoiseSchedule) else self.with_param_site().schedule

    def _with(self, params):
        """This model with other parameters, shaped like :meth:`trainable`."""
        if isinstance(self.schedule, NoiseSchedule):
            return eqx.combine(params, self)
        untold = eqx.tree_at(lambda d: d.network, self, with_schedule(self.network, None))
        other = eqx.combine(params, untold)
        return other._on_schedule(other.schedule)

    def _on_schedule(self, schedule):
        return eqx.tree_at(lambda d: (d.schedule, d.network), self, (schedule, with_schedule(self.network, schedule)))

    def training_key(self, x):
        """A key for the network's ``key=``, drawn from the ``seed`` handler; None when not training on data."""
        wanted = self.training and x is not None and takes_key(self.network)
        return numpyro.prng_key() if wanted else None

    def check_data(self, x):
        """Refuse data of the wrong shape or kind.

        Raises:
            ValueError: If the data are not ``(datum, dim)``, empty, not finite or off the grid.
            TypeError: If the likelihood does not take data of this dtype.
        """
        require(hasattr(x, "shape") and hasattr(x, "dtype"), "x", "an array", type(x).__name__, TypeError)
        require(len(x.shape) == 2, "x", f"shape (datum, {self.dim or 'dim'})", f"shape {tuple(x.shape)}")
        require(x.shape[0] > 0, "x", "at least one datum", f"shape {tuple(x.shape)}")
        require(self.dim in (None, x.shape[1]), "x", f"shape (datum, {self.dim})", f"shape {tuple(x.shape)}")
        self.likelihood.check_data(x)

    def encode(self, x):
        """The number of data, and the data as the chain sees them, shape ``(datum, dim)``; they are checked first."""
        require(x is not None, "x", "data: the guide needs x", "None")
        self.check_data(x)
        return len(x), self.likelihood.encode(x)

    def data_shape(self, x, num_data):
        """The shape ``(datum, dim)`` of the data, or of what is to be drawn."""
        if x is not None:
            self.check_data(x)
            return x.shape
        require(num_data is not None, "num_data", "the number of data to draw, since x is None", "None")
        require(
            self.dim is not None,
            "dim",
            "Diffusion(…, dim=…) or a network with .dim, to know the dimension to generate",
            "neither",
        )
        return num_data, self.dim


def require_kernel(kernel, network, likelihood):
    """Refuse a reverse kernel that does not suit the network or the likelihood."""
    kinds = GaussianKernel | MixtureKernel
    require(isinstance(kernel, kinds), "kernel", "a GaussianKernel or a MixtureKernel", type(kernel).__name__, TypeError)
    if isinstance(kernel, MixtureKernel):
        for name, part in (("network", network), ("likelihood", likelihood)):
            levels = getattr(part, "levels", None)
            expected = "CategoricalHead" if name == "network" else "DiscretizedNormalLikelihood"
            got = f"a {type(part).__name__} of {levels}" if levels else f"a {type(part).__name__}"
            require(levels == kernel.levels, name, f"a {expected} of {kernel.levels} levels for this MixtureKernel", got)
