"""Two-dimensional sets whose density is known: points from a NumPy generator, and their distribution.

The sets are those of FFJORD (Grathwohl et al. 2019, arXiv:1810.01367), drawn independently. Their entropy is computed by quadrature, or exact for the checkerboard.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from probdiff.oracles.distributions import GaussianMixture, UniformBoxes

Plane = Float[np.ndarray, "point 2"]
Curve = Callable[[Float[np.ndarray, "point"]], Plane]


@dataclasses.dataclass(frozen=True)
class _Curves:
    """Points on curves c(t), t uniform on [0, 1], with the curve chosen at random, plus isotropic noise.

    A constant c is a point. With t at the nodes of Gauss-Legendre quadrature this is a mixture of Gaussians; the nodes are so dense, compared with
    the noise, that the ε-network of the mixture is exact to 1e-10 where the data are.
    """

    curves: tuple[Curve, ...]
    sd: float
    nodes: int

    def sample(self, rng: np.random.Generator, size: int) -> Plane:
        t, which = rng.random(size), rng.integers(len(self.curves), size=size)
        points = np.stack([curve(t) for curve in self.curves])[which, np.arange(size)]
        return points + self.sd * rng.standard_normal((size, 2))

    def oracle(self) -> GaussianMixture:
        node, weight = np.polynomial.legendre.leggauss(self.nodes)
        means = np.concatenate([curve((node + 1) / 2) for curve in self.curves])
        weights = np.tile(weight / 2, len(self.curves)) / len(self.curves)
        return GaussianMixture(weights, means, self.sd**2 * np.eye(2))


def _plane(x: Float[np.ndarray, "*#point"], y: Float[np.ndarray, "*#point"] | float) -> Plane:
    return np.stack(np.broadcast_arrays(x, y), -1)


def _circle(radius: float) -> Curve:
    return lambda t: radius * _plane(np.cos(2 * np.pi * t), np.sin(2 * np.pi * t))


def _point(angle: float) -> Curve:
    return lambda t: 4 / 1.414 * _plane(np.cos(angle) + 0 * t, np.sin(angle))


def _upper_moon(t: Float[np.ndarray, "point"]) -> Plane:
    return 2 * _plane(np.cos(np.pi * t), np.sin(np.pi * t)) + [-1, -0.2]


def _lower_moon(t: Float[np.ndarray, "point"]) -> Plane:
    return 2 * _plane(1 - np.cos(np.pi * t), 0.5 - np.sin(np.pi * t)) + [-1, -0.2]


def _roll(t: Float[np.ndarray, "point"]) -> Plane:
    angle = 1.5 * np.pi * (1 + 2 * t)
    return angle[..., None] * _plane(np.cos(angle), np.sin(angle)) / 5


class _Checkerboard:
    """Uniform on the eight black squares, of side 2, of a board on [−4, 4]²."""

    def sample(self, rng: np.random.Generator, size: int) -> Plane:
        x = rng.random(size) * 4 - 2
        y = rng.random(size) - 2 * rng.integers(2, size=size) + np.floor(x) % 2
        return 2 * _plane(x, y)

    def oracle(self) -> UniformBoxes:
        lower = [(x, y) for x in (-4, -2, 0, 2) for y in (-4, -2, 0, 2) if (x + y) % 4 == 0]
        return UniformBoxes(lower, np.add(lower, 2))


PLANAR: dict[str, _Curves | _Checkerboard] = {
    "checkerboard": _Checkerboard(),
    "circles": _Curves((_circle(3.0), _circle(1.5)), 0.24, 300),
    "moons": _Curves((_upper_moon, _lower_moon), 0.2, 150),
    "8gaussians": _Curves(tuple(_point(k * np.pi / 4) for k in range(8)), 0.5 / 1.414, 1),
    "swissroll": _Curves((_roll,), 0.2, 400),
}
