"""The compiled parts of a fit: updates by NumPyro's ``svi.update``, and validation. It reads and writes no files."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO

from probdiff._checks import PyTree, Whole, require
from probdiff._chunks import take
from probdiff._devices import compiler_options, gather, replicate, shard
from probdiff.diffusion import Diffusion
from probdiff.elbo.analytic import AnalyticELBO
from probdiff.elbo.estimators import ESTIMATORS
from probdiff.elbo.objective import StepObjective
from probdiff.programs.sites import PARAMS, Data
from probdiff.training.minibatches import Minibatches

CHUNK = 100  # updates, between two checks of the results
VALIDATION_ROWS = 2**12  # network evaluations of a validation; the noise is the same each time, and hardly affects comparisons
MOST_SKIPPED = 10  # skipped updates in a row, after which a fit ends with an error


class FitState(NamedTuple):
    """The state of a fit, which determines all further updates.

    Attributes:
        svi: NumPyro's ``SVIState``: parameters, optimiser, average, key, and the learned state of the objective.
        keys: JAX keys of the minibatches and of the noise of the validation.
        best: The averaged parameters with the best validation bound so far.
        best_bound: Their bound on the validation data, nats per datum (−inf before the first validation).
        losses: Negative bound of each iteration's minibatch, nats per datum, shape ``(iteration,)``; NaN where the update
            was skipped. Its length is the number of iterations, which together with the key determines the next minibatch.
        validation: Rows of (iteration, bound on the validation data in nats per datum).
        settings: The arguments of the fit, by name: a resumed fit must have the same, or more iterations or minutes if it had ended. ``begun`` is
            the number of iterations before the optimiser was last initialised.

    Example:
        >>> import jax, probdiff
        >>> x = jax.random.normal(jax.random.key(0), (8, 2))
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(1), hidden=8, num_blocks=1))
        >>> state = probdiff.fit(diffusion, x, iterations=2, batch_size=4, progress=False).state
        >>> len(state.losses), state.settings["batch_size"]
        (2, 4)
    """

    svi: Any
    keys: tuple[PRNGKeyArray, ...]
    best: dict[str, Any]
    best_bound: jax.Array
    losses: np.ndarray
    validation: np.ndarray
    settings: dict[str, Any] | None


def _all_finite(*trees: Any) -> jax.Array:
    """Whether all numbers are finite. The leaves are joined to one array, because a reduction for each of many leaves takes seconds to compile."""
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(trees) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.isfinite(jnp.concatenate(leaves)).all()


def _guide_and_elbo(diffusion: Diffusion, elbo: ELBO | str | tuple[Callable[..., Any], ELBO] | None) -> tuple[Callable[..., Any], ELBO]:
    """The objective of a fit, and its guide."""
    if elbo is None:
        points: Literal["batch"] | None = "batch" if diffusion.kernel.closed_form else None
        elbo = AnalyticELBO(diffusion, steps="stratified_importance", points=points)
    if isinstance(elbo, str):
        require(elbo in ESTIMATORS, "elbo", f"a NumPyro ELBO or one of {', '.join(ESTIMATORS)}", repr(elbo))
        return ESTIMATORS[elbo](diffusion)
    if isinstance(elbo, tuple) and len(elbo) == 2 and callable(elbo[0]) and isinstance(elbo[1], ELBO):
        return elbo
    expected = "a NumPyro ELBO, the name of an estimator, or the pair that ESTIMATORS[name](diffusion) gives"
    got = f"the class {elbo.__name__}" if isinstance(elbo, type) else type(elbo).__name__
    require(isinstance(elbo, ELBO), "elbo", expected, got, TypeError)
    assert isinstance(elbo, ELBO)
    return elbo.guide if isinstance(elbo, StepObjective) else diffusion.posterior_guide, elbo


def _given(context: PyTree) -> dict[str, PyTree]:
    """The keyword arguments of the programs beside the data."""
    return {} if context is None else {"context": context}


class Loop:
    """The compiled parts of a fit.

    Args:
        diffusion: The model, not bound.
        data: Training data, checked, shape ``(datum, column)``.
        context: The context of each datum; None for a model without a context.
        minibatches: The rows of the data in each update.
        optimiser: An optimiser as returned by :func:`~probdiff.training.optimiser.build_optimiser`.
        elbo: The objective, as for :func:`~probdiff.fit`.
        mesh: The devices that share each minibatch.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        data: Any,
        context: PyTree,
        minibatches: Minibatches,
        optimiser: optax.GradientTransformation,
        elbo: ELBO | str | tuple[Callable[..., Any], ELBO] | None,
        mesh: Mesh | None,
    ) -> None:
        self.diffusion: Diffusion = diffusion
        self.minibatches: Minibatches = minibatches
        self.mesh: Mesh | None = mesh
        self.data: tuple[jax.Array, PyTree] = replicate((jnp.asarray(data), context), mesh)
        self.elbo: ELBO
        guide, self.elbo = _guide_and_elbo(diffusion, elbo)
        model, guide = (handlers.scale(program, scale=1 / minibatches.size) for program in (diffusion.model, guide))
        self.svi: SVI = SVI(model, guide, optimiser, self.elbo)
        options = compiler_options()
        self._bound = jax.jit(self._validation_bound, compiler_options=options)
        self._advance = jax.jit(self._updates, static_argnames="guarded", compiler_options=options)

    def init(self, key: PRNGKeyArray, settings: dict[str, Any]) -> FitState:
        """The state before the first update."""
        init_key, *keys = jax.random.split(key, 3)
        # Compiled, so that only the state is computed.
        x, context = take(self.data, slice(self.minibatches.size))
        svi = jax.jit(self.svi.init, compiler_options=compiler_options())(init_key, x, **_given(context))
        best_bound = jnp.full((), -jnp.inf, jnp.zeros(()).dtype)
        histories = np.zeros(0, best_bound.dtype), np.zeros((0, 2))
        return FitState(svi, tuple(keys), self.averaged(svi), best_bound, *histories, settings)

    def averaged(self, svi_state: Any) -> dict[str, Any]:
        """The averaged parameters, by site."""
        return {PARAMS: optax.tree_utils.tree_get(svi_state.optim_state[1][1], "ema_params")[PARAMS]}

    def result(self, state: FitState) -> dict[str, Any]:
        """The parameters that are the result so far, by site: the averaged parameters; with validation, the best of them."""
        return state.best if len(state.validation) else self.averaged(state.svi)

    def begin_anew(self, state: FitState) -> FitState:
        """The state at the beginning of another leg: the optimiser is initialised at the result so far, everything else continues."""
        return state._replace(svi=state.svi._replace(optim_state=self.svi.optim.init(self.result(state))))

    def paced(self, state: FitState, updates_left: Whole) -> FitState:
        """The state with the rest of the budget spread over so many updates (:func:`~probdiff.training.optimiser.scale_by_pace`)."""
        spent = optax.tree_utils.tree_get(state.svi.optim_state, "spent")
        paced = optax.tree_utils.tree_set(state.svi.optim_state, pace=(1 - spent) / updates_left)
        return state._replace(svi=state.svi._replace(optim_state=paced))

    def _updates(
        self, svi_state: Any, data: PyTree, key: PRNGKeyArray, start: Any, count: Any, guarded: bool
    ) -> tuple[Any, jax.Array, jax.Array]:
        """``count`` updates: the state, the losses (padded with 0 to ``CHUNK``) and whether all are finite; if ``guarded``, updates that
        are not finite are skipped."""

        def update(old: Any, iteration: Any) -> Any:
            rows = self.minibatches.rows(key, iteration)
            x, context = shard(take(data, rows), self.mesh)
            return self.svi.update(old, x, **_given(context))

        def update_if_finite(old: Any, iteration: Any) -> Any:
            new, loss = update(old, iteration)
            good = _all_finite(loss, new.optim_state, new.mutable_state)
            kept = jax.lax.cond(good, lambda: new._replace(rng_key=None), lambda: old._replace(rng_key=None))
            return kept._replace(rng_key=new.rng_key), jnp.where(good, loss, jnp.nan)

        def body(i: jax.Array, carry: Any) -> Any:
            state, losses = carry
            state, loss = (update_if_finite if guarded else update)(state, start + i)
            return state, losses.at[i].set(loss)

        # The number of updates is a value and not a shape, so that other numbers need no compilation.
        new, losses = jax.lax.fori_loop(0, count, body, (svi_state, jnp.zeros(CHUNK)))
        good = guarded or _all_finite(losses, new.optim_state, new.mutable_state)
        return gather((new, losses, jnp.asarray(good)), self.mesh)

    def advance(self, state: FitState, count: Any) -> FitState:
        """The state after ``count`` more updates.

        Values that are not finite stay so: one check at the end tells whether every update was finite. Only if not, the updates are made again,
        with a check of each.
        """
        start = len(state.losses)
        given = state.svi, self.data, state.keys[0], start, count
        svi_state, losses, good = self._advance(*given, guarded=False)
        if not good:
            svi_state, losses, _ = self._advance(*given, guarded=True)
        losses = np.concatenate([state.losses, np.asarray(losses)[:count]])
        self._refuse_many_skipped(losses, start, state.keys[0])
        return state._replace(svi=svi_state, losses=losses)

    def _refuse_many_skipped(self, losses: np.ndarray, start: Any, key: PRNGKeyArray) -> None:
        run = 0
        for iteration in range(max(0, start - MOST_SKIPPED), len(losses)):
            run = run + 1 if np.isnan(losses[iteration]) else 0
            if run == MOST_SKIPPED:
                first = iteration - run + 1
                rows = np.asarray(self.minibatches.rows(key, first))
                raise FloatingPointError(
                    f"The loss or its gradient was not finite in {run} iterations in a row, the first of them "
                    f"iteration {first + 1}, on rows {rows[:8].tolist()}{' …' * (len(rows) > 8)} of the data"
                )

    def _validation_bound(self, params: Any, x: Data, context: PyTree, key: PRNGKeyArray) -> jax.Array:
        trained = self.diffusion.bind(params).evaluated().with_context(context)
        particles = min(1024, -(-VALIDATION_ROWS // len(x)))
        elbo = AnalyticELBO(trained, "stratified", num_particles=particles, vectorize_particles=False)
        return -elbo.loss(key, {}, trained.model, trained.guide, x) / len(x)

    def validate(self, state: FitState, x: Data, context: PyTree) -> FitState:
        """The state with the bound of the averaged parameters on held-out data, and the averaged parameters kept if they are the best so far."""
        params = self.averaged(state.svi)
        bound = self._bound(params, x, context, state.keys[1])
        row = np.array([[len(state.losses), float(bound)]])
        state = state._replace(validation=np.concatenate([state.validation, row]))
        return state._replace(best=params, best_bound=bound) if bound > state.best_bound else state
