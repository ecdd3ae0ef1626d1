"""Fitting a diffusion by SVI: the loop around NumPyro's ``svi.init`` and ``svi.update``. It reads and writes no files.

An update needs one network evaluation for each datum (:class:`~probdiff.AnalyticELBO` with ``steps="stratified_importance"``, the noise replaced by its
conditional mean and variance given z_n and the minibatch). Minibatches are drawn with replacement and by weight; the parameters are averaged exponentially,
and the averaged parameters with the best bound on validation data are the result. The :class:`FitState` determines all further updates.
"""

import hashlib
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, Real
from numpyro.infer.elbo import ELBO
from tqdm import tqdm

from probdiff._checks import AnyArray, Number, Numbers, PyTree, Whole, require, require_count, require_key, require_type
from probdiff._chunks import take
from probdiff._context import named
from probdiff._devices import Devices, data_mesh, replicate, to_default_device
from probdiff._frames import column_names
from probdiff.diffusion import Diffusion
from probdiff.elbo.reverse_variance import optimal_variance
from probdiff.elbo.terms import bits_per_dim
from probdiff.programs.sites import PARAMS, Data
from probdiff.training.clock import Clock
from probdiff.training.loop import CHUNK, FitState, Loop
from probdiff.training.minibatches import Minibatches, read_weights
from probdiff.training.optimiser import build_optimiser
from probdiff.training.suitability import warn_of_raw_context, warn_of_unsuited

DEFAULT_ITERATIONS = 10_000
UNKNOWN = 2**31 - 1  # number of updates, before any was timed
VARIANCE_ROWS = 2**20  # network evaluations for the optimal reverse variances


@typing.runtime_checkable
class CheckpointLike(Protocol):
    """A place where a fit saves its state and resumes from it, such as a :class:`~probdiff.storage.Checkpoint`.

    Example:
        >>> import probdiff
        >>> class InMemory:
        ...     state = None
        ...     def load(self, template):
        ...         return self.state
        ...     def save(self, state):
        ...         self.state = state
        >>> isinstance(InMemory(), probdiff.training.CheckpointLike)  # probdiff.fit(…, checkpoint=InMemory())
        True
    """

    def load(self, template: "FitState") -> "FitState | None":
        """The saved state, of the structure of ``template``; None if there is none."""

    def save(self, state: "FitState") -> None:
        """Save a state."""


class Fit(NamedTuple):
    """A finished fit.

    Attributes:
        diffusion: The trained Diffusion, with the averaged parameters; with validation data, the averaged parameters with the best bound on these data.
        losses: Negative bound of each iteration's minibatch, nats per datum, shape ``(iteration,)``; NaN where the update was
            skipped, because the loss or a gradient was not finite.
        validation: Rows of (iteration, bound on the validation data in nats per datum).
        state: The :class:`FitState`, from which the fit can be continued.

    Example:
        >>> import jax, probdiff
        >>> x = jax.random.normal(jax.random.key(0), (8, 2))
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(1), hidden=8, num_blocks=1))
        >>> fit = probdiff.fit(diffusion, x, iterations=2, batch_size=4, progress=False)
        >>> fit.losses.shape, fit.skipped_updates
        ((2,), 0)
    """

    diffusion: Diffusion
    losses: np.ndarray
    validation: np.ndarray
    state: FitState

    def __repr__(self) -> str:
        """The number of iterations, the losses, and the model."""
        return f"Fit of {len(self.losses)} updates: {_describe(self.diffusion, self.losses, self.validation)}\n{self.diffusion}"

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of :attr:`diffusion`, in the form for :meth:`~probdiff.Diffusion.bind`."""
        return {PARAMS: self.diffusion.unbind().trainable()}

    @property
    def skipped_updates(self) -> int:
        """The number of skipped updates."""
        return int(np.isnan(self.losses).sum())


def fit(
    diffusion: Diffusion,
    data: Data,
    *,
    context: PyTree = None,
    iterations: Whole | None = None,
    minutes: Number | None = None,
    batch_size: Whole = 128,
    weights: Numbers | None = None,
    learning_rate: Number | optax.Schedule | optax.GradientTransformation = 1e-3,
    key: PRNGKeyArray | None = None,
    validation: Real[AnyArray, "held_out dim"] | None = None,
    validation_context: PyTree = None,
    validate_every: Whole = 500,
    elbo: ELBO | str | tuple[Callable[..., Any], ELBO] | None = None,
    ema_decay: Number = 0.999,
    checkpoint: CheckpointLike | None = None,
    devices: Devices = None,
    progress: bool = True,
) -> Fit:
    """Fit a diffusion by SVI.

    Args:
        diffusion: The model, bound or not; it is not changed. A bound one is fitted further, from the parameters that it has.
        data: Training data in the user's units, an array of shape ``(datum, column)`` or a data frame.
        context: Of a conditional model: a row for each datum, as for :meth:`~probdiff.Diffusion.given`.
        iterations: Total number of SVI updates, including those before a fit was resumed; 10 000 if not given. A finished fit that is resumed with more
            iterations begins another leg: the optimiser is initialised again at the result so far, and the learning rate rises and falls once more; with a
            schedule or an optimiser of your own (see ``learning_rate``) the fit goes on as if it had not ended. An update whose loss or gradient
            is not finite changes nothing, and is reported.
        minutes: Time for the fit, compilation included, instead of a number of ``iterations``: the learning rate falls with the time that is left, and the
            number of updates is planned from the time that each has taken so far. Time spent before a fit was resumed counts. A finished fit that is resumed with
            more minutes begins another leg. The result depends on the speed of the machine. For a single process, with a ``learning_rate`` that is a number.
        batch_size: Data per update, drawn with replacement.
        weights: The weight of each datum, shape ``(datum,)``, not negative: data are drawn with probabilities proportional to the weights.
            In expectation this is the fit to data that are repeated in this proportion. A datum of weight 0 is never drawn. The
            validation data are not weighted.
        learning_rate: Peak of the learning rate of Adam, after a linear warm-up and before a cosine decay to 0 at ``iterations``. The updates of convolutions
            are orthogonalised (:func:`~probdiff.training.orthogonalised_convolutions`), with weight decay. Or a schedule of optax that replaces warm-up and decay,
            or an optimiser.
        key: JAX key; ``jax.random.key(0)`` if not given.
        validation: Held-out data, shape ``(datum, column)``. If given, the result is the averaged parameters with the best bound on these data,
            estimated each time with the same noise.
        validation_context: Of a conditional model, the context of the held-out data.
        validate_every: Iterations between validations.
        elbo: A NumPyro ELBO, for the posterior guide unless it has a guide of its own; the name of one of :data:`~probdiff.ESTIMATORS`, or the pair (guide, ELBO) that
            it gives. If not given, ``AnalyticELBO(diffusion, steps="stratified_importance", points="batch")``, or without the ``points`` for a reverse kernel whose KL
            has no closed form.
        ema_decay: Decay of the parameter average.
        checkpoint: An object with ``load(template) -> FitState or None`` and ``save(state)``, such as
            :class:`~probdiff.storage.Checkpoint`; the fit continues from the saved state, with its keys, and saves every
            ``validate_every`` iterations, at the end and on Ctrl-C. With several processes, all load the state and the first saves it.
        devices: Number of devices (or a list of them) that share each minibatch; the state is on every device. The result does not depend on the
            number of devices, up to rounding, and the fit can be resumed on any other number.
        progress: Show a progress bar with the running bound.

    Returns:
        A :class:`Fit`.

    Raises:
        ValueError, TypeError: If the data do not suit the model, an argument is out of range, or the model has
            nothing to train.
        FloatingPointError: If ten updates in a row had to be skipped; the state in the checkpoint is finite.

    Example:
        >>> import jax, probdiff
        >>> x = jax.random.normal(jax.random.key(0), (8, 2))
        >>> diffusion = probdiff.Diffusion(probdiff.cosine_schedule(5), probdiff.MLP(2, key=jax.random.key(1), hidden=8, num_blocks=1))
        >>> fitted = probdiff.fit(diffusion, x, iterations=2, batch_size=4, progress=False).diffusion
        >>> probdiff.samplers.ancestral(fitted, key=jax.random.key(2), num_samples=3).shape
        (3, 2)
    """
    require_type("diffusion", diffusion, Diffusion)
    diffusion = diffusion.unbind()
    for name, value in (("iterations", 1 if iterations is None else iterations), ("batch_size", batch_size), ("validate_every", validate_every)):
        require_count(name, value)
    if minutes is not None:
        _check_minutes(minutes, iterations, learning_rate)
    require(0 <= ema_decay < 1, "ema_decay", "0 <= ema_decay < 1", ema_decay)
    names = column_names(data)
    data, context = _read("context", diffusion, data, context)
    if validation is None:
        require(validation_context is None, "validation_context", "None without validation data", type(validation_context).__name__)
    else:
        validation, validation_context = _read("validation_context", diffusion, validation, validation_context)
    require(
        jax.tree.leaves(diffusion.trainable()),
        "diffusion",
        "something to train: a network that is a module of equinox or Flax NNX, or probdiff.networks.from_apply(apply, params)",
        f"a {type(diffusion.network).__name__} without parameters",
    )
    weights = None if weights is None else read_weights(weights, len(data))
    warn_of_unsuited(diffusion, data if weights is None else np.asarray(data)[weights > 0], names)
    warn_of_raw_context(context)
    key = jax.random.key(0) if key is None else key
    require_key(key)
    mesh = data_mesh(devices)
    first_process = jax.process_index() == 0
    minibatches = Minibatches(len(data), int(batch_size), weights)

    timed = minutes is not None
    iterations = UNKNOWN if timed else DEFAULT_ITERATIONS if iterations is None else iterations

    def loop_of(updates: Whole | None) -> Loop:
        return Loop(diffusion, data, context, minibatches, build_optimiser(learning_rate, updates, ema_decay), elbo, mesh)

    loop = loop_of(None if timed else iterations)
    own_optimiser, own_schedule = isinstance(learning_rate, optax.GradientTransformation), callable(learning_rate)
    settings: dict[str, Any] = {
        "minutes": None if minutes is None else float(minutes),
        # The learning rate falls to 0 at the last iteration; the schedule of a user's optimiser is not known.
        "iterations": None if timed or own_optimiser or own_schedule else int(iterations),
        "batch_size": int(batch_size),
        "learning_rate": "an optax optimiser" if own_optimiser else "a schedule" if own_schedule else float(learning_rate),
        "validate_every": int(validate_every),
        "ema_decay": float(ema_decay),
        "elbo": elbo if isinstance(elbo, str) else type(loop.elbo).__name__,
        "data": _fingerprint(data),
        "validation": _fingerprint(validation),
        "weights": _fingerprint(weights),
        "context": _fingerprints(context),
        "validation_context": _fingerprints(validation_context),
    }
    quiet = not (progress and first_process)
    # The bar appears first, as compilation follows.
    with tqdm(total=None if timed else iterations, unit="it", desc="compiling", disable=quiet, mininterval=0.5) as bar:
        state = loop.init(key, settings)
        state = (checkpoint and checkpoint.load(state)) or state
        save = checkpoint.save if checkpoint is not None and first_process else _save_nothing
        # (Without these in checkpoints of 0.1.)
        saved = dict.fromkeys(("minutes", "weights", "context", "validation_context")) | {"begun": 0, "seconds": 0.0} | (state.settings or {})
        if minutes is not None and saved["minutes"] is not None:
            anew = saved["seconds"] >= 60 * saved["minutes"] < 60 * minutes
        else:
            anew = saved["iterations"] == len(state.losses) < iterations
        settings["begun"] = len(state.losses) if anew else saved["begun"]
        _require_same(settings, saved | {name: settings[name] for name in ("iterations", "minutes", "begun") if anew})
        settings["seconds"] = saved["seconds"]
        clock = None if minutes is None else Clock(60.0 * float(minutes), float(saved["seconds"] or 0))
        if clock is not None and clock.spent >= clock.seconds:
            iterations = len(state.losses)
        if settings["begun"]:
            loop = loop_of(None if timed else iterations - settings["begun"])
            loop.init(key, settings)
        state = replicate((loop.begin_anew(state) if anew else state)._replace(settings=settings), mesh)
        held_out = None if validation is None else replicate((jnp.asarray(validation), validation_context), mesh)
        kept: Whole = len(state.losses)
        bar.initial = bar.n = bar.last_print_n = kept  # so that the rate is that of this process
        try:
            while (done := len(state.losses)) < iterations:
                stop = min(iterations, done + CHUNK, (done // validate_every + 1) * validate_every)
                new = loop.advance(state, stop - done)
                due = stop % validate_every == 0 or stop == iterations
                state = loop.validate(new, *held_out) if due and held_out is not None else new
                # The last hundred updates are made as they were planned.
                if clock is not None and iterations - stop > CHUNK and (left := clock.updates_left(stop)) is not None:
                    iterations = bar.total = stop + left
                    state = loop.paced(state, left)
                if clock is not None:
                    # Where nothing is left, all is spent, however long the last updates took.
                    state = state._replace(settings=settings | {"seconds": clock.seconds if stop == iterations else clock.spent})
                if due:
                    save(to_default_device(state, mesh))
                    kept = stop
                bar.set_description_str("fitting", refresh=False)
                bar.set_postfix_str(_describe(diffusion, state.losses, state.validation), refresh=False)
                bar.update(stop - done)
        except (KeyboardInterrupt, FloatingPointError):
            if len(state.losses) > kept:
                save(to_default_device(state, mesh))
            raise
    state = to_default_device(state, mesh)
    fitted = diffusion.bind(loop.result(state))
    if diffusion.kernel.is_estimated:
        size = min(minibatches.num_counted, max(2, VARIANCE_ROWS // diffusion.schedule.num_steps))
        row_key, noise_key = jax.random.split(state.keys[1])
        rows = np.asarray(minibatches.sample(row_key, size))
        some, context = jax.tree.map(jnp.asarray, take(jax.tree.map(np.asarray, (data, context)), rows))
        fitted = optimal_variance(fitted, some, context=context, key=noise_key)
    return Fit(fitted, state.losses, state.validation, state)


def _check_minutes(minutes: Number, iterations: Whole | None, learning_rate: Any) -> None:
    require(isinstance(minutes, Number) and 0 < minutes < np.inf, "minutes", "a positive number", repr(minutes))
    require(iterations is None, "iterations", "none with minutes", iterations)
    require(isinstance(learning_rate, Number), "learning_rate", "a number, with minutes", type(learning_rate).__name__)
    require(jax.process_count() == 1, "minutes", "a single process", f"{jax.process_count()}, whose clocks differ")


def _require_same(settings: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuse arguments that differ from those of the fit in the checkpoint, by name."""
    for name, value in settings.items():
        more = ", or more if that has ended" if name in ("iterations", "minutes") else ""
        require(saved[name] == value, name, f"{saved[name]}, as in the fit of the checkpoint{more}", value)


def _read(name: str, diffusion: Diffusion, data: Data, context: PyTree) -> tuple[Data, PyTree]:
    """Data and their context, checked; ``name`` is the name of the context in messages."""
    require(diffusion.context is None, "diffusion", "a model that was given no context: pass it to fit as context=", "one that was")
    with named(name):
        given = diffusion.given(context)
        return given.read_data(data), given.context


def _save_nothing(state: FitState) -> None:
    pass


def _fingerprints(context: PyTree) -> str | None:
    """The fingerprints of the arrays of a context, by their paths in the tree."""
    leaves = jax.tree_util.tree_flatten_with_path(context)[0]
    return "; ".join(f"{jax.tree_util.keystr(path)} {_fingerprint(leaf)}".strip() for path, leaf in leaves) or None


def _fingerprint(data: Any) -> str | None:
    """A short text that distinguishes an array from others; None for None."""
    if data is None:
        return None
    data = np.ascontiguousarray(data)
    return f"{data.dtype} {data.shape} {hashlib.sha256(data).hexdigest()[:16]}"


def _describe(diffusion: Diffusion, losses: np.ndarray, validation: np.ndarray) -> str:
    """The bound of the last minibatches, and the bound on the validation data, as text."""
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
