"""Fitting a diffusion by SVI: the loop around NumPyro's ``svi.init`` and ``svi.update``. It knows no files.

One network evaluation a datum and update (:class:`~probdiff.AnalyticELBO` with ``steps="stratified_importance"``, the noise replaced by
what is known of it given z_n and the minibatch), minibatches drawn with replacement, an exponential moving average of the parameters, and
the choice of the averaged parameters that did best on validation data. Everything that decides the future of a fit is in its
:class:`FitState`.
"""

import hashlib
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, Real
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO
from tqdm import tqdm

from probdiff._checks import AnyArray, Number, Whole, require, require_count, require_key, require_type
from probdiff._frames import column_names
from probdiff._sharding import Devices, data_mesh, gather, replicate, shard, to_default_device
from probdiff.diffusion import Diffusion
from probdiff.elbo.analytic import AnalyticELBO
from probdiff.elbo.estimators import ESTIMATORS
from probdiff.elbo.objective import StepObjective
from probdiff.elbo.reverse_variance import optimal_variance
from probdiff.elbo.terms import bits_per_dim
from probdiff.programs.sites import PARAMS, Data
from probdiff.training.optimiser import build_optimiser
from probdiff.training.suitability import warn_of_unsuited

CHUNK = 100
VALIDATION_ROWS = 2**12  # network evaluations, with the same noise each time, which hardly counts in a comparison
VARIANCE_ROWS = 2**20  # network evaluations for the best reverse variances
MOST_SKIPPED = 10  # updates in a row, before a fit is given up


@typing.runtime_checkable
class CheckpointLike(Protocol):
    """What a fit is saved in, such as :class:`~probdiff.storage.Checkpoint`."""

    def load(self, template: "FitState") -> "FitState | None":
        """The saved state, of the structure of ``template``; None if there is none."""

    def save(self, state: "FitState") -> None:
        """Save a state."""


class FitState(NamedTuple):
    """All that decides the future of a fit.

    Attributes:
        svi: NumPyro's ``SVIState``: parameters, optimiser, average, key, and what the objective has learned.
        keys: Of the minibatches and of the noise of the validation.
        best: The averaged parameters that did best in validation so far.
        best_bound: Their bound on the validation data, nats per datum (−inf before the first validation).
        losses: Negative bound of each iteration's minibatch, nats per datum, shape ``(iteration,)``; NaN where the update
            was skipped. As the minibatch follows from its key and the iteration, this is the position in the data, too.
        validation: Rows of (iteration, bound on the validation data in nats per datum).
        settings: What was asked for, by name: a resumed fit must be asked for the same.
    """

    svi: tuple
    keys: tuple
    best: dict
    best_bound: jax.Array
    losses: np.ndarray
    validation: np.ndarray
    settings: dict[str, Any] | None


class Fit(NamedTuple):
    """A finished fit.

    Attributes:
        diffusion: The trained Diffusion: the averaged parameters; with validation data, the best of them.
        losses: Negative bound of each iteration's minibatch, nats per datum, shape ``(iteration,)``; NaN where the update was
            skipped, because the loss or a gradient was not finite.
        validation: Rows of (iteration, bound on the validation data in nats per datum).
        state: The :class:`FitState`, from which the fit can go on.
    """

    diffusion: Diffusion
    losses: np.ndarray
    validation: np.ndarray
    state: FitState

    def __repr__(self) -> str:
        """How far the fit has come, and the model."""
        return f"Fit of {len(self.losses)} updates: {_describe(self.diffusion, self.losses, self.validation)}\n{self.diffusion}"

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of :attr:`diffusion`, as :meth:`Diffusion.bind` takes them."""
        return {PARAMS: self.diffusion.unbind().trainable()}

    @property
    def skipped_updates(self) -> int:
        """How many updates were skipped."""
        return int(np.isnan(self.losses).sum())


def fit(
    diffusion: Diffusion,
    data: Data,
    *,
    iterations: Whole = 10_000,
    batch_size: Whole = 128,
    learning_rate: Number | optax.Schedule | optax.GradientTransformation = 1e-3,
    key: PRNGKeyArray | None = None,
    validation: Real[AnyArray, "held_out dim"] | None = None,
    validate_every: Whole = 500,
    elbo: ELBO | str | tuple[Callable, ELBO] | None = None,
    ema_decay: Number = 0.999,
    checkpoint: CheckpointLike | None = None,
    devices: Devices = None,
    progress: bool = True,
) -> Fit:
    """Fit a diffusion by SVI.

    Args:
        diffusion: The model, bound or not; it is not changed. A bound one is fitted further, from the parameters that it has.
        data: Training data as the user has it, an array of shape ``(datum, column)`` or a data frame.
        iterations: Number of SVI updates in all, those of a resumed fit included (which can be given more of them only with an
            optimiser of your own, see ``learning_rate``). An update whose loss or gradient is not finite
            changes nothing, and is reported.
        batch_size: Data per update, drawn with replacement.
        learning_rate: Peak of the learning rate, after a linear warm-up and before a cosine decay to 0 at ``iterations``, of Adam; convolutions
            have their updates orthogonalised (:func:`~probdiff.training.orthogonalised_convolutions`), and decay. Or a schedule of optax in the place of warm-up and decay,
            or an optimiser.
        key: JAX key; ``jax.random.key(0)`` if not given.
        validation: Held-out data. If given, the averaged parameters that do best on it, by an estimate on noise
            that stays the same, are the result.
        validate_every: Iterations between validations.
        elbo: A NumPyro ELBO, the name of one of :data:`~probdiff.ESTIMATORS`, or the pair (guide, ELBO) that it gives; if not given, ``AnalyticELBO(diffusion, steps="stratified_importance", points="batch")``, or without the
            ``points`` for a reverse kernel whose KL has no closed form.
        ema_decay: Decay of the parameter average.
        checkpoint: An object with ``load(template) -> FitState or None`` and ``save(state)``, such as
            :class:`~probdiff.storage.Checkpoint`; the fit begins where it left off, with the keys that it had, and saves every
            ``validate_every`` iterations, at the end and on Ctrl-C. With several processes, all load it and the first saves.
        devices: Number of devices (or a list of them) that share each minibatch; the state is on every one. What is fitted is what one
            device would fit, up to rounding, and can be resumed on any other number.
        progress: Show a progress bar with the running bound.

    Returns:
        A :class:`Fit`.

    Raises:
        ValueError, TypeError: If the data do not suit the model, an argument is out of range, or the model has
            nothing to train.
        FloatingPointError: If ten updates in a row had to be skipped; what the checkpoint holds is finite.
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.unbind()
    for name, value in (("iterations", iterations), ("batch_size", batch_size), ("validate_every", validate_every)):
        require_count(name, value)
    require(0 <= ema_decay < 1, "ema_decay", "0 <= ema_decay < 1", ema_decay)
    names = column_names(data)
    data = diffusion.read_data(data)
    validation = None if validation is None else diffusion.read_data(validation)
    require(
        jax.tree.leaves(diffusion.trainable()),
        "diffusion",
        "something to train (an equinox module with JAX arrays)",
        "a model without parameters",
    )
    warn_of_unsuited(diffusion, data, names)
    key = jax.random.key(0) if key is None else key
    require_key(key)
    optimiser = build_optimiser(learning_rate, iterations, ema_decay)
    mesh = data_mesh(devices)
    first_process = jax.process_index() == 0
    loop = _Loop(diffusion, data, batch_size, optimiser, elbo, mesh)
    own_optimiser, own_schedule = isinstance(learning_rate, optax.GradientTransformation), callable(learning_rate)
    settings: dict[str, Any] = {
        # The learning rate falls to 0 at the last iteration; with an optimiser of the user's, a fit can go on beyond.
        "iterations": None if own_optimiser or own_schedule else int(iterations),
        "batch_size": int(batch_size),
        "learning_rate": "an optax optimiser" if own_optimiser else "a schedule" if own_schedule else float(learning_rate),
        "validate_every": int(validate_every),
        "ema_decay": float(ema_decay),
        "elbo": elbo if isinstance(elbo, str) else type(loop.elbo).__name__,
        "data": _fingerprint(data),
        "validation": _fingerprint(validation),
    }
    quiet = not (progress and first_process)
    # The bar comes first: what follows is compiled.
    with tqdm(total=iterations, unit="it", desc="compiling", disable=quiet, mininterval=0.5) as bar:
        state = loop.init(key, settings)
        state = (checkpoint and checkpoint.load(state)) or state
        save = checkpoint.save if checkpoint is not None and first_process else _save_nothing
        for name, value in settings.items():
            saved = (state.settings or {})[name]
            require(saved == value, name, f"{saved}, as in the fit that the checkpoint is of", value)
        state = replicate(state, mesh)
        validation = None if validation is None else replicate(jnp.asarray(validation), mesh)
        saved = bar.initial = bar.n = len(state.losses)
        try:
            while (done := len(state.losses)) < iterations:
                stop = min(iterations, done + CHUNK, (done // validate_every + 1) * validate_every)
                new = loop.advance(state, stop - done)
                due = stop % validate_every == 0 or stop == iterations
                state = loop.validate(new, validation) if due and validation is not None else new
                if due:
                    save(to_default_device(state, mesh))
                    saved = stop
                bar.set_description_str("fitting", refresh=False)
                bar.set_postfix_str(_describe(diffusion, state.losses, state.validation), refresh=False)
                bar.update(stop - done)
        except (KeyboardInterrupt, FloatingPointError):
            if len(state.losses) > saved:
                save(to_default_device(state, mesh))
            raise
    state = to_default_device(state, mesh)
    fitted = diffusion.bind(state.best if len(state.validation) else loop.averaged(state.svi))
    if diffusion.kernel.is_estimated:
        size = min(len(data), max(2, VARIANCE_ROWS // diffusion.schedule.num_steps))
        row_key, noise_key = jax.random.split(state.keys[1])
        rows = np.asarray(jax.random.choice(row_key, len(data), (size,), replace=False))
        fitted = optimal_variance(fitted, jnp.asarray(np.asarray(data)[rows]), key=noise_key)
    return Fit(fitted, state.losses, state.validation, state)


def _save_nothing(state: FitState) -> None:
    pass


def _fingerprint(data: Any) -> str | None:
    """A few words that tell one array from another; None for None."""
    if data is None:
        return None
    data = np.ascontiguousarray(data)
    return f"{data.dtype} {data.shape} {hashlib.sha256(data).hexdigest()[:16]}"


def _describe(diffusion: Diffusion, losses: np.ndarray, validation: np.ndarray) -> str:
    """The bound of the last minibatches, and that on the validation data."""
    recent = losses[-CHUNK:]
    bounds = {"bound": -recent[np.isfinite(recent)].mean()} if np.isfinite(recent).any() else {}
    if len(validation):
        bounds["validation"] = validation[-1, 1]
    parts = [f"{name} {_figure(diffusion, value)}" for name, value in bounds.items()]
    skipped = int(np.isnan(losses).sum())
    return ", ".join(parts + [f"{skipped} updates skipped"] * (skipped > 0))


def _figure(diffusion: Diffusion, nats: Any) -> str:
    text = f"{nats:.2f} nats"
    if diffusion.likelihood.levels is None or diffusion.dim is None:
        return text
    return text + f" ({bits_per_dim(nats, diffusion.dim):.3f} bits/dim)"


def _all_finite(*trees: Any) -> jax.Array:
    """Whether all numbers are; as one array, because a reduction for each of many leaves takes seconds to compile."""
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(trees) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.isfinite(jnp.concatenate(leaves)).all()


def _guide_and_elbo(diffusion: Diffusion, elbo: ELBO | str | tuple[Callable, ELBO] | None) -> tuple[Callable, ELBO]:
    """The objective of a fit, and the guide that goes with it."""
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


class _Loop:
    """The compiled parts of a fit."""

    def __init__(
        self,
        diffusion: Diffusion,
        data: Any,
        batch_size: Whole,
        optimiser: optax.GradientTransformation,
        elbo: ELBO | str | tuple[Callable, ELBO] | None,
        mesh: Mesh | None,
    ) -> None:
        self.diffusion, self.batch_size, self.mesh = diffusion, batch_size, mesh
        self.data = replicate(jnp.asarray(data), mesh)
        guide, self.elbo = _guide_and_elbo(diffusion, elbo)
        model, guide = (handlers.scale(program, scale=1 / batch_size) for program in (diffusion.model, guide))
        self.svi = SVI(model, guide, optimiser, self.elbo)
        self._bound = jax.jit(self._validation_bound)
        self._advance = jax.jit(self._updates, static_argnames="guarded")

    def init(self, key: PRNGKeyArray, settings: dict[str, Any]) -> FitState:
        init_key, *keys = jax.random.split(key, 3)
        # Compiled, because it then computes no more than the state.
        svi = jax.jit(self.svi.init)(init_key, self.data[: self.batch_size])
        best_bound = jnp.full((), -jnp.inf, jnp.zeros(()).dtype)
        histories = np.zeros(0, best_bound.dtype), np.zeros((0, 2))
        return FitState(svi, tuple(keys), self.averaged(svi), best_bound, *histories, settings)

    def averaged(self, svi_state: Any) -> dict[str, Any]:
        return {PARAMS: optax.tree_utils.tree_get(svi_state.optim_state[1][1], "ema_params")[PARAMS]}

    def _rows(self, key: PRNGKeyArray, iteration: Any) -> jax.Array:
        """The rows of the data in a minibatch."""
        return jax.random.randint(jax.random.fold_in(key, iteration), (int(self.batch_size),), 0, len(self.data))

    def _updates(
        self, svi_state: Any, data: jax.Array, key: PRNGKeyArray, start: Any, count: Any, guarded: bool
    ) -> tuple[Any, jax.Array, jax.Array]:
        """``count`` updates: the state, the losses (and 0 up to ``CHUNK``) and whether all is finite; if ``guarded``, without those that
        are not."""

        def update(old: Any, iteration: Any) -> Any:
            return self.svi.update(old, shard(data[self._rows(key, iteration)], self.mesh))

        def update_if_finite(old: Any, iteration: Any) -> Any:
            new, loss = update(old, iteration)
            good = _all_finite(loss, new.optim_state, new.mutable_state)
            kept = jax.lax.cond(good, lambda: new._replace(rng_key=None), lambda: old._replace(rng_key=None))
            return kept._replace(rng_key=new.rng_key), jnp.where(good, loss, jnp.nan)

        def body(i: jax.Array, carry: Any) -> Any:
            state, losses = carry
            state, loss = (update_if_finite if guarded else update)(state, start + i)
            return state, losses.at[i].set(loss)

        # The number of updates is a value and not a shape, so that no other number is compiled again.
        new, losses = jax.lax.fori_loop(0, count, body, (svi_state, jnp.zeros(CHUNK)))
        good = guarded or _all_finite(losses, new.optim_state, new.mutable_state)
        return gather((new, losses, jnp.asarray(good)), self.mesh)

    def advance(self, state: FitState, count: Any) -> FitState:
        """The state after ``count`` updates more.

        What is not finite stays so: one look at the end says whether every update was good, and only if not, they are made again,
        with a look at each.
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
                rows = np.asarray(self._rows(key, first))
                raise FloatingPointError(
                    f"The loss or its gradient was not finite in {run} iterations in a row, the first of them "
                    f"iteration {first + 1}, on rows {rows[:8].tolist()}{' …' * (len(rows) > 8)} of the data"
                )

    def _validation_bound(self, params: Any, x: Data, key: PRNGKeyArray) -> jax.Array:
        trained = self.diffusion.bind(params).evaluated()
        particles = min(1024, -(-VALIDATION_ROWS // len(x)))
        elbo = AnalyticELBO(trained, "stratified", num_particles=particles, vectorize_particles=False)
        return -elbo.loss(key, {}, trained.model, trained.guide, x) / len(x)

    def validate(self, state: FitState, x: Data) -> FitState:
        params = self.averaged(state.svi)
        bound = self._bound(params, x, state.keys[1])
        row = np.array([[len(state.losses), float(bound)]])
        state = state._replace(validation=np.concatenate([state.validation, row]))
        return state._replace(best=params, best_bound=bound) if bound > state.best_bound else state
