r"""The reverse kernel :math:`p_\theta(z_{n-1} | z_n)`: what the model makes of the network's noise prediction."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from probdiff.checks import require, require_step
from probdiff.gaussians import isotropic_normal
from probdiff.schedules import at_step

REVERSE_VARIANCES = {
    "posterior": lambda schedule: schedule.posterior_variance,
    "forward": lambda schedule: schedule.beta,
}


@dataclasses.dataclass(frozen=True)
class GaussianKernel:
    r"""Gaussian reverse steps of fixed variance.

    :math:`p_\theta(z_{n-1} | z_n) = N(\mu_\theta, v_n I)` with
    :math:`\mu_\theta = (z_n - \beta_n / \sqrt{1-\bar\alpha_n}\, \hat\epsilon) / \sqrt{\alpha_n}`. At n = 1 it is the
    Gaussian that the likelihood reads, with :math:`v_1 = \beta_1` in both cases.
    Source: Ho et al. (2020), arXiv:2006.11239, section 3.2 and eq. 11.

    Args:
        reverse_variance: ``"posterior"``, :math:`v_n = \tilde\beta_n`, or ``"forward"``, :math:`v_n = \beta_n`.
    """

    reverse_variance: str

    def __post_init__(self):
        require(
            self.reverse_variance in REVERSE_VARIANCES,
            "reverse_variance",
            f"one of {sorted(REVERSE_VARIANCES)}",
            repr(self.reverse_variance),
        )

    def variance(self, schedule):
        r"""The table :math:`v_n`, shape ``(num_steps,)``, float64."""
        chosen = REVERSE_VARIANCES[self.reverse_variance](schedule)
        return np.concatenate([schedule.beta[:1], chosen[1:]])

    def __call__(self, schedule, z, eps_hat, n):
        r"""The distribution of :math:`z_{n-1}` given :math:`z_n` and the predicted noise.

        Args:
            schedule: The noise schedule.
            z: :math:`z_n`, shape ``(*batch, dim)``.
            eps_hat: Predicted noise, same shape.
            n: Step, 1 ≤ n ≤ N, an integer or an integer array that broadcasts to ``batch``.
        """
        require_step(n, 1, schedule.num_steps)
        per_eps = at_step(schedule.beta / np.sqrt(schedule.one_minus_alpha_bar), n, z.dtype)
        per_z = at_step(1 / np.sqrt(schedule.alpha), n, z.dtype)
        loc = per_z[..., None] * (z - per_eps[..., None] * eps_hat)
        return isotropic_normal(loc, at_step(self.variance(schedule), n, z.dtype))

    def step_kl(self, schedule, eps, eps_hat, n):
        r"""KL of one reverse step, :math:`KL[q(z_{n-1} | z_n, x_0) \| p_\theta(z_{n-1} | z_n)]`, in closed form.

        It equals :math:`w_n \|\epsilon - \hat\epsilon\|^2` with
        :math:`w_n = \beta_n^2 / (2 v_n \alpha_n (1-\bar\alpha_n))`, plus
        :math:`\tfrac{d}{2} (\tilde\beta_n / v_n - 1 - \log \tilde\beta_n / v_n)` where the variances differ. Computed
        from :math:`\epsilon - \hat\epsilon`: the difference of the two means would cancel in float32.
        Source: Ho et al. (2020), arXiv:2006.11239, eqs. 8 to 12.

        Args:
            schedule: The noise schedule.
            eps: The noise in :math:`z_n`, shape ``(*batch, dim)``.
            eps_hat: Its prediction, same shape.
            n: Step, 2 ≤ n ≤ N; n = 1 is the reconstruction term.

        Returns:
            KL in nats, summed over ``dim``, shape ``batch``.

        Raises:
            ValueError: If n is outside [2, N]; TypeError if it is not an integer.
        """
        require_step(n, 2, schedule.num_steps)
        constant = at_step(self.constant(schedule), n, eps.dtype) * eps.shape[-1]
        return at_step(self.weight(schedule), n, eps.dtype) * jnp.square(eps - eps_hat).sum(-1) + constant

    def weight(self, schedule):
        r"""The table :math:`w_n`, shape ``(num_steps,)``, float64.

        At n = 1 it weighs the squared error in the log-density of x_0: :math:`w_1 = 1 / (2 \alpha_1)`.
        """
        return schedule.beta**2 / (2 * self.variance(schedule) * schedule.alpha * schedule.one_minus_alpha_bar)

    def constant(self, schedule):
        """The KL per dimension of a step whose noise is predicted exactly (0 at n = 1), ``(num_steps,)``, float64."""
        ratio = schedule.posterior_variance[1:] / self.variance(schedule)[1:]
        return np.concatenate([[0.0], (ratio - 1 - np.log(ratio)) / 2])
