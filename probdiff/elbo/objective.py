"""A sum of one term per step as a NumPyro program and as an objective for ``SVI``; the analytic bound is one.

The estimate of the bound of one datum is its noise-free bound (see :mod:`probdiff.elbo.analytic`) minus

    Σ_rows [excess_n − c_n · control_n] / p_n   +   Σ_n c_n E[control_n]

over the rows (n, ε) that were drawn for it. Which rows, what noise and what control variate are the three parts that an
estimator is put together from.
"""

import copy
import functools
import warnings
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.primitives import Messenger, mutable

from probdiff._checks import is_trainable, require, require_count, require_type
from probdiff._chunks import even_chunk, inputs_at_once, sum_in_chunks
from probdiff.chain.learned import LearnedSchedule
from probdiff.chain.schedules import at_step, per_step
from probdiff.diffusion import Diffusion
from probdiff.elbo.steps import PROBABILITIES, AllSteps, Learner, OneStep, independent_uniforms, stratified_uniforms
from probdiff.elbo.variance_reduction import NOISE, LinearControl, PathNoise, PosteriorNoise, RowNoise
from probdiff.programs.sites import minibatch

LEARNED = "diffusion$learned"

STEPS = {
    "all": AllSteps(),
    "uniform": OneStep(independent_uniforms),
    "stratified": OneStep(stratified_uniforms),
    "importance": OneStep(independent_uniforms, learned=True),
    "stratified_importance": OneStep(stratified_uniforms, learned=True),
}


CONTROLS = {None: None, "linear": LinearControl}


class StepObjective(ELBO):
    """A sum over the steps of a term that depends on x_0, the noise and its prediction, as an objective for ``SVI``.

    The sum is itself a NumPyro program, :meth:`program`: its only log density is one ``factor``. The loss is
    ``Trace_ELBO`` on that program and an empty guide. A subclass says what the terms are: its ``term`` is an object like
    :class:`~probdiff.elbo.analytic.BoundTerm`. The estimate is put together from three parts:

    Args:
        diffusion: The model. ``SVI`` must be given this model's ``model``, and its ``guide`` or ``posterior_guide``, or
            this objective's :attr:`guide`; ``handlers.scale`` by a number may be wrapped around both alike.
        steps: ``"all"``: every step, N network evaluations a datum. Otherwise one step n a datum, the term divided by its
            probability: ``"uniform"`` on 1 … N; ``"stratified"``: the same, spread evenly over the data of the batch;
            ``"importance"``: from probabilities that are learned; ``"stratified_importance"``: both.
        noise: ``"independent"``; ``"antithetic"``: each term twice, with ε and −ε; ``"path"``: that of one path
            z_1 … z_N of the forward chain (all steps only).
        control: ``"linear"`` subtracts a control variate, the excess of the best linear prediction of the noise
            (:mod:`probdiff.elbo.variance_reduction`), with a coefficient that is learned (with all steps: 1); None subtracts nothing.
        points: None, or the data whose mean bound is wanted (the whole training set, say), shape ``(point, dim)``: the
            noise in each step KL is then replaced by its mean and variance over all the points that z_n may come from.
            The estimate is right for the mean over ``points`` when ``x`` is drawn from them, not for a single datum.
            ``"batch"``: the points are ``x`` itself.
        adapt_to: What is kept quiet by what is learned: ``"gradient"`` (for training) or ``"value"`` of the bound.
        schedule_loss: What the shape of a :class:`~probdiff.LearnedSchedule` is trained for: ``"bound"``, like everything else, or
            ``"variance"``: the least variance of the estimate between steps and draws (its ends still raise the bound). Costs a second
            evaluation of the network. Source: Kingma et al. (2021), arXiv:2107.00630, section 5.1 and appendix I.2.
        num_particles: Independent estimates to average, as in NumPyro.
        vectorize_particles: As in NumPyro.

    What is learned is a ``mutable`` site, which ``SVI`` carries in its state if it is given :attr:`guide` for a guide;
    otherwise it stays at its initial guess (which is right, but not the best) and a warning says so.

    With many rows the loss can be differentiated with respect to the parameters, not the data.

    Raises:
        ValueError: In the constructor if an option is not one of those; in use, if the model or the guide that
            ``SVI`` was given is not this model's.
    """

    def __init__(
        self,
        diffusion,
        steps="all",
        *,
        noise="independent",
        control=None,
        points=None,
        adapt_to="gradient",
        schedule_loss="bound",
        num_particles=1,
        vectorize_particles=True,
    ):
        require_type("diffusion", diffusion, Diffusion)
        for name, value, known in (
            ("steps", steps, STEPS),
            ("noise", noise, NOISE),
            ("control", control, CONTROLS),
            ("adapt_to", adapt_to, PROBABILITIES),
            ("schedule_loss", schedule_loss, SCHEDULE_LOSSES),
        ):
            found = (value is None or isinstance(value, str)) and value in known
            require(found, name, f"one of {list(known)}", repr(value))
        require(noise != "path" or steps == "all", "noise", "steps='all' with noise='path'", f"steps={steps!r}")
        require_count("num_particles", num_particles)
        learned_shape = isinstance(diffusion.schedule, LearnedSchedule) and steps != "all"
        require(schedule_loss == "bound" or learned_shape, "schedule_loss", "a LearnedSchedule and one step a datum for 'variance'", repr(schedule_loss))
        super().__init__(num_particles, vectorize_particles)
        self.diffusion = diffusion
        self.adapt_to = adapt_to
        self.schedule_loss = schedule_loss
        self._steps = STEPS[steps]
        self._noise, self._copies = NOISE[noise]
        self._control = CONTROLS[control]
        self._points = points
        kernel = type(diffusion.kernel).__name__
        require(points is None or diffusion.kernel.closed_form, "points", f"None with a {kernel}", f"{points!r:.40}")
        if isinstance(points, str):
            require(points == "batch", "points", "an array, 'batch' or None", repr(points))
        elif points is not None:
            try:
                diffusion.check_data(points)
            except (ValueError, TypeError) as error:
                raise type(error)(f"points: {error}") from None
            self._points = diffusion.likelihood.encode(points)
        self._learner = None
        if isinstance(self._steps, OneStep) and (self._steps.learned or self._control is not None):
            weight = per_step(np.asarray(self.term.kl_weight(diffusion), np.float64))
            self._learner = Learner(diffusion.schedule.fixed(), tuple(weight.tolist()), self._steps.uniforms is stratified_uniforms)
        self._trace_elbo = Trace_ELBO()

    @property
    def initial_state(self):
        """The state that learning starts from, by site, as ``SVIState.mutable_state`` holds it; empty if nothing is learned."""
        return {} if self._learner is None else {LEARNED: self._learner.initial()}

    def adapted_to(self, purpose):
        """This objective with another ``adapt_to``; what it learns is the same."""
        require(purpose in PROBABILITIES, "purpose", f"one of {list(PROBABILITIES)}", repr(purpose))
        other = copy.copy(self)
        other.adapt_to = purpose
        return other

    def of(self, diffusion):
        """This objective for the same model bound or not; what it learns is the same."""
        other = copy.copy(self)
        other.diffusion = diffusion
        return other

    @property
    def evaluations(self):
        """Network evaluations for each datum and particle."""
        return self._steps.num_rows(self.diffusion.schedule.num_steps) * self._copies

    def guide(self, x, num_data=None):
        """``diffusion.guide``, with the site that holds what this objective has learned (if it learns anything)."""
        if self._learner is not None:
            mutable(LEARNED, self._learner.initial())
        self.diffusion.guide(x, num_data)

    def program(self, x, num_data=None):
        """The bound on ``x`` as a NumPyro program; arguments as for :meth:`Diffusion.model`.

        Sites: ``param`` of the model; ``deterministic`` ``noise_free_bound`` and ``excess``, shape ``(datum,)``, whose difference
        is the estimate of each datum's bound; ``factor`` ``elbo``; and ``mutable``, what is learned.
        """
        self.diffusion.check_data(x)
        with_params = self.diffusion.from_param_site()
        diffusion = SCHEDULE_LOSSES[self.schedule_loss](with_params).tabulated()
        x = jnp.asarray(x)
        x0 = diffusion.likelihood.encode(x)
        learned = None if self._learner is None else mutable(LEARNED, self._learner.initial())
        key = numpyro.prng_key()
        rows = self._rows(diffusion, x, x0, key, learned)
        total, per_datum, seen = sum_terms(diffusion, rows)
        if rows.control is not None:
            expected = rows.control.expected(rows.coefficient, x0)
            total, per_datum = total + expected.sum(), per_datum + expected
        if learned is not None:
            learned.update(self._learner.updated(learned, *seen()))
        top = numpyro.deterministic("noise_free_bound", self.term.noise_free_bound(diffusion, x, x0))
        numpyro.deterministic("excess", per_datum)
        with minibatch(x, num_data):
            numpyro.factor("elbo", top.sum() - total)
            if self.schedule_loss == "variance":
                numpyro.factor("variance", self._minus_variance(with_params, x, x0, key, learned))

    def _minus_variance(self, diffusion, x, x0, key, learned):
        """0, with the gradient of minus the mean square of the estimates with respect to the schedule's shape."""
        other = _with_trained_logits_only(diffusion).tabulated()
        rows = self._rows(other, x, x0, key, learned)
        values = rows.evaluate(other, jnp.arange(len(rows.n)))[0].sum(0)
        mean_square = jnp.square(values).sum() / jax.lax.stop_gradient(jnp.abs(values).mean())
        return jax.lax.stop_gradient(mean_square) - mean_square

    def _rows(self, diffusion, x, x0, key, learned):
        """Draw the steps and the noise."""
        step_key, noise_key, extra_key = jax.random.split(key, 3)
        num_steps = diffusion.schedule.num_steps
        # The mean of the control is exact whatever the schedule: it need not be differentiated.
        control = None if self._control is None else jax.lax.stop_gradient(self._control(diffusion, x0))
        coefficient, probability = jnp.full(num_steps, 0.0 if control is None else 1.0, x0.dtype), None
        if learned is not None:
            if control is not None:
                coefficient = self._learner.coefficient(learned).astype(x0.dtype)
            if self._steps.learned:
                probability = self._learner.probability(learned, self.adapt_to, coefficient)
        n, inverse_probability = self._steps.draw(step_key, len(x), num_steps, probability)
        n, inverse_probability = (
            jnp.repeat(each, self._copies, 0) for each in (n, inverse_probability.astype(x0.dtype) / self._copies)
        )
        points = x0 if isinstance(self._points, str) else self._points
        return SampledTerms(
            term=self.term,
            n=n,
            inverse_probability=inverse_probability,
            noise=self._noise(noise_key, diffusion, x0),
            conditional_noise=None if points is None else PosteriorNoise(points),
            control=control,
            coefficient=coefficient,
            x=x,
            x0=x0,
            network_key=diffusion.training_key(x),
            extra_key=extra_key,
        )

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """Minus the bound, summed over the data; called by ``SVI``."""
        scales, _ = _scales_around(model, "model", (self.diffusion.model,))
        guides = (self.diffusion.guide, self.diffusion.posterior_guide, self.guide)
        guide_scales, own_guide = _scales_around(guide, "guide", guides)
        require(
            len(scales) == len(guide_scales) and all(map(_same, scales, guide_scales)),
            "guide",
            f"the same handlers.scale as around the model, {scales}",
            guide_scales,
        )
        program = self.program
        for scale in reversed(scales):
            program = handlers.scale(program, scale=scale)
        carried = LEARNED in param_map
        # (svi.evaluate does not pass the state on; that is no reason to warn.)
        if self._learner is not None and not carried and own_guide.__self__ is not self:
            warnings.warn(
                f"{type(self).__name__} learns nothing, because SVI does not carry its state: give SVI the guide of this "
                "objective, SVI(diffusion.model, objective.guide, optim, objective)",
                stacklevel=2,
            )

        def one(key):
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
            # Each particle's state is the old one decayed, plus what it has seen: their mean is of that form, too.
            loss, state = jax.tree.map(lambda each: each.mean(0), particles)
        return {"loss": loss, "mutable_state": state}

    def per_datum(self, rng_key, x, learned=None):
        """The estimate of each datum's bound, in nats, shape ``(datum,)``, at the parameters that the model holds, dropout off.

        Args:
            rng_key: JAX key.
            x: Data, shape ``(datum, dim)``.
            learned: What was learned, by site, as ``SVIState.mutable_state`` holds it; None for :attr:`initial_state`.
        """
        given = {name: dict(value) for name, value in (learned or {}).items()}
        program = self.of(self.diffusion.evaluated()).program
        trace = handlers.trace(handlers.seed(handlers.substitute(program, given), rng_key)).get_trace(x)
        return trace["noise_free_bound"]["value"] - trace["excess"]["value"]


class SampledTerms(eqx.Module):
    """The sampled terms of one estimate: steps and inverse probabilities of shape ``(row, datum)``, their noise, and what is done with them."""

    term: Callable
    n: jax.Array
    inverse_probability: jax.Array
    noise: RowNoise | PathNoise
    conditional_noise: PosteriorNoise | None
    control: LinearControl | None
    coefficient: jax.Array
    x: jax.Array
    x0: jax.Array
    network_key: jax.Array | None
    extra_key: jax.Array

    def evaluate(self, diffusion, rows):
        """The corrected, weighted terms of some rows, shape ``(row, datum)``; and what can be learned from them."""
        n, eps = self.n[rows], self.noise(rows)
        key = None if self.network_key is None else jax.random.fold_in(self.network_key, rows[0])

        def extra_noise():
            return RowNoise(self.extra_key, self.x0, 1)(rows)

        step = diffusion.sampled_step(self.x, self.x0, n, eps, key, self.conditional_noise, extra_noise)

        def terms(prediction):
            return self.term(diffusion, step._replace(prediction=prediction))

        term = terms(step.prediction)
        control = jnp.zeros_like(term) if self.control is None else self.control.value(jax.lax.stop_gradient(step.z), n, eps)
        corrected = term - at_step(self.coefficient, n, term.dtype) * control
        return self.inverse_probability[rows] * corrected, functools.partial(_seen, n, self.inverse_probability[rows], term, control, terms, step.prediction)


def _seen(n, weight, term, control, terms, prediction):
    """The arguments of :meth:`Learner.updated` after the state."""
    gradient = jax.grad(lambda p: terms(p).sum())(prediction)
    seen = weight, term, control, jnp.square(gradient).sum(range(n.ndim, gradient.ndim))
    return n, *jax.tree.map(jax.lax.stop_gradient, seen)


def sum_terms(diffusion, rows):
    """The sum over rows and data, and that over rows of each datum; and, of one or two rows, what can be learned."""
    chunk = even_chunk(len(rows.n), max(2, inputs_at_once(diffusion.network) // len(rows.x)))
    if chunk < len(rows.n):
        return *sum_in_chunks(diffusion, rows, chunk), None
    values, seen = rows.evaluate(diffusion, jnp.arange(chunk))
    per_datum = values.sum(0)
    return per_datum.sum(), jax.lax.stop_gradient(per_datum), seen


def _with_fixed_logits(diffusion):
    return eqx.tree_at(lambda d: d.schedule.logits, diffusion, replace_fn=jax.lax.stop_gradient)


def _with_trained_logits_only(diffusion):
    """The model without any gradient but that of the shape of its schedule."""
    fixed = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if is_trainable(leaf) else leaf, diffusion)
    return eqx.tree_at(lambda d: d.schedule.logits, fixed, diffusion.schedule.logits)


SCHEDULE_LOSSES = {"bound": lambda diffusion: diffusion, "variance": _with_fixed_logits}


def _empty_guide(*args, **kwargs):
    pass


def _same(a, b):
    return a is b or bool(np.all(np.asarray(a) == np.asarray(b)))


def _scales_around(program, name, own):
    """The scales of the ``handlers.scale`` around one of the programs ``own``, outermost first; and which it is."""
    scales = []
    while isinstance(program, Messenger):
        require(
            type(program) is handlers.scale,
            name,
            "no handler but handlers.scale around it",
            f"handlers.{type(program).__name__}",
        )
        require(jnp.ndim(program.scale) == 0, name, "handlers.scale by a number", f"shape {jnp.shape(program.scale)}")
        scales.append(program.scale)
        program = program.fn
    mine = any(
        getattr(program, "__func__", None) is p.__func__ and getattr(program, "__self__", None) is p.__self__
        for p in own
    )
    names = " or ".join(
        f"{'diffusion' if isinstance(p.__self__, Diffusion) else 'objective'}.{p.__func__.__name__}" for p in own
    )
    require(mine, name, f"{names} of the Diffusion that the objective was given", f"{program!r:.80}")
    return scales, program
