"""A sum of one term per step as a NumPyro program and as an objective for ``SVI``; the analytic bound is such a sum.

The estimate of the bound of one datum is the noise-free bound (see :mod:`probdiff.elbo.analytic`) minus the sum of both parts of

    Σ_rows [excess_n − c_n · control_n] / p_n   +   Σ_n c_n E[control_n]

over the rows (n, ε) that were drawn for the datum, where p_n is the probability of a row and c_n the coefficient of its control variate. An estimator consists
of three parts: the choice of the steps, the noise, and the control variate.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.primitives import mutable

from probdiff._checks import PyTree, Whole, is_trainable, require, require_count, require_key, require_type
from probdiff._context import same_rows
from probdiff.chain.learned import LearnedSchedule
from probdiff.chain.schedules import per_step
from probdiff.diffusion import Diffusion
from probdiff.elbo.sampled_terms import AbstractTerm, SampledTerms, sum_terms
from probdiff.elbo.steps import PROBABILITIES, STEPS, AbstractSteps, Learner
from probdiff.elbo.variance_reduction import CONTROLS, NOISE, AbstractControl, AbstractNoise, PosteriorNoise
from probdiff.elbo.wrapped import same, unwrapped
from probdiff.programs.sites import minibatch

LEARNED = "diffusion$learned"

Learned = Mapping[str, Mapping[str, jax.Array]]


class StepObjective(ELBO):
    """A sum over the steps of a term that depends on x_0, the noise and the prediction of the noise, as an objective for ``SVI``.

    The sum is itself a NumPyro program, :meth:`program`, with one ``factor`` as its log density. The loss is
    ``Trace_ELBO`` on that program and an empty guide.

    Args:
        diffusion: The model. ``SVI`` must be given the ``model`` of this Diffusion, or of one that differs by its parameters, and
            its ``guide`` or ``posterior_guide``, or this objective's :attr:`guide`; ``handlers.scale`` (by a number, or one for each
            datum) and ``handlers.mask`` may be wrapped around both alike.
        term: The term that is summed over the steps, an :class:`AbstractTerm`.
        steps, noise, control, points, adapt_to, schedule_loss, num_particles, vectorize_particles: As for :class:`~probdiff.AnalyticELBO`.

    The learned probabilities and coefficients are a ``mutable`` site, which ``SVI`` carries in its state if its guide is :meth:`guide`;
    otherwise they keep their initial values (the estimate is unbiased, but its variance is not the least), and a warning says so.

    If the rows are evaluated in several chunks, the loss can be differentiated with respect to the parameters, but not with respect to the data.

    Raises:
        ValueError: In the constructor, if an option has none of these values; in use, if ``SVI`` was given the model or
            the guide of another Diffusion.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        term: AbstractTerm,
        steps: AbstractSteps | str = "all",
        *,
        noise: AbstractNoise | str = "independent",
        control: type[AbstractControl] | str | None = None,
        points: np.ndarray | jax.Array | Literal["batch"] | None = None,
        adapt_to: str = "gradient",
        schedule_loss: str = "bound",
        num_particles: Whole = 1,
        vectorize_particles: bool = True,
    ):
        require_type("diffusion", diffusion, Diffusion)
        self.term = term
        self._steps = named("steps", steps, STEPS, lambda value: isinstance(value, AbstractSteps))
        self._noise = named("noise", noise, NOISE, lambda value: isinstance(value, AbstractNoise))
        self._control = named(
            "control", control, CONTROLS, lambda value: isinstance(value, type) and issubclass(value, AbstractControl)
        )
        path = self._noise.needs_all_steps
        require(not (path and self._steps.is_random), "noise", "steps='all' with noise='path'", f"steps={steps!r}")
        for name, value, known in (
            ("adapt_to", adapt_to, PROBABILITIES),
            ("schedule_loss", schedule_loss, SCHEDULE_LOSSES),
        ):
            require(isinstance(value, str) and value in known, name, f"one of {list(known)}", repr(value))
        require_count("num_particles", num_particles)
        learned_shape = isinstance(diffusion.schedule, LearnedSchedule) and self._steps.is_random
        expected = "a LearnedSchedule and one step a datum for 'variance'"
        require(schedule_loss == "bound" or learned_shape, "schedule_loss", expected, repr(schedule_loss))
        super().__init__(num_particles, vectorize_particles)
        self.diffusion = diffusion
        self.adapt_to = adapt_to
        self.schedule_loss = schedule_loss
        self._points = _encoded_points(diffusion, points)
        self._learner = None
        if self._steps.is_random and (self._steps.is_learned or self._control is not None):
            weight = per_step(np.asarray(self.term.kl_weight(diffusion), np.float64))
            self._learner = Learner(diffusion.schedule.fixed(), tuple(weight.tolist()), self._steps.is_stratified)
        self._trace_elbo = Trace_ELBO()

    @property
    def initial_state(self) -> dict[str, dict[str, jax.Array]]:
        """The initial state of the learned probabilities and coefficients, by site, as in ``SVIState.mutable_state``; empty if nothing is learned."""
        return {} if self._learner is None else {LEARNED: self._learner.initial()}

    def adapted_to(self, purpose: str) -> "StepObjective":
        """This objective with another ``adapt_to``; the learned state has the same meaning."""
        require(purpose in PROBABILITIES, "purpose", f"one of {list(PROBABILITIES)}", repr(purpose))
        other = copy.copy(self)
        other.adapt_to = purpose
        return other

    def of(self, diffusion: Diffusion) -> "StepObjective":
        """This objective for the same model at other parameters, bound or not; the learned state has the same meaning."""
        other = copy.copy(self)
        other.diffusion = diffusion
        return other

    @property
    def evaluations(self) -> int:
        """Network evaluations for each datum and particle."""
        return self._steps.num_rows(self.diffusion.schedule.num_steps) * self._noise.copies

    @property
    def is_of_all_steps(self) -> bool:
        """Whether every step is evaluated for each datum; the estimates of different data are then independent."""
        return not self._steps.is_random

    @property
    def is_of_each_datum(self) -> bool:
        """Whether the bound of each datum is estimated; otherwise only the mean over the data is (``points``)."""
        return self._points is None

    def guide(self, x: Any, num_data: Any = None, *, context: Any = None) -> None:
        """``diffusion.guide``, with the site of the learned state, if there is one."""
        if self._learner is not None:
            mutable(LEARNED, self._learner.initial())
        self.diffusion.guide(x, num_data, context=context)

    def program(self, x: Any, num_data: Any = None, *, context: Any = None, weight: jax.Array | None = None) -> None:
        """The bound on ``x`` as a NumPyro program; arguments as for :meth:`~probdiff.Diffusion.model`.

        Sites: ``param`` of the model; ``deterministic`` ``noise_free_bound`` and ``excess``, shape ``(datum,)``, whose difference
        is the estimate of each datum's bound; ``factor`` ``elbo`` (and ``variance``, of value 0, for that ``schedule_loss``); and ``mutable``, the learned state.

        Args:
            x: Data, shape ``(datum, dim)``.
            num_data: Size of the full data set.
            context: Of a conditional model, a row for each datum.
            weight: The factor by which each datum's bound is multiplied, shape ``(datum,)``; 1 if not given.
        """
        given = self.diffusion.given(context)
        given.check_data(x)
        with_params = given.from_param_site()
        diffusion = SCHEDULE_LOSSES[self.schedule_loss](with_params).tabulated()
        x = jnp.asarray(x)
        x0 = diffusion.likelihood.encode(x)
        alike = weight is None or jnp.ndim(weight) == 0 or self._points is None or isinstance(self._points, str)
        require(alike, "points", "'batch' with a scale or mask by datum, or all data alike", "an array of points")
        weight = (
            jnp.ones(len(x), x0.dtype) if weight is None else jnp.broadcast_to(jnp.asarray(weight, x0.dtype), len(x))
        )
        learned: Any = None if self._learner is None else mutable(LEARNED, self._learner.initial())
        key = numpyro.prng_key()
        terms = self._sampled_terms(diffusion, x, x0, weight, key, learned)
        total, per_datum, seen = sum_terms(diffusion, terms)
        if terms.control is not None:
            expected = terms.control.expected(terms.coefficient, x0)
            total, per_datum = total + (weight * expected).sum(), per_datum + expected
        if self._learner is not None and seen is not None:
            learned.update(self._learner.updated(learned, *seen()))
        top = numpyro.deterministic("noise_free_bound", self.term.noise_free_bound(diffusion, x, x0))
        numpyro.deterministic("excess", per_datum)
        with minibatch(x, num_data):
            numpyro.factor("elbo", (weight * top).sum() - total)
            if self.schedule_loss == "variance":
                numpyro.factor("variance", self._minus_variance(with_params, x, x0, weight, key, learned))

    def _minus_variance(
        self, diffusion: Diffusion, x: jax.Array, x0: jax.Array, weight: jax.Array, key: jax.Array, learned: Any
    ) -> jax.Array:
        """0; its gradient with respect to the schedule's shape is proportional to the gradient of minus the mean square of the estimates."""
        other = _with_trained_logits_only(diffusion).tabulated()
        terms = self._sampled_terms(other, x, x0, weight, key, learned)
        values = terms.evaluate(other, jnp.arange(len(terms.n)))[0].sum(0)
        mean_square = (weight * jnp.square(values)).sum() / jax.lax.stop_gradient(jnp.abs(values).mean())
        return jax.lax.stop_gradient(mean_square) - mean_square

    def _sampled_terms(
        self, diffusion: Diffusion, x: jax.Array, x0: jax.Array, weight: jax.Array, key: jax.Array, learned: Any
    ) -> SampledTerms:
        """Draw the steps and the noise."""
        step_key, noise_key, extra_key = jax.random.split(key, 3)
        num_steps, copies = diffusion.schedule.num_steps, self._noise.copies
        # The mean of the control variate is exact for every schedule: it need not be differentiated.
        control = None if self._control is None else jax.lax.stop_gradient(self._control.fitted(diffusion, x0))
        coefficient, probability = jnp.full(num_steps, 0.0 if control is None else 1.0, x0.dtype), None
        if self._learner is not None:
            if control is not None:
                coefficient = self._learner.coefficient(learned).astype(x0.dtype)
            if self._steps.is_learned:
                probability = self._learner.probability(learned, self.adapt_to, coefficient)
        n, inverse_probability = self._steps.draw(step_key, len(x), num_steps, probability)
        return SampledTerms(
            term=self.term,
            n=jnp.repeat(n, copies, 0),
            inverse_probability=jnp.repeat(inverse_probability.astype(x0.dtype) / copies, copies, 0),
            weight=weight,
            noise=self._noise.draw(noise_key, diffusion.schedule, x0),
            conditional_noise=self._known_noise(x0, weight, diffusion.context),
            control=control,
            coefficient=coefficient,
            x=x,
            x0=x0,
            network_key=diffusion.training_key(x),
            extra_key=extra_key,
        )

    def _known_noise(self, x0: jax.Array, weight: jax.Array, context: PyTree) -> PosteriorNoise | None:
        """The conditional distribution of the noise, from the points; if these are the batch, they have the weights of its terms."""
        if self._points is None:
            return None
        if not isinstance(self._points, str):
            return PosteriorNoise(self._points)
        if context is None:
            # (Where all weights are 0, the sum is 0 in any case.)
            return PosteriorNoise(x0, jnp.log(jnp.where(weight.any(), weight, 1)))
        of_same = jnp.log(jnp.where(weight[:, None] > 0, weight, 1))
        return PosteriorNoise(x0, jnp.where(same_rows(context), of_same, -jnp.inf))

    def loss_with_mutable_state(
        self, rng_key: jax.Array, param_map: Mapping[str, Any], model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Minus the bound, summed over the data; called by ``SVI``."""
        own_model, scale, weight = unwrapped(model, "model")
        own_guide, guide_scale, guide_weight = unwrapped(guide, "guide")
        alike = all(map(same, (scale, weight), (guide_scale, guide_weight)))
        require(alike, "guide", "the same handlers.scale and handlers.mask as around the model", "others")
        diffusion = self._owner(own_model, "model", "diffusion.model")
        guides = "diffusion.guide or diffusion.posterior_guide or objective.guide"
        self._owner(own_guide, "guide", guides)
        program = handlers.scale(functools.partial(self.of(diffusion).program, weight=weight), scale=scale)
        carried = LEARNED in param_map
        # (svi.evaluate does not pass the state on; that needs no warning.)
        if self._learner is not None and not carried and getattr(own_guide, "__self__", None) is not self:
            warnings.warn(
                f"{type(self).__name__} learns nothing, because SVI does not carry its state: give SVI the guide of this "
                "objective, SVI(diffusion.model, objective.guide, optim, objective)",
                stacklevel=2,
            )

        def one(key: jax.Array) -> tuple[jax.Array, Any]:
            # A copy, because the program changes the state in place.
            own = {LEARNED: dict(param_map[LEARNED])} if carried else {}
            result = self._trace_elbo.loss_with_mutable_state(
                key, {**param_map, **own}, program, _empty_guide, *args, **kwargs
            )
            return result["loss"], result["mutable_state"] if carried else None

        if self.num_particles == 1:
            loss, state = one(rng_key)
        else:
            particles = self.vectorize_particles_fn(one, jax.random.split(rng_key, self.num_particles))
            # Each particle's state is the old state, decayed, plus its own sums: the mean over particles has the same form.
            loss, state = jax.tree.map(lambda each: each.mean(0), particles)
        return {"loss": loss, "mutable_state": state}

    def _owner(self, program: Callable[..., Any], name: str, expected: str) -> Diffusion:
        """The Diffusion that a program is a method of, which must differ from this objective's by its parameters only."""
        owner, method = getattr(program, "__self__", None), getattr(program, "__name__", None)
        methods = [each.rpartition(".")[2] for each in expected.split(" or ") if not each.startswith("objective")]
        if isinstance(owner, StepObjective) and name == "guide" and method == "guide":
            owner, methods = owner.diffusion, ["guide"]
        if isinstance(owner, Diffusion) and method in methods and owner.is_like(self.diffusion):
            return owner
        raise ValueError(
            f"{name}: Expected {expected} of the Diffusion that the objective was given; got {program!r:.80}"
        )

    def per_datum(self, rng_key: jax.Array, x: Any, learned: Learned | None = None) -> jax.Array:
        """The estimate of each datum's bound, in nats, shape ``(datum,)``, at the parameters that the model holds, dropout off.

        Args:
            rng_key: JAX key.
            x: Data, shape ``(datum, dim)``.
            learned: The learned state, by site, as in ``SVIState.mutable_state``; None for :attr:`initial_state`.
        """
        return self.per_datum_and_learned(rng_key, x, learned)[0]

    def per_datum_and_learned(
        self, rng_key: jax.Array, x: Any, learned: Learned | None = None
    ) -> tuple[jax.Array, Learned]:
        """:meth:`per_datum`, and the learned state after it. Arguments are the same."""
        require_key(rng_key)
        # Copies, because the program changes the state in place.
        given = {name: dict(value) for name, value in (learned or self.initial_state).items()}
        program = self.of(self.diffusion.evaluated()).program
        trace = handlers.trace(handlers.seed(handlers.substitute(program, given), rng_key)).get_trace(x)
        return trace["noise_free_bound"]["value"] - trace["excess"]["value"], given


def named(name: str, value: Any, known: Mapping[Any, Any], is_part: Callable[[Any], bool]) -> Any:
    """A part, given as an object or by its name.

    Raises:
        ValueError: If ``value`` is neither.
    """
    if is_part(value):
        return value
    found = (value is None or isinstance(value, str)) and value in known
    require(found, name, f"one of {list(known)} or an object in its place", repr(value))
    return known[value]


def _encoded_points(diffusion: Diffusion, points: Any) -> Any:
    kernel = diffusion.kernel.name
    require(points is None or diffusion.kernel.closed_form, "points", f"None with a {kernel}", f"{points!r:.40}")
    of_context = points is None or isinstance(points, str) or not diffusion.is_conditional
    require(of_context, "points", "'batch' or None of a conditional model", f"{points!r:.40}")
    if points is None or isinstance(points, str):
        require(points in (None, "batch"), "points", "an array, 'batch' or None", repr(points))
        return points
    try:
        points = diffusion.read_data(points)
    except (ValueError, TypeError) as error:
        raise type(error)(f"points: {error}") from None
    return diffusion.likelihood.encode(points)


def _logits(diffusion: Any) -> jax.Array:
    return diffusion.schedule.logits


def _with_fixed_logits(diffusion: Diffusion) -> Diffusion:
    return eqx.tree_at(_logits, diffusion, replace_fn=jax.lax.stop_gradient)


def _with_trained_logits_only(diffusion: Diffusion) -> Diffusion:
    """The model with all gradients stopped except the gradient for the shape of its schedule."""
    fixed = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if is_trainable(leaf) else leaf, diffusion)
    return eqx.tree_at(_logits, fixed, _logits(diffusion))


SCHEDULE_LOSSES: dict[str, Callable[[Diffusion], Diffusion]] = {"bound": lambda diffusion: diffusion, "variance": _with_fixed_logits}


def _empty_guide(*args: Any, **kwargs: Any) -> None:
    pass
