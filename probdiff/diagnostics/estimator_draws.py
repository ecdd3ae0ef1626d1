"""Draws of every estimator of the bound and of its gradient, as many as a time limit allows.

All programs are traced, then compiled in parallel; then the kinds of draws take turns until the time is over, next always the kind that has
used the least time. The estimators of a kind are drawn equally often, and draw s of every estimator starts from the same key. Gradients of estimators
that evaluate all steps cost more than all others together: they are compiled and drawn if time is left for them.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray
from tqdm import tqdm

from probdiff._checks import Number, PyTree, Whole
from probdiff._chunks import MOST_NUMBERS, inputs_at_once, repeat, take
from probdiff._devices import compiler_options, gather, replicate, shard
from probdiff.diagnostics.cost_ratios import Variance
from probdiff.diffusion import Diffusion
from probdiff.elbo.estimators import ESTIMATORS
from probdiff.elbo.objective import StepObjective
from probdiff.programs.sites import PARAMS

BLOCK_ROWS = 2**16  # evaluations of the network between two checks for Ctrl-C
ROWS_AT_ONCE = 512  # evaluations of the network in parallel, of several draws
ALL_STEPS_ROWS, FEWEST_ITEMS = 2**12, 4  # most evaluations of the network, and fewest data, in a draw of an estimator that evaluates all steps
MORE_DRAWS = 64  # how often, at most, an estimator of random steps is drawn for each draw of all steps
GRADIENT_ROWS = 2**15  # evaluations of the network for all draws of a gradient, and for the draws in parallel
GRADIENT_DRAWS = (8, 1024)  # the fewest and the most draws of a gradient
FEWEST_TURNS = 4  # turns from which the error of the time is estimated
DIRECTIONS = 8
LEARNING = (200, 64)  # updates, and the fewest data in each, before an estimator that learns is measured


class Turns(NamedTuple):
    """The number of draws in a turn, and the smallest and the largest number of turns."""

    draws: int
    fewest: int
    most: int


# By whether all steps are evaluated, and whether it is a gradient.
TURNS = {
    (False, False): Turns(32, 4, 128),
    (False, True): Turns(8, 4, 128),
    (True, False): Turns(2, 2, 100),
    (True, True): Turns(2, 1, 50),
}
Rows = tuple[jax.Array, PyTree]  # data, and the context of each
PATHS = Turns(16, 2, 12)  # for trace: the tail of the importance weights of its paths is examined as well
EACH_STEP = {"gradient": 2, "grid": 8, "density": 32}  # how often each step is drawn, on average, in the smallest number of turns of a one-step estimator
GRADIENT_COST = 3  # time of a draw of a gradient, in draws of a value


class EstimatorDraws(NamedTuple):
    """Draws of one estimator.

    Attributes:
        values: The bound in nats, shape ``(draw, item)``.
        value_variance: Variance of one draw of the mean over the batch, a :class:`~probdiff.diagnostics.cost_ratios.Variance`.
        value_seconds: Seconds of one draw of the batch, by each turn, shape ``(turn,)``.
        evaluations: Network evaluations for each item and draw.
        is_of_each_datum: Whether the values estimate the bound of each item; otherwise only their mean is an estimate.
        projections: The gradient of the mean bound of the items along a few directions, shape ``(draw, direction)``. Like the next two, None if the
            model has no parameters, or there was no time for gradients.
        gradient_variance: Trace of the covariance of the gradient of the mean over the batch, measured.
        gradient_seconds: Seconds of one draw of the gradient of the batch, by each turn and block of data, shape ``(call,)``.
    """

    values: Float[np.ndarray, "draw item"]
    value_variance: Variance
    value_seconds: Float[np.ndarray, "turn"]
    evaluations: int
    is_of_each_datum: bool
    projections: Float[np.ndarray, "draw direction"] | None = None
    gradient_variance: Variance | None = None
    gradient_seconds: Float[np.ndarray, "turn"] | None = None


def draw_estimators(
    names: Sequence[str],
    diffusion: Diffusion,
    x: jax.Array,
    *,
    key: PRNGKeyArray,
    num_draws: Whole | None,
    minutes: Number,
    mesh: Mesh | None,
    progress: bool,
) -> dict[str, EstimatorDraws]:
    """Draws of estimators, by name.

    Args:
        names: Names out of :data:`~probdiff.ESTIMATORS`.
        diffusion: The model, given a context if it is conditional.
        x: Data, shape ``(item, dim)``. An estimator that evaluates all N steps is drawn for the first few.
        key: JAX key.
        num_draws, minutes: As in :func:`~probdiff.compare_estimators`.
        mesh: The devices that share the draws.
        progress: Show progress bars.
    """
    # Several processes, whose clocks differ, must make the same calls: they make the smallest number of draws.
    alone, start = jax.process_count() == 1, time.monotonic()
    deadline = start + 60 * float(minutes) if alone else -np.inf
    draw_key, learn_key, direction_key = jax.random.split(key, 3)
    size = sum(leaf.size for leaf in jax.tree.leaves(diffusion.trainable()))
    directions = jax.random.normal(direction_key, (DIRECTIONS, size)) / np.sqrt(max(1, size))
    estimators = {name: _Estimator(name, diffusion, x, directions, mesh) for name in names}
    gradients = (False, True) if size else (False,)
    wanted = [(name, is_gradient) for name in names for is_gradient in gradients]
    dear = [each for each in wanted if each[1] and estimators[each[0]].all_steps and num_draws is None and alone]
    kinds: dict[Any, _Kind] = {}
    pool = ThreadPoolExecutor(os.cpu_count())

    def prepare(some: list[tuple[str, bool]]) -> None:
        programs = {}
        for name, is_gradient in tqdm(some, desc="tracing", unit="program", disable=not progress):
            programs[name, is_gradient] = estimators[name].lowered(pool, is_gradient, draw_key, num_draws)
        for (name, is_gradient), (turns, program, blocks) in tqdm(
            programs.items(), desc="compiling", unit="program", disable=not progress
        ):
            kind = kinds.setdefault((is_gradient, turns), _Kind(draw_key, turns))
            kind.add(name, functools.partial(program.result(), estimators[name].learned()), blocks)

    def draw(until: float) -> None:
        while ready := [kind for kind in kinds.values() if kind.is_open(until)]:
            min(ready, key=lambda kind: (kind.made >= kind.turns.fewest, kind.spent)).take_turn()
            bar.update()

    try:
        for name in names:
            estimators[name].start_to_learn(pool, learn_key)
        prepare([each for each in wanted if each not in dear])
        with tqdm(desc="drawing", unit="turn", disable=not progress) as bar:
            prepared = time.monotonic() - start
            draw(-np.inf)
            a_draw = sum(kind.seconds_of_a_draw(name) for name, _ in dear for kind in kinds.values() if name in kind.functions)
            least = TURNS[True, True].draws * TURNS[True, True].fewest
            if dear and time.monotonic() + prepared + GRADIENT_COST * least * a_draw < deadline:
                prepare(dear)
            draw(deadline)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    of_values_and_gradients = [kinds[key] for key in sorted(kinds)]
    return {
        name: each.collected(*(kind for kind in of_values_and_gradients if name in kind.functions))
        for name, each in estimators.items()
    }


class _Program(NamedTuple):
    """Draws that are being compiled: their turns, the program, and the blocks of data for its calls."""

    turns: Turns
    compiled: Future[Any]
    blocks: list[Rows]


class _Estimator:
    """One estimator of a model, and the data that it is drawn for."""

    def __init__(self, name: str, diffusion: Diffusion, x: jax.Array, directions: jax.Array, mesh: Mesh | None) -> None:
        # Values are those of the bound model; a gradient needs its ``param`` site.
        rows, diffusion = (x, diffusion.context), diffusion.with_context(None)
        self.trainable, self.diffusion = diffusion.trainable_without_dropout(), diffusion.evaluated()
        self.name, self.directions, self.mesh = name, directions, mesh
        self.guide, self.elbo = _adapted(name, self.diffusion, "value")
        self.by_gradient = _adapted(name, self.trainable, "gradient")
        self.objective = self.elbo if isinstance(self.elbo, StepObjective) else None
        self.all_steps = self.objective is None or self.objective.is_of_all_steps
        num_steps = self.diffusion.schedule.num_steps
        self.evaluations = num_steps if self.objective is None else self.objective.evaluations
        few = max(FEWEST_ITEMS, ALL_STEPS_ROWS // num_steps)
        self.batch, self.items = rows, take(rows, slice(few)) if self.all_steps else rows
        self.state = {} if self.objective is None else replicate(self.objective.initial_state, mesh)
        self.learning: tuple[Future[Any], jax.Array] | None = None

    def start_to_learn(self, pool: ThreadPoolExecutor, key: PRNGKeyArray) -> None:
        """Start to compile and then to learn the state from repetitions of the data; most estimators have no state."""
        if self.state:
            keys = jax.random.split(key, LEARNING[0])
            self.learning = pool.submit(jax.jit(self._learn).lower(self.state, keys).compile, compiler_options()), keys

    def learned(self) -> dict[str, Any]:
        """The learned state, by site."""
        if self.learning is not None:
            program, keys = self.learning
            self.state, self.learning = program.result()(self.state, keys), None
        return self.state

    def lowered(self, pool: ThreadPoolExecutor, is_gradient: bool, draw_key: PRNGKeyArray, num_draws: Whole | None) -> _Program:
        """Trace a program, and start its compilation."""
        # If a gradient is a sum of independent gradients of the data, these are drawn one by one.
        size = _size(self.items)
        blocks = [take(self.items, slice(k, k + 1)) for k in range(size)] if is_gradient and self.all_steps else [self.items]
        rows = self.evaluations * _size(blocks[0])
        turns = self._turns(is_gradient, num_draws)
        program = functools.partial(self._draws, is_gradient, self._together(is_gradient, rows))
        lowered = jax.jit(program).lower(self.state, _keys(draw_key, 0, turns.draws), blocks[0])
        return _Program(turns, pool.submit(lowered.compile, compiler_options()), blocks)

    def collected(self, values: "_Kind", gradients: "_Kind | None" = None) -> EstimatorDraws:
        """The draws, with estimates of the variance and of the time."""
        (drawn,) = values.draws(self.name)
        each = self.objective is None or self.objective.is_of_each_datum
        size = _size(self.batch)
        variance = Variance.of_values(drawn, size) if self.all_steps else Variance.of_means(drawn)
        result = EstimatorDraws(drawn, variance, size * np.array(values.seconds[self.name]), self.evaluations, each)
        if gradients is None:
            return result
        blocks = gradients.draws(self.name)
        projections = np.mean([block[0] for block in blocks], 0)
        parts = np.stack([block[1] for block in blocks], 1) / (size if self.all_steps else 1)
        return result._replace(
            projections=projections.reshape(-1, projections.shape[-1]),
            gradient_variance=Variance(parts, _size(self.items) / size),
            gradient_seconds=size * np.array(gradients.seconds[self.name]),
        )

    def _turns(self, is_gradient: bool, num_draws: Whole | None) -> Turns:
        if num_draws is None:
            turns = PATHS if self.name == "trace" and not is_gradient else TURNS[self.all_steps, is_gradient]
            if not self.all_steps:
                # A step that is drawn rarely may have a large term, as the first one for data with a density, half a nat for each dimension: in the
                # smallest number of turns each of the N steps must have been drawn several times, or the error of the mean is unknown.
                often = EACH_STEP["gradient" if is_gradient else "grid" if self.diffusion.likelihood.levels else "density"]
                rows = often * self.diffusion.schedule.num_steps // (turns.fewest * _size(self.items))
                turns = turns._replace(draws=max(turns.draws, 2 * (rows // 2)))
            # If items were left out, the error is mostly the error over items; otherwise two turns are needed.
            return turns if _size(self.items) < _size(self.batch) else turns._replace(fewest=max(2, turns.fewest))
        rows, draws = self.evaluations * _size(self.items), int(num_draws)
        if is_gradient:
            draws = 2 * (int(np.clip(GRADIENT_ROWS // rows, *GRADIENT_DRAWS)) // 2)
        elif not self.all_steps:
            draws *= min(MORE_DRAWS, max(1, self.diffusion.schedule.num_steps // self.evaluations))
        unit = 2 if is_gradient else 1
        together = unit * _divisor(draws // unit, max(1, min(draws // FEWEST_TURNS, BLOCK_ROWS // rows) // unit))
        return Turns(together, draws // together, draws // together)

    def _together(self, is_gradient: bool, rows: int) -> int:
        """The largest number of draws, or of pairs for gradients, to evaluate in parallel."""
        # A path is evaluated step by step; of the terms of the analytic bound, as many at a time as fit.
        at_once = rows // self.evaluations if self.objective is None else min(rows, inputs_at_once(self.diffusion.network))
        together = ROWS_AT_ONCE // at_once
        if is_gradient:
            together = min(together, GRADIENT_ROWS // rows, MOST_NUMBERS // self.directions.shape[1]) // 2
        return max(1, together)

    def _draws(self, is_gradient: bool, together: int, learned: Any, keys: jax.Array, rows: Rows) -> Any:
        """Draws for some keys, some in parallel: values of each datum, or the results of :meth:`_gradients` for each pair of gradients."""
        keys = keys.reshape(-1, 2) if is_gradient else keys
        keys = keys.reshape(-1, _divisor(len(keys), together), *keys.shape[1:])
        function = functools.partial(self._gradients if is_gradient else self._value, learned, rows)
        drawn = jax.lax.map(lambda keys: jax.vmap(function)(shard(keys, self.mesh)), keys)
        return gather(jax.tree.map(lambda each: each.reshape(-1, *each.shape[2:]), drawn), self.mesh)

    def _value(self, learned: Any, rows: Rows, key: PRNGKeyArray) -> Float[Array, "datum"]:
        """One draw of each datum's bound, shape ``(datum,)``."""
        if self.objective is not None:
            return self.objective.of(self.diffusion.with_context(rows[1])).per_datum(key, rows[0], learned)

        def one(key: PRNGKeyArray, row: Rows) -> jax.Array:
            x, context = take(row, None)
            return -self.elbo.loss(key, {}, self.diffusion.model, self.guide, x, **_options(context))

        return jax.vmap(one)(jax.random.split(key, _size(rows)), rows)

    def _gradients(
        self, learned: Any, rows: Rows, keys: jax.Array
    ) -> tuple[Float[Array, "2 direction"], Float[Array, ""]]:
        """Two draws of the gradient of the mean bound: their projections, and half their squared distance."""
        guide, elbo = self.by_gradient
        x, context = rows

        def mean_bound(params: Any, key: PRNGKeyArray) -> jax.Array:
            return -elbo.loss(key, {PARAMS: params, **learned}, self.trainable.model, guide, x, **_options(context)) / len(x)

        def gradient(key: PRNGKeyArray) -> jax.Array:
            return ravel_pytree(jax.grad(mean_bound)(self.trainable.trainable(), key))[0]

        both = jax.lax.map(gradient, keys)
        return both @ self.directions.T, jnp.square(both[0] - both[1]).sum() / 2

    def _learn(self, state: Any, keys: jax.Array) -> Any:
        updates, size = LEARNING
        times = -(-size // _size(self.batch))
        many, context = repeat(self.batch, times)

        def update(state: Any, key: PRNGKeyArray) -> tuple[Any, None]:
            result = self.elbo.loss_with_mutable_state(key, state, self.diffusion.model, self.guide, many, **_options(context))
            return result["mutable_state"], None

        return gather(jax.lax.scan(update, state, keys)[0], self.mesh)


class _Kind:
    """Draws of one kind, values or gradients, for the estimators that are drawn equally often."""

    def __init__(self, key: PRNGKeyArray, turns: Turns) -> None:
        self.key, self.turns = key, turns
        self.functions: dict[str, tuple[Callable[..., Any], list[Rows]]] = {}
        self.found: dict[str, list[list[Any]]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.made, self.spent, self.last = 0, 0.0, 0.0

    def add(self, name: str, function: Callable[..., Any], blocks: list[Rows]) -> None:
        """Add an estimator, given as a function of keys and data and the blocks of data."""
        self.functions[name], self.found[name], self.seconds[name] = (function, blocks), [], []

    def seconds_of_a_draw(self, name: str) -> float:
        """Seconds that one draw of all data of an estimator took."""
        _, blocks = self.functions[name]
        return float(np.mean(self.seconds[name])) * sum(map(_size, blocks))

    def is_open(self, deadline: float) -> bool:
        """Whether another turn is possible."""
        in_time = self.made < self.turns.fewest or time.monotonic() + self.last <= deadline
        return self.made < self.turns.most and in_time

    def take_turn(self) -> None:
        """Draw from each estimator."""
        start, count = time.monotonic(), self.turns.draws
        for name, (function, blocks) in self.functions.items():
            drawn = []
            for k, block in enumerate(blocks):
                keys = _keys(jax.random.fold_in(self.key, k) if len(blocks) > 1 else self.key, self.made * count, count)
                before = time.perf_counter()
                drawn.append(jax.device_get(function(keys, block)))
                self.seconds[name].append((time.perf_counter() - before) / count / _size(block))
            self.found[name].append(drawn)
        self.made += 1
        self.last = time.monotonic() - start
        self.spent += self.last

    def draws(self, name: str) -> list[Any]:
        """The draws of each block of data of an estimator, float64."""

        def joined(*turns: np.ndarray) -> np.ndarray:
            return np.concatenate(turns).astype(np.float64)

        return [jax.tree.map(joined, *turns) for turns in zip(*self.found[name])]


def _adapted(name: str, diffusion: Diffusion, purpose: str) -> tuple[Callable[..., Any], Any]:
    guide, elbo = ESTIMATORS[name](diffusion)
    if not isinstance(elbo, StepObjective):
        return guide, elbo
    adapted = elbo.adapted_to(purpose)
    return adapted.guide, adapted


def _size(rows: Rows) -> int:
    return len(rows[0])


def _options(context: PyTree) -> dict[str, PyTree]:
    """The keyword arguments of the programs beside the data."""
    return {} if context is None else {"context": context}


def _keys(key: PRNGKeyArray, first: int, count: int) -> jax.Array:
    """The keys of some draws; the key of a draw does not depend on the number of draws."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


def _divisor(number: int, largest: int) -> int:
    """The largest divisor of ``number`` that is not above ``largest``."""
    return max(size for size in range(1, min(number, largest) + 1) if number % size == 0)
