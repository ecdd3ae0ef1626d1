r"""Observations y of a datum x, on which a fitted diffusion is conditioned.

An observation defines its density p(y | x). For the twists (:mod:`probdiff.inference.twists`) it also defines the mean and the covariance of y given x; and some
define the last reverse step given y in closed form, so that the last step adds no variance to the weights.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro import handlers

from probdiff._checks import AnyArray, Numbers, Whole, require, require_finite
from probdiff.likelihoods import AbstractLikelihood


class LastStep(NamedTuple):
    """The last reverse step of one particle, given y.

    Attributes:
        log_prob: :math:`\\log p_\\theta(y | z_1)`, nats.
        sample: A function from a key to a draw of :math:`p_\\theta(x | z_1, y)`, shape ``(dim,)``.
    """

    log_prob: Float[Array, ""]
    sample: Callable[[PRNGKeyArray], Real[Array, "dim"]]


class AbstractObservation(eqx.Module):
    """An observation of a datum x, shape ``(dim,)``, in the user's units.

    To write your own, define :meth:`log_prob`, :meth:`observed`, :meth:`mean` and :meth:`covariance`; and :meth:`last_step` if it has a closed form.

    Example:
        >>> import jax.numpy as jnp
        >>> from probdiff.inference import AbstractObservation, LinearGaussian
        >>> observation: AbstractObservation = LinearGaussian([[1.0, -1.0]], y=[0.4], scale=0.1)
        >>> observation.mean(jnp.array([2.0, 0.5])), observation.observed(jnp.zeros(2))
        (Array([1.5], dtype=float32), Array([0.4], dtype=float32))
    """

    @abc.abstractmethod
    def log_prob(self, x: Real[Array, "*batch dim"]) -> Float[Array, "*batch"]:
        """log p(y | x), nats, for data of shape ``(*batch, dim)``; shape ``batch``."""

    @abc.abstractmethod
    def observed(self, x: Float[Array, "dim"]) -> Real[Array, "observed"]:
        """The observed values y, shape ``(observed,)``, which do not depend on ``x``."""

    @abc.abstractmethod
    def mean(self, x: Float[Array, "dim"]) -> Float[Array, "observed"]:
        """The mean of y given x, differentiable, shape ``(observed,)``."""

    @abc.abstractmethod
    def covariance(self, x: Float[Array, "dim"]) -> Float[Array, "observed observed"]:
        """The covariance of y given x, shape ``(observed, observed)``."""

    def last_step(self, of_x: dist.Distribution) -> LastStep | None:
        """The last reverse step given y, if it has a closed form, otherwise None; ``of_x`` is the distribution of x given z_1."""
        return None

    def simulated(self, x: Real[Array, "dim"], key: PRNGKeyArray) -> "AbstractObservation":
        """An observation of the same kind of ``x``, with simulated y: for bounds on both sides of the evidence."""
        raise NotImplementedError(f"observation: Expected one that can be simulated, LinearGaussian or Inpainting; got {type(self).__name__}")

    def check(self, dim: int, likelihood: AbstractLikelihood, of_x: dist.Distribution) -> None:
        """Refuse a model whose dimension or kind of data does not suit this observation; ``of_x`` is the distribution of x given z_1, with shapes in place of arrays."""


class LinearGaussian(AbstractObservation):
    r"""y = A x + Gaussian noise.

    Args:
        matrix: A, shape ``(observed, dim)``; or a linear function of x of shape ``(dim,)``.
        y: Observed values, shape ``(observed,)``.
        scale: Standard deviation of the noise, a number or one for each entry of y.
        covariance: Covariance of the noise, shape ``(observed, observed)``, instead of ``scale``.

    Raises:
        ValueError: If shapes do not fit, a number is not finite, ``scale`` is not positive, ``covariance`` is not positive definite, or not exactly one of the two is given.

    Example:
        >>> import jax.numpy as jnp
        >>> from probdiff.inference import LinearGaussian
        >>> observation = LinearGaussian([[1.0, 0.0]], y=[0.5], scale=0.1)
        >>> round(observation.log_prob(jnp.array([0.5, 3.0])).item(), 3)  # −log(0.1 √2π)
        1.384
    """

    matrix: Float[Array, "observed dim"] | None
    function: Callable[[Array], Array] | None = eqx.field(static=True)
    y: Float[Array, "observed"]
    noise: Float[Array, "observed observed"]

    def __init__(
        self, matrix: Numbers | Callable[[Array], Array], y: Numbers, scale: Numbers | None = None, *, covariance: Numbers | None = None
    ) -> None:
        y = np.asarray(y, float)
        require(y.ndim == 1 and y.size > 0, "y", "shape (observed,)", f"shape {y.shape}")
        require_finite("y", y)
        require((scale is None) != (covariance is None), "scale, covariance", "exactly one of the two", "neither" if scale is None else "both")
        if covariance is None:
            sd = np.asarray(scale, float)
            require(sd.shape in ((), y.shape), "scale", f"a number or shape {y.shape}", f"shape {sd.shape}")
            require(bool(np.all(np.isfinite(sd) & (sd > 0))), "scale", "positive numbers", sd)
            noise = np.diag(np.broadcast_to(sd**2, y.shape))
        else:
            noise = np.asarray(covariance, float)
            require(noise.shape == 2 * y.shape, "covariance", f"shape {2 * y.shape}", f"shape {noise.shape}")
            require_finite("covariance", noise)
            definite = np.allclose(noise, noise.T) and np.linalg.eigvalsh(noise).min() > 0
            require(definite, "covariance", "a positive definite matrix", noise.tolist())
        dtype = jnp.zeros(()).dtype
        self.function = matrix if callable(matrix) else None
        self.matrix = None
        if not callable(matrix):
            a = np.asarray(matrix, float)
            require(a.ndim == 2 and len(a) == len(y), "matrix", f"shape ({len(y)}, dim)", f"shape {a.shape}")
            require_finite("matrix", a)
            self.matrix = jnp.asarray(a, dtype)
        self.y, self.noise = jnp.asarray(y, dtype), jnp.asarray(noise, dtype)

    def check(self, dim: int, likelihood: AbstractLikelihood, of_x: dist.Distribution) -> None:
        """Refuse a model of another dimension, or a function that is not linear or returns another number of values."""
        if self.matrix is not None:
            require(self.matrix.shape[1] == dim, "matrix", f"shape ({len(self.y)}, {dim})", f"shape {self.matrix.shape}")
        else:
            rows = jax.random.normal(jax.random.key(0), (2, dim))
            found = [np.asarray(self.mean(row)) for row in (*rows, 2 * rows[0] - 3 * rows[1])]
            require(found[0].shape == self.y.shape, "matrix", f"a function that gives shape {self.y.shape}", f"shape {found[0].shape}")
            linear = np.allclose(found[2], 2 * found[0] - 3 * found[1], rtol=1e-3, atol=1e-4 * np.abs(found[2]).max())
            require(linear, "matrix", "a linear function", "one that is not")

    def observed(self, x: Float[Array, "dim"]) -> Float[Array, "observed"]:
        """y."""
        return self.y

    def mean(self, x: Float[Array, "dim"]) -> Float[Array, "observed"]:
        """A x."""
        if self.matrix is not None:
            return jnp.matmul(self.matrix.astype(x.dtype), x, precision="highest")
        assert self.function is not None
        return self.function(x)

    def covariance(self, x: Float[Array, "dim"]) -> Float[Array, "observed observed"]:
        """Covariance of the noise, shape ``(observed, observed)``."""
        return self.noise

    def log_prob(self, x: Real[Array, "*batch dim"]) -> Float[Array, "*batch"]:
        """log p(y | x), nats, shape ``batch``."""
        mean = jnp.vectorize(self.mean, signature="(d)->(y)")(x.astype(self.noise.dtype))
        return dist.MultivariateNormal(mean, self.noise).log_prob(self.y)

    def last_step(self, of_x: dist.Distribution) -> LastStep | None:
        """The last step in closed form if x is normal given z_1: x and y are then jointly normal."""
        of_each = _by_coordinate(of_x)
        if not isinstance(of_each, dist.Normal):
            return None
        loc, scale = jnp.broadcast_arrays(of_each.loc, of_each.scale)
        slope = jax.jacrev(self.mean)(loc)
        gain = slope * jnp.square(scale)
        of_y = dist.MultivariateNormal(self.mean(loc), jnp.matmul(gain, slope.T, precision="highest") + self.noise)

        def sample(key: PRNGKeyArray) -> Float[Array, "dim"]:
            """A joint draw of x and y, corrected for the observed y: Matheron's rule."""
            x_key, y_key = jax.random.split(key)
            x = loc + scale * jax.random.normal(x_key, loc.shape, loc.dtype)
            y = dist.MultivariateNormal(self.mean(x), self.noise).sample(y_key)
            return x + gain.T @ jax.scipy.linalg.cho_solve((of_y.scale_tril, True), self.y - y)

        return LastStep(of_y.log_prob(self.y), sample)

    def simulated(self, x: Real[Array, "dim"], key: PRNGKeyArray) -> "LinearGaussian":
        """An observation of ``x`` with simulated y."""
        y = dist.MultivariateNormal(self.mean(x.astype(self.y.dtype)), self.noise).sample(key)
        return eqx.tree_at(lambda observation: observation.y, self, y)


class Inpainting(AbstractObservation):
    """Some coordinates of x themselves, without noise; the others are hidden.

    The evidence is the marginal density of the observed coordinates in the user's units; on a grid, their probability. The likelihood of the model must be
    independent over the coordinates.

    Args:
        mask: True where a coordinate is observed, shape ``(dim,)``.
        values: Every coordinate, shape ``(dim,)``; hidden coordinates are ignored, and may be NaN.

    Raises:
        ValueError: If the shapes differ, nothing or everything is observed, or an observed value is not finite. TypeError if ``mask`` does not hold truth values.

    Example:
        >>> import numpy as np
        >>> from probdiff.inference import Inpainting
        >>> Inpainting(np.array([True, False]), np.array([0.75, np.nan])).values.tolist()  # 0 where it is hidden
        [0.75, 0.0]
    """

    mask: Bool[Array, "*datum dim"]
    values: Real[Array, "*datum dim"]
    index: Int[Array, "*datum observed"]

    def __init__(self, mask: Bool[AnyArray, "dim"], values: Numbers) -> None:
        mask, x = np.asarray(mask), np.asarray(values)
        require(mask.dtype == bool, "mask", "truth values, True where a coordinate is observed", f"dtype {mask.dtype}", TypeError)
        require(mask.ndim == 1, "mask", "shape (dim,)", f"shape {mask.shape}")
        require(x.shape == mask.shape, "values", f"shape {mask.shape}, that of the mask", f"shape {x.shape}")
        require(mask.any(), "mask", "at least one observed coordinate", "none")
        require(not mask.all(), "mask", "at least one hidden coordinate", "none: then the evidence is p(x), see probdiff.iwae")
        require_finite("values", np.where(mask, x, 0))
        self.mask, self.values = jnp.asarray(mask), jnp.asarray(np.where(mask, x, 0).astype(x.dtype))
        self.index = jnp.asarray(np.flatnonzero(mask))

    @classmethod
    def of_rows(cls, mask: Bool[np.ndarray, "datum dim"], values: Real[np.ndarray, "datum dim"], room: Whole) -> "Inpainting":
        """The observations of some data, each with its own mask, as one observation whose arrays have a leading axis for the data, to be mapped over.

        Shapes do not depend on the masks: each row has room for ``room`` observed values. If it has fewer, the remaining entries of
        its y are 0 with variance 1, independent of x. Nothing is checked.
        """
        rows = object.__new__(cls)
        index = np.argsort(~mask, 1, kind="stable")[:, : int(room)]
        for name, array in (("mask", mask), ("values", np.where(mask, values, 0)), ("index", index)):
            object.__setattr__(rows, name, jnp.asarray(array))
        return rows

    def check(self, dim: int, likelihood: AbstractLikelihood, of_x: dist.Distribution) -> None:
        """Refuse a model of another dimension, a likelihood that is not independent over the coordinates, and values that do not suit it."""
        require(self.mask.shape == (dim,), "mask", f"shape ({dim},)", f"shape {self.mask.shape}")
        require(_by_coordinate(of_x) is not None, "observation", "a likelihood that is independent over the coordinates", type(likelihood).__name__)
        somewhere = likelihood.decode(jnp.zeros(dim)).astype(self.values.dtype)  # a hidden 0 may be off the grid
        likelihood.check_data(jnp.where(self.mask, self.values, somewhere)[None])

    def log_prob(self, x: Real[Array, "*batch dim"]) -> Float[Array, "*batch"]:
        """Raise a TypeError: coordinates that are known exactly have no density p(y | x)."""
        raise TypeError("Inpainting: Expected to be conditioned on through the last step; got a call of log_prob: p(y | x) has no density")

    def observed(self, x: Float[Array, "dim"]) -> Real[Array, "observed"]:
        """The observed values, shape ``(observed,)``."""
        return self.values[self.index]

    def mean(self, x: Float[Array, "dim"]) -> Float[Array, "observed"]:
        """The observed coordinates of x, shape ``(observed,)``."""
        return jnp.where(self.mask, x, 0)[self.index]

    def covariance(self, x: Float[Array, "dim"]) -> Float[Array, "observed observed"]:
        """Zeros, shape ``(observed, observed)``; 1 for an entry that :meth:`of_rows` filled up."""
        return jnp.diag(1 - self.mask[self.index].astype(x.dtype))

    def last_step(self, of_x: dist.Distribution) -> LastStep | None:
        """The last step in closed form, as the coordinates are independent given z_1."""
        of_each = _by_coordinate(of_x)
        assert of_each is not None

        def sample(key: PRNGKeyArray) -> Real[Array, "dim"]:
            return jnp.where(self.mask, self.values, of_each.sample(key))

        return LastStep(jnp.where(self.mask, of_each.log_prob(self.values), 0).sum(), sample)

    def simulated(self, x: Real[Array, "dim"], key: PRNGKeyArray) -> "Inpainting":
        """An observation of the same coordinates of ``x``."""
        return eqx.tree_at(lambda observation: observation.values, self, jnp.where(self.mask, x, 0).astype(self.values.dtype))


def _by_coordinate(of_x: dist.Distribution) -> dist.Distribution | None:
    """The distribution of each coordinate, if the coordinates are independent; otherwise None."""
    independent = isinstance(of_x, dist.Independent) and of_x.base_dist.event_dim == 0 and of_x.event_dim == 1
    return of_x.base_dist if independent else None


class Program(AbstractObservation):
    """The observed sites of a NumPyro program of x.

    The twist ``"tweedie"`` and the DiagonalTwist approximate y given x by a normal with the mean and the variance of each site.

    Args:
        function: A program ``f(x)``, x of shape ``(dim,)``, whose ``sample`` sites are all observed.

    Raises:
        TypeError: If ``function`` is not callable. ValueError in use, if a site is not observed, or has no mean or variance for such a twist.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from probdiff.inference import Program
        >>> observation = Program(lambda x: numpyro.sample("y", dist.Poisson(jnp.exp(x[0])), obs=2))
        >>> round(observation.log_prob(jnp.array([0.0, 1.0])).item(), 3)  # log (e⁻¹ / 2!)
        -1.693
    """

    function: Callable[[Array], Any] = eqx.field(static=True)

    def __init__(self, function: Callable[[Array], Any]) -> None:
        require(callable(function), "function", "a NumPyro program f(x)", type(function).__name__, TypeError)
        self.function = function

    def _trace(self, x: Real[Array, "dim"]) -> list[dict[str, Any]]:
        with handlers.block():
            return list(handlers.trace(handlers.seed(self.function, 0)).get_trace(x).values())

    def _sites(self, x: Real[Array, "dim"]) -> list[dict[str, Any]]:
        return [site for site in self._trace(x) if site["type"] == "sample"]

    def check(self, dim: int, likelihood: AbstractLikelihood, of_x: dist.Distribution) -> None:
        """Refuse a program without observed sites, and one with unobserved sites."""
        sites = self._sites(jnp.zeros(dim))
        require(sites, "function", "a program with observed sites", "none")
        for site in sites:
            require_finite(site["name"], site["value"])
        parts = [site["name"] for site in self._trace(jnp.zeros(dim)) if site["type"] == "plate" and site["args"][0] != site["args"][1]]
        require(not parts, "function", "plates without subsample_size: all that was observed", ", ".join(parts))
        latent = [site["name"] for site in sites if not site["is_observed"]]
        remedy = "; give unknown parameters a prior in a program with log_evidence, under PseudoMarginal"
        require(not latent, "function", f"a program whose sites are all observed{remedy}", f"latent {', '.join(latent)}")

    def log_prob(self, x: Real[Array, "*batch dim"]) -> Float[Array, "*batch"]:
        """The sum over the sites, nats, shape ``batch``."""

        def one(x: Real[Array, "dim"]) -> Float[Array, ""]:
            sites = [site["scale"] * site["fn"].log_prob(site["value"]) if site["scale"] is not None else site["fn"].log_prob(site["value"]) for site in self._sites(x)]
            return sum((log_prob.sum() for log_prob in sites), jnp.zeros(()))

        return jnp.vectorize(one, signature="(d)->()")(x)

    def observed(self, x: Float[Array, "dim"]) -> Float[Array, "observed"]:
        """The values of the sites, one after the other."""
        return jnp.concatenate([jnp.ravel(jnp.asarray(site["value"], x.dtype)) for site in self._sites(x)])

    def mean(self, x: Float[Array, "dim"]) -> Float[Array, "observed"]:
        """The means of the sites, one after the other."""
        return self._of_sites(x, lambda fn: fn.mean)

    def covariance(self, x: Float[Array, "dim"]) -> Float[Array, "observed observed"]:
        """The variances of the sites, on the diagonal."""
        return jnp.diag(self._of_sites(x, lambda fn: fn.variance))

    def _of_sites(self, x: Float[Array, "dim"], moment: Callable[[Any], Any]) -> Float[Array, "observed"]:
        each = []
        for site in self._sites(x):
            try:
                each.append(jnp.broadcast_to(moment(site["fn"]), jnp.shape(site["value"])).ravel())
            except NotImplementedError:
                got = f"{type(site['fn']).__name__} at site {site['name']!r}; twist='none' needs neither"
                raise ValueError(f"function: Expected sites with a mean and a variance, for the twist; got {got}") from None
        return jnp.concatenate(each).astype(x.dtype)
