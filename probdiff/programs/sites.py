r"""The common parts of the programs: sites, minibatches, and the refusal of given paths by the forward guide.

All programs have the latent site ``z``, of shape ``(num_steps, datum, dim)`` in the model's order: index 0 is z_N and the last index is
z_1. The model also has the site ``x``. Both sit in the plate ``data``. The ``param`` site is :data:`PARAMS`.
"""

import abc
import operator
import traceback
from typing import Any, NoReturn

import equinox as eqx
import numpy as np
import numpyro
from jaxtyping import Array, Float, Integer, PRNGKeyArray, Real
from numpyro import distributions as dist
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import SVI
from numpyro.primitives import Messenger

from probdiff._checks import GAPS, AnyArray, PyTree, Step, Whole, is_concrete, require
from probdiff._context import EXPECTED, num_rows
from probdiff._frames import is_frame
from probdiff.chain.reverse import AbstractKernel
from probdiff.chain.schedules import AbstractSchedule
from probdiff.likelihoods import AbstractLikelihood

PARAMS = "diffusion$params"

Data = Real[AnyArray, "datum column"]
Size = Whole | Integer[Array, ""]  # of the full data set


class AbstractDiffusion(eqx.Module):
    """The interface of a model that the programs need; :class:`~probdiff.Diffusion` implements it."""

    schedule: eqx.AbstractVar[AbstractSchedule]
    kernel: eqx.AbstractVar[AbstractKernel]
    likelihood: eqx.AbstractVar[AbstractLikelihood]
    dim: eqx.AbstractVar[int | None]
    context: eqx.AbstractVar[PyTree]

    @property
    @abc.abstractmethod
    def is_conditional(self) -> bool:
        """Whether the model needs a context."""

    @abc.abstractmethod
    def given(self, context: Any) -> "AbstractDiffusion":
        """The model given a context; for None, the model itself."""

    @abc.abstractmethod
    def with_param_site(self) -> "AbstractDiffusion":
        """The model with its parameters from the ``param`` site, if it has one."""

    @abc.abstractmethod
    def guide_schedule(self) -> AbstractSchedule:
        """The schedule for a guide, with its parameters from the ``param`` site, if it has any."""

    @abc.abstractmethod
    def training_key(self, x: Data | None) -> PRNGKeyArray | None:
        """A key for the network while it is trained on ``x``; otherwise None."""

    @abc.abstractmethod
    def reverse_kernel(self, z: Float[AnyArray, "*batch dim"], n: Step, key: PRNGKeyArray | None = None) -> dist.Distribution:
        """The distribution of z_{n-1} given z_n; at n = 1, the Gaussian from which the likelihood is made."""

    def read_data(self, x: Data) -> Data:
        """Data as a checked array: arrays unchanged, data frames (pandas, polars, pyarrow) converted by the likelihood's ``read``.

        Raises:
            ValueError, TypeError: As for :meth:`check_data` and the likelihood's ``read``.
        """
        x = self.likelihood.read(x)
        self.check_data(x)
        return x

    def check_data(self, x: Data) -> None:
        """Refuse data of the wrong shape or kind.

        Raises:
            ValueError: If the shape is not ``(datum, column)`` with the columns of the model, the data are empty, not finite or off the grid, or the
                context is missing or has another number of rows.
            TypeError: If the data are no array, or a masked array, or the likelihood does not accept their dtype.
        """
        remedy = "; probdiff.datasets.split makes arrays of a data frame" if is_frame(x) else ""
        require(hasattr(x, "shape") and hasattr(x, "dtype"), "x", "an array", f"{type(x).__name__}{remedy}", TypeError)
        require(not isinstance(x, np.ma.MaskedArray), "x", f"complete data: {GAPS}", "a masked array", TypeError)
        require(len(x.shape) == 2, "x", f"shape (datum, {self.dim or 'dim'})", f"shape {tuple(x.shape)}")
        require(x.shape[0] > 0, "x", "at least one datum", f"shape {tuple(x.shape)}")
        dim = self.likelihood.encoded_dim(x.shape[1])
        encoded = "" if dim == x.shape[1] else f", which the likelihood encodes in {dim} dimensions"
        require(self.dim in (None, dim), "x", f"shape (datum, {self.dim})", f"shape {tuple(x.shape)}{encoded}")
        try:
            self.likelihood.check_data(x)
        except ValueError as error:
            if not (is_concrete(x) and x.dtype.kind == "f" and np.isnan(x).any()):
                raise
            raise ValueError(f"{error}: {GAPS}") from None
        self.require_context(len(x))

    def encode(self, x: Data | None) -> tuple[int, Float[Array, "datum dim"]]:
        """The number of data, and the encoded data, shape ``(datum, dim)``; the data are checked first."""
        require(x is not None, "x", "data: the guide needs x", "None")
        assert x is not None
        self.check_data(x)
        return len(x), self.likelihood.encode(x)

    def data_shape(self, x: Data | None, num_data: Size | None) -> tuple[int, int]:
        """The shape ``(datum, dim)`` of the data, or of the data to be drawn."""
        if x is not None:
            self.check_data(x)
            return x.shape[0], self.likelihood.encoded_dim(x.shape[1])
        if self.context is not None:
            rows = num_rows(self.context)
            require(num_data in (None, rows), "context", f"{num_data} rows, for as many draws", f"{rows} rows")
            num_data = rows
        require(num_data is not None, "num_data", "the number of data to draw, since x is None", "None")
        require(
            self.dim is not None,
            "dim",
            "Diffusion(…, dim=…) or a network with .dim, to know the dimension to generate",
            "neither",
        )
        assert num_data is not None and self.dim is not None
        self.require_context(operator.index(num_data))
        return operator.index(num_data), self.dim

    def require_context(self, num_data: int) -> None:
        """Refuse a missing context, or one with another number of rows, if the model is conditional."""
        if self.context is not None:
            rows = num_rows(self.context)
            remedy = " (one for all: jnp.repeat it)" if rows == 1 else ""
            require(rows == num_data, "context", f"as many rows as there are data, {num_data}", f"{rows} rows{remedy}")
        else:
            require(not self.is_conditional, "context", f"{EXPECTED}: the network takes context=", "None")


def require_plates(highest: int | None) -> None:
    """Refuse a user's plates around a program that cannot be inside them.

    Args:
        highest: The highest ``dim`` of a plate that the program can be in; None if it can be in no plate. Plates hidden by ``handlers.block`` do not
            count.

    Raises:
        NotImplementedError: If the program is inside such a plate.
    """
    around: list[numpyro.plate] = []
    for each in numpyro.primitives._PYRO_STACK:
        if isinstance(each, numpyro.plate):
            around.append(each)
        elif isinstance(each, numpyro.handlers.block):
            around = [plate for plate in around if not each.hide_fn({"type": "plate", "name": plate.name})]
    for plate in around if highest is None else [each for each in around if each.dim > highest]:
        expected = "no plate around a program that scans" if highest is None else f"a plate with dim={highest} or less"
        raise NotImplementedError(
            f"numpyro.plate: Expected {expected}; got {plate.name!r} with dim={plate.dim}. The programs have plates of their own, of the "
            "data (-1) and of the steps (-2). Several data sets are the rows of one x; the programs of ParallelPrograms(diffusion) also "
            "work inside of numpyro.plate(…, dim=-3), as independent copies"
        )


def svi_begins() -> bool:
    """Whether the program is run by NumPyro's ``SVI.init``; found from the call stack, as no NumPyro message contains it."""
    return any(frame.f_code is SVI.init.__code__ for frame, _ in traceback.walk_stack(None))


def minibatch(x: Data | None, num_data: Size | None) -> numpyro.handlers.scale:
    """The handler that scales the log densities of ``x``, a minibatch of ``num_data`` data, by ``num_data / len(x)``."""
    if x is None or num_data is None:
        return numpyro.handlers.scale(scale=1.0)
    require(
        not is_concrete(num_data) or num_data >= len(x),
        "num_data",
        f"at least {len(x)}, the size of the minibatch",
        num_data,
    )
    return numpyro.handlers.scale(scale=num_data / len(x))


class ForwardStep(dist.Normal):
    """A step of the forward guide: a normal whose KL divergence from a reverse step is refused, as it is not a term of the bound."""


@kl_divergence.register(ForwardStep, dist.Normal)
def _refuse_forward_kl(p: ForwardStep, q: dist.Normal) -> NoReturn:
    raise ValueError(
        "TraceMeanField_ELBO with the forward guide is biased: in the guide z_{n+1} depends on z_n, in the model z_n "
        "depends on z_{n+1}, and the KL of one to the other is not a term of the ELBO. "
        "Use SVI(diffusion.model, diffusion.posterior_guide, …), the same distribution in the model's order, or Trace_ELBO."
    )


def _gives_z(given: Any) -> bool:
    """Whether a substitution, which is a mapping or a function of a site, has a value for ``z``; True if that cannot be decided."""
    if not callable(given):
        return "z" in given
    site: dict[str, Any] = {"type": "sample", "name": "z", "value": None, "is_observed": False, "infer": {}, "kwargs": {}}
    try:
        return given(site) is not None
    except Exception:
        return True


class NoGivenPath(Messenger):
    """Refuses values given to ``z`` of the forward guide, where NumPyro's ``scan`` would pair them with the wrong steps."""

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """NumPyro's call for each message."""
        if msg["type"] == "control_flow":
            for kind, given in msg["kwargs"]["substitute_stack"]:
                if _gives_z(given):
                    raise ValueError(
                        f"The forward guide cannot take given values for 'z' (here by {kind}): scan runs its steps "
                        "upwards in time and would pair them with the wrong ones. Use diffusion.posterior_guide: it "
                        "has the same density on every path."
                    )
