r"""Distributions of data that are known exactly; the programs and the estimators are tested against them.

An oracle is a distribution of data whose density, entropy in nats, draws and exact ε-network are known. The exact
ε-network is the conditional mean of the noise, :math:`E[\epsilon | z_n] = -\sqrt{1-\bar\alpha_n}\, \nabla \log q(z_n)`. No network has a
smaller expected error :math:`E \|\epsilon - \hat\epsilon\|^2`, at any step. ``standardized`` gives the oracle of the encoded
data of a :class:`~probdiff.NormalLikelihood`. Three have this interface: :class:`GaussianOracle`,
:class:`GaussianMixture` and :class:`UniformBoxes`.

For Gaussian data the exact ε-network is linear, :math:`\hat\epsilon = A_n z + b_n`. With *any* linear network the
reverse chain is linear-Gaussian, so that every term of the bound and :math:`\log p_\theta(x)` have closed forms,
which are computed in :mod:`probdiff.oracles.closed_form`.

Source: Efron (2011), doi:10.1198/jasa.2011.tm11181, for the conditional mean by the gradient of the density (Tweedie's formula).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from probdiff._checks import AnyArray, Number, Numbers, require, require_finite
from probdiff.chain.schedules import AbstractSchedule
from probdiff.likelihoods import NormalLikelihood
from probdiff.oracles.networks import BoxesNetwork, ConditionalLinearNetwork, LinearNetwork, MixtureNetwork

GRID_POINTS = 1_000_000
Points = Real[AnyArray, "*batch dim"] | Sequence[Any]
LogProb = Float[np.ndarray, "*batch"] | np.float64


class GaussianOracle:
    r"""Gaussian data :math:`x_0 \sim N(m, S)`; of a conditional model, :math:`x_0 | c \sim N(m + B c, S)`.

    Args:
        mean: m, shape ``(dim,)``.
        covariance: S, shape ``(dim, dim)``, positive definite.
        slope: B, shape ``(dim, context_dim)``, for data given a context c of shape ``(datum, context_dim)``; None for data without a context.

    Raises:
        ValueError: If shapes do not fit, a number is not finite, or the covariance is not positive definite.

    Example:
        >>> import probdiff
        >>> normal = probdiff.oracles.GaussianOracle(mean=[0.0, 1.0], covariance=[[1.0, 0.5], [0.5, 1.0]])
        >>> schedule = probdiff.cosine_schedule(5)
        >>> diffusion = probdiff.Diffusion(schedule, normal.network(schedule))  # with the network of the least error
        >>> round(float(normal.log_prob([0.0, 1.0])), 3)
        -1.694
    """

    def __init__(self, mean: Numbers, covariance: Numbers, slope: Numbers | None = None) -> None:
        self.mean: Float[np.ndarray, "dim"] = np.asarray(mean, np.float64)
        self.covariance: Float[np.ndarray, "dim dim"] = np.asarray(covariance, np.float64)
        self.slope: Float[np.ndarray, "dim context"] | None = None if slope is None else np.asarray(slope, np.float64)
        require_finite("mean", self.mean)
        require(self.mean.ndim == 1, "mean", "shape (dim,)", f"shape {self.mean.shape}")
        require(
            self.covariance.shape == 2 * self.mean.shape,
            "covariance",
            f"shape {2 * self.mean.shape}",
            f"shape {self.covariance.shape}",
        )
        _require_positive_definite("covariance", self.covariance)
        if self.slope is not None:
            require_finite("slope", self.slope)
            good = self.slope.ndim == 2 and len(self.slope) == self.dim
            require(good, "slope", f"shape ({self.dim}, context_dim)", f"shape {self.slope.shape}")

    @property
    def dim(self) -> int:
        """Dimension of the data."""
        return len(self.mean)

    def mean_given(self, context: Numbers | None) -> Float[np.ndarray, "..."]:
        """The mean given a context of shape ``(*batch, context_dim)``, shape ``(*batch, dim)``; without a context, shape ``(dim,)``."""
        if context is None or self.slope is None:
            require(context is self.slope is None, "context", "None" if self.slope is None else "an array", type(context).__name__)
            return self.mean
        c = np.asarray(context, np.float64)
        require(c.shape[-1:] == self.slope.shape[1:], "context", f"shape (datum, {self.slope.shape[1]})", f"shape {c.shape}")
        return self.mean + c @ self.slope.T

    def network(self, schedule: AbstractSchedule, scale: Number = 1.0) -> LinearNetwork | ConditionalLinearNetwork:
        r"""The network with the smallest expected error, :math:`E[\epsilon | z_n]`, times ``scale``."""
        alpha_bar = schedule.alpha_bar[:, None, None]
        noise = schedule.one_minus_alpha_bar[:, None, None]
        weight = np.sqrt(noise) * np.linalg.inv(alpha_bar * self.covariance + noise * np.eye(self.dim))
        bias = -weight @ self.mean * np.sqrt(schedule.alpha_bar)[:, None]
        if self.slope is None:
            return LinearNetwork(scale * weight, scale * bias)
        context_weight = -weight @ self.slope * np.sqrt(alpha_bar)
        return ConditionalLinearNetwork(scale * weight, scale * bias, scale * context_weight)

    def sample(self, rng: np.random.Generator, size: int, context: Numbers | None = None) -> Float[np.ndarray, "size dim"]:
        """``size`` draws of the data from a NumPy generator, shape ``(size, dim)``, given a context with ``size`` rows."""
        return rng.multivariate_normal(np.zeros(self.dim), self.covariance, size) + self.mean_given(context)

    def log_prob(self, x: Points, context: Numbers | None = None) -> LogProb:
        """Log-density in nats of ``x`` of shape ``(*batch, dim)``, given a context of shape ``(*batch, context_dim)``; shape ``batch``."""
        return log_normal(np.asarray(x, np.float64) - self.mean_given(context), np.zeros(self.dim), self.covariance)

    def entropy(self) -> tuple[float, float]:
        """Differential entropy in nats, and its error, 0: it has a closed form."""
        return float(np.linalg.slogdet(2 * np.pi * np.e * self.covariance)[1] / 2), 0.0

    def standardized(self, loc: Numbers, scale: Numbers) -> "GaussianOracle":
        """The oracle of (x − loc) / scale; each is a number or one per dimension, ``scale`` positive."""
        loc, scale = _loc_and_scale(loc, scale, self.dim)
        slope = None if self.slope is None else self.slope / scale[:, None]
        return GaussianOracle((self.mean - loc) / scale, self.covariance / np.outer(scale, scale), slope)


class GaussianMixture:
    """Data from a mixture of K Gaussians.

    Args:
        weights: Probability of each component, shape ``(K,)``, positive, with sum 1.
        means: Means, shape ``(K, dim)``.
        covariances: Positive definite covariances, shape ``(K, dim, dim)``, or ``(dim, dim)`` for one that all
            components share (kept as ``(1, dim, dim)``).

    Raises:
        ValueError: If a shape does not fit, a number is not finite, a weight is not positive, the weights do not sum to 1, or a covariance is not positive definite.

    Example:
        >>> import probdiff
        >>> mixture = probdiff.oracles.GaussianMixture(weights=[0.5, 0.5], means=[[-2.0], [2.0]], covariances=[[0.25]])
        >>> schedule = probdiff.cosine_schedule(5)
        >>> diffusion = probdiff.Diffusion(schedule, mixture.network(schedule))  # with the network of the least error
        >>> round(mixture.entropy()[0], 3)
        1.419
    """

    def __init__(self, weights: Numbers, means: Numbers, covariances: Numbers) -> None:
        self.weights: Float[np.ndarray, "component"] = np.asarray(weights, np.float64)
        self.means: Float[np.ndarray, "component dim"] = np.asarray(means, np.float64)
        covariances = np.asarray(covariances, np.float64)
        require_finite("weights", self.weights)
        require_finite("means", self.means)
        require(self.weights.ndim == 1, "weights", "shape (K,)", f"shape {self.weights.shape}")
        require(
            np.all(self.weights > 0) and abs(self.weights.sum() - 1) < 1e-6,
            "weights",
            "positive numbers that sum to 1",
            f"{self.weights}, whose sum is {self.weights.sum()}",
        )
        self.weights = self.weights / self.weights.sum()
        size = len(self.weights)
        require(
            self.means.ndim == 2 and len(self.means) == size and self.dim > 0,
            "means",
            f"shape (K, dim), K = {size}",
            f"shape {self.means.shape}",
        )
        one = (self.dim, self.dim)
        require(
            covariances.shape in (one, (1, *one), (size, *one)),
            "covariances",
            f"shape {(size, *one)} or {one}",
            f"shape {covariances.shape}",
        )
        self.covariances: Float[np.ndarray, "component dim dim"] = covariances.reshape(-1, *one)
        for k, covariance in enumerate(self.covariances):
            _require_positive_definite(f"covariances[{k}]", covariance)

    @property
    def dim(self) -> int:
        """Dimension of the data."""
        return self.means.shape[1]

    def network(self, schedule: AbstractSchedule, scale: Number = 1.0) -> MixtureNetwork:
        r"""The network with the smallest expected error, :math:`E[\epsilon | z_n]`, times ``scale``."""
        variances, axes = np.linalg.eigh(self.covariances)
        means = np.einsum("ki,kij->kj", self.means, axes)
        return MixtureNetwork(np.log(self.weights), means, variances, axes, scale)

    def sample(self, rng: np.random.Generator, size: int) -> Float[np.ndarray, "size dim"]:
        """``size`` draws of the data from a NumPy generator, shape ``(size, dim)``."""
        counts = rng.multinomial(size, self.weights)
        draws = [rng.multivariate_normal(mean, S, count) for (_, mean, S), count in zip(self._components(), counts)]
        return rng.permutation(np.concatenate(draws))

    def log_prob(self, x: Points) -> LogProb:
        """Log-density in nats of ``x`` of shape ``(*batch, dim)``, shape ``batch``."""
        x = np.asarray(x, np.float64)
        joint = (np.log(weight) + log_normal(x, mean, S) for weight, mean, S in self._components())
        return functools.reduce(np.logaddexp, joint)

    def entropy(self, rng: np.random.Generator | None = None, num_samples: int = 100_000) -> tuple[float, float]:
        """Differential entropy in nats, and an estimate of its error.

        By quadrature where a grid of a million points resolves the narrowest component (always so for few
        components of similar width in one or two dimensions): the error is then numerical. Otherwise the mean of
        −log p over draws, and its standard error.

        Args:
            rng: NumPy generator; not used by quadrature.
            num_samples: Number of draws; not used by quadrature.

        Raises:
            ValueError: If draws are needed and ``rng`` was not given.
        """
        spread = 8 * np.sqrt(np.diagonal(self.covariances, axis1=1, axis2=2))
        lower, upper = (self.means - spread).min(0), (self.means + spread).max(0)
        narrowest = np.sqrt(np.linalg.eigvalsh(self.covariances).min())
        cells = 4 * (upper - lower) / narrowest
        if np.log(cells).sum() <= np.log(GRID_POINTS):
            fine, coarse = (self._entropy_on_grid(lower, upper, np.ceil(part * cells)) for part in (1, 0.8))
            return fine, abs(fine - coarse)
        require(rng is not None, "rng", f"a NumPy generator, where {GRID_POINTS} points are no fine enough grid", None)
        assert rng is not None
        surprise = -self.log_prob(self.sample(rng, num_samples))
        return float(surprise.mean()), float(surprise.std(ddof=1) / np.sqrt(num_samples))

    def standardized(self, loc: Numbers, scale: Numbers) -> "GaussianMixture":
        """The oracle of (x − loc) / scale; each is a number or one per dimension, ``scale`` positive."""
        loc, scale = _loc_and_scale(loc, scale, self.dim)
        return GaussianMixture(self.weights, (self.means - loc) / scale, self.covariances / np.outer(scale, scale))

    def _components(self) -> Iterator[tuple[np.float64, Float[np.ndarray, "dim"], Float[np.ndarray, "dim dim"]]]:
        return zip(self.weights, self.means, np.broadcast_to(self.covariances, (len(self.means), self.dim, self.dim)))

    def _entropy_on_grid(
        self, lower: Float[np.ndarray, "dim"], upper: Float[np.ndarray, "dim"], cells: Float[np.ndarray, "dim"]
    ) -> float:
        """−∫ p log p over a box by the midpoint rule, ``cells`` per dimension."""
        width = (upper - lower) / cells
        centres = [low + w * (np.arange(count) + 0.5) for low, w, count in zip(lower, width, cells)]
        log_p = self.log_prob(np.stack(np.meshgrid(*centres), -1))
        return float(-np.sum(np.exp(log_p) * log_p) * width.prod())


class UniformBoxes:
    """Data uniform on the union of K boxes that do not overlap.

    Args:
        lower: Lower ends of each box, shape ``(K, dim)``.
        upper: Upper ends, shape ``(K, dim)``, above the lower ones.

    Raises:
        ValueError: If a shape does not fit, a number is not finite, a box is empty, or two overlap.

    Example:
        >>> import probdiff
        >>> boxes = probdiff.oracles.UniformBoxes(lower=[[0.0, 0.0], [2.0, 2.0]], upper=[[1.0, 1.0], [3.0, 3.0]])
        >>> round(boxes.entropy()[0], 4)  # the log of their area, 2
        0.6931
    """

    def __init__(self, lower: Numbers, upper: Numbers) -> None:
        self.lower: Float[np.ndarray, "box dim"] = np.asarray(lower, np.float64)
        self.upper: Float[np.ndarray, "box dim"] = np.asarray(upper, np.float64)
        require_finite("lower", self.lower)
        require_finite("upper", self.upper)
        require(self.lower.ndim == 2 and self.lower.size > 0, "lower", "shape (K, dim)", f"shape {self.lower.shape}")
        require(self.upper.shape == self.lower.shape, "upper", f"shape {self.lower.shape}", f"shape {self.upper.shape}")
        require(np.all(self.upper > self.lower), "upper", "numbers above lower", f"{self.upper}, lower {self.lower}")
        overlap = np.all(np.minimum(self.upper[:, None], self.upper) > np.maximum(self.lower[:, None], self.lower), -1)
        pairs = np.argwhere(np.triu(overlap, 1))
        require(len(pairs) == 0, "lower, upper", "boxes that do not overlap", f"an overlap of boxes {pairs[:1]}")

    @property
    def dim(self) -> int:
        """Dimension of the data."""
        return self.lower.shape[1]

    def network(self, schedule: AbstractSchedule, scale: Number = 1.0) -> BoxesNetwork:
        r"""The network with the smallest expected error, :math:`E[\epsilon | z_n]`, times ``scale``."""
        return BoxesNetwork((self.upper + self.lower) / 2, (self.upper - self.lower) / 2, scale)

    def sample(self, rng: np.random.Generator, size: int) -> Float[np.ndarray, "size dim"]:
        """``size`` draws of the data from a NumPy generator, shape ``(size, dim)``."""
        volumes = np.prod(self.upper - self.lower, -1)
        box = rng.choice(len(volumes), size, p=volumes / volumes.sum())
        return rng.uniform(self.lower[box], self.upper[box])

    def log_prob(self, x: Points) -> LogProb:
        """Log-density in nats of ``x`` of shape ``(*batch, dim)``, shape ``batch``; edges count as inside."""
        x = np.asarray(x, np.float64)[..., None, :]
        inside = np.all((self.lower <= x) & (x <= self.upper), -1).any(-1)
        return np.where(inside, -self.entropy()[0], -np.inf)

    def entropy(self) -> tuple[float, float]:
        """Differential entropy in nats, the log of the volume, and its error, 0."""
        return float(np.log(np.prod(self.upper - self.lower, -1).sum())), 0.0

    def standardized(self, loc: Numbers, scale: Numbers) -> "UniformBoxes":
        """The oracle of (x − loc) / scale; each is a number or one per dimension, ``scale`` positive."""
        loc, scale = _loc_and_scale(loc, scale, self.dim)
        return UniformBoxes((self.lower - loc) / scale, (self.upper - loc) / scale)


def log_normal(
    x: Float[np.ndarray, "*batch dim"], mean: Float[np.ndarray, "dim"], covariance: Float[np.ndarray, "dim dim"]
) -> LogProb:
    """Log-density in nats of N(mean, covariance) at ``x`` of shape ``(*batch, dim)``."""
    white = (x - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    return -((white**2).sum(-1) + np.linalg.slogdet(2 * np.pi * covariance)[1]) / 2


def _require_positive_definite(name: str, matrix: Float[np.ndarray, "dim dim"]) -> None:
    require_finite(name, matrix)
    definite = np.allclose(matrix, matrix.T) and np.linalg.eigvalsh(matrix).min() > 0
    require(definite, name, "a positive definite matrix", matrix)


def _loc_and_scale(
    loc: Numbers, scale: Numbers, dim: int
) -> tuple[Float[np.ndarray, "{dim}"], Float[np.ndarray, "{dim}"]]:
    """``loc`` and ``scale`` as arrays of shape ``(dim,)``, with the checks of the likelihood."""
    likelihood = NormalLikelihood(loc, scale)
    likelihood.check_data(np.zeros((1, dim)))
    return np.broadcast_to(likelihood.loc, dim), np.broadcast_to(likelihood.scale, dim)
