r"""The evidence lower bound in closed form, as far as it has one.

    L(x) = - KL[q(z_N | x_0) ‖ p(z_N)]                                   prior_kl         closed form
           - Σ_{n=2..N} E_q KL[q(z_{n-1} | z_n, x_0) ‖ p_θ(z_{n-1} | z_n)]   step_kl          closed form given z_n
           + E_q log p_θ(x | z_1)                                        reconstruction

in nats, summed over the dimensions of a datum. Source: Ho et al. (2020), arXiv:2006.11239, eq. 5. Each term needs
only the marginal q(z_n | x_0), so that every step has noise of its own and steps can be evaluated in any order:
in chunks of about ``ROWS`` network inputs, which bounds the working memory whatever N and the number of draws are.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import Trace_ELBO
from numpyro.infer.elbo import ELBO
from numpyro.primitives import Messenger
from tqdm import tqdm

from probdiff.checks import require
from probdiff.networks import is_trainable, predict_noise
from probdiff.programs import Diffusion, _minibatch
from probdiff.schedules import at_step

ROWS = 4096


def bits_per_dim(nats, dim):
    """Code length in bits per dimension of an ELBO or log-likelihood in nats: −nats / (dim ln 2)."""
    return -nats / (dim * np.log(2))


class ELBOTerms(eqx.Module):
    """The terms of the bound, in nats, summed over the dimensions of each datum.

    Attributes:
        prior_kl: KL of q(z_N | x_0) to N(0, I), shape ``(datum,)``; exact, no sampling.
        step_kl: KL of step n, shape ``(draw, step, datum)``, steps n = 2 … N ascending (N = 1: no steps).
        reconstruction: log p(x | z_1), shape ``(draw, datum)``.
    """

    prior_kl: jax.Array
    step_kl: jax.Array
    reconstruction: jax.Array

    @property
    def elbo(self):
        """The bound, −prior_kl − Σ step_kl + reconstruction, shape ``(draw, datum)``."""
        return self.reconstruction - self.step_kl.sum(1) - self.prior_kl


class Moments(eqx.Module):
    """Mean and variance over draws.

    Attributes:
        mean: Mean.
        variance: Variance between draws (divisor ``num_draws`` − 1; NaN for a single draw). The mean's own Monte
            Carlo variance is ``variance / num_draws``.
    """

    mean: jax.Array
    variance: jax.Array


class ELBOMoments(eqx.Module):
    """The reduced form of :class:`ELBOTerms`: moments over draws instead of the draws.

    Attributes:
        prior_kl: As in :class:`ELBOTerms`, shape ``(datum,)``.
        step_kl: Moments of shape ``(step, datum)``.
        reconstruction: Moments of shape ``(datum,)``.
        elbo: Moments of shape ``(datum,)``.
        num_draws: Number of draws that they summarise.
    """

    prior_kl: jax.Array
    step_kl: Moments
    reconstruction: Moments
    elbo: Moments
    num_draws: int


def prior_kl(schedule, x0):
    r"""KL of :math:`q(z_N | x_0)` to N(0, I), in nats, shape ``batch`` for ``x0`` of shape ``(*batch, dim)``."""
    alpha_bar = schedule.alpha_bar[-1]
    constant = -alpha_bar - np.log(schedule.one_minus_alpha_bar[-1])
    return (jnp.asarray(alpha_bar, x0.dtype) * jnp.square(x0).sum(-1) + x0.shape[-1] * constant) / 2


def _noisy(diffusion, x0, n, eps, key=None):
    """z_n made from x_0 and eps, and the network's prediction of eps."""
    signal = at_step(np.sqrt(diffusion.schedule.alpha_bar), n, x0.dtype)
    noise = at_step(np.sqrt(diffusion.schedule.one_minus_alpha_bar), n, x0.dtype)
    z = signal[..., None] * x0 + noise[..., None] * eps
    return z, predict_noise(diffusion.network, z, n, key)


def _step_kl(diffusion, x0, n, eps, key=None):
    """KL of step n at z_n made from ``eps``, shape ``batch``."""
    _, eps_hat = _noisy(diffusion, x0, n, eps, key)
    return diffusion.kernel.step_kl(diffusion.schedule, eps, eps_hat, n)


def _log_likelihood(diffusion, x, z, n, eps_hat):
    """log p(x | z_1), shape ``batch``; n is 1, or what a masked-out entry has there."""
    last = diffusion.kernel(diffusion.schedule, z, eps_hat, n).base_dist
    return diffusion.likelihood(last.loc, last.scale).log_prob(x)


def _reconstruction(diffusion, x, x0, eps, key=None):
    """log p(x | z_1) at z_1 made from ``eps``, shape ``batch``."""
    n = jnp.ones((), jnp.int32)
    z, eps_hat = _noisy(diffusion, x0, n, eps, key)
    return _log_likelihood(diffusion, x, z, n, eps_hat)


def _noise(key, draw, n, like):
    """The noise of draw ``draw`` at step ``n``: the same whatever else is evaluated along with it."""
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, draw), n), like.shape, like.dtype)


def _even_chunk(size, largest):
    """The size of the fewest chunks, none larger than ``largest`` (or 1), that ``size`` can be cut in evenly."""
    return -(-size // max(1, -(-size // max(1, largest))))


def _filled(function, size, chunk, out):
    """``out`` with ``function(i)`` at row i, for ``size`` rows, ``chunk`` rows at a time, in place.

    The last chunk is moved back to end with the last row, so nothing is padded.
    """
    chunk = _even_chunk(size, chunk)

    def body(k, out):
        start = jnp.minimum(k * chunk, size - chunk)
        return jax.lax.dynamic_update_slice_in_dim(out, function(start + jnp.arange(chunk)), start, 0)

    return jax.lax.fori_loop(0, -(-size // chunk), body, out)


@eqx.filter_jit
def _evaluate(diffusion, x, key, draws, noise):
    """ELBOTerms of the draws numbered ``draws``; ``noise`` is None or shape ``(len(draws), num_steps, datum, dim)``."""
    x0 = diffusion.likelihood.encode(x)
    num_draws, num_steps = len(draws), diffusion.schedule.num_steps
    chunk = ROWS // len(x)

    def eps(index, n):
        if noise is not None:
            return noise[index, n - 1].astype(x0.dtype)
        return jax.vmap(_noise, (None, 0, 0, None))(key, draws[index], n, x0)

    def step_kl(i):
        index, n = i // (num_steps - 1), 2 + i % (num_steps - 1)
        return _step_kl(diffusion, x0, n[:, None], eps(index, n))

    def reconstruction(index):
        return _reconstruction(diffusion, x, x0, eps(index, jnp.ones_like(index)))

    step_rows = num_draws * (num_steps - 1)
    kls = jnp.zeros((step_rows, len(x)), x0.dtype)
    if step_rows:
        kls = _filled(step_kl, step_rows, chunk, kls)
    log_likelihood = _filled(reconstruction, num_draws, chunk, jnp.zeros((num_draws, len(x)), x0.dtype))
    return ELBOTerms(prior_kl(diffusion.schedule, x0), kls.reshape(num_draws, num_steps - 1, len(x)), log_likelihood)


@eqx.filter_jit
def _accumulate(diffusion, x, key, draws, noise, state):
    """Welford's update of (count, means, sums of squares) by the draws, one at a time."""

    def body(state, each):
        count, mean, square = state
        draw, eps = each
        terms = _evaluate(diffusion, x, key, draw[None], None if eps is None else eps[None])
        value = (terms.step_kl[0], terms.reconstruction[0], terms.elbo[0])
        mean_new = jax.tree.map(lambda m, v: m + (v - m) / (count + 1), mean, value)
        square = jax.tree.map(lambda s, m, w, v: s + (v - m) * (v - w), square, mean, mean_new, value)
        return (count + 1, mean_new, square), None

    return jax.lax.scan(body, state, (draws, noise))[0]


def elbo_terms(diffusion, params, x, *, key=None, num_draws=None, noise=None, reduce=False, progress=False):
    r"""The terms of the bound on each datum, each from noise of its own.

    Draw s at step n sees :math:`z_n = \sqrt{\bar\alpha_n} x_0 + \sqrt{1-\bar\alpha_n}\, \epsilon_{s,n}`, independent over
    draws, steps and data. The same ``key`` gives the same noise to any model of equal N and dimension.

    Args:
        diffusion: The model.
        params: Trained parameters, ``SVIRunResult.params``; ``{}`` for the weights that the model holds.
        x: Data as the user has it, shape ``(datum, dim)``.
        key: JAX key of the noise.
        num_draws: Number of draws; 1 if not given.
        noise: The noise itself, instead of ``key``: shape ``(draw, num_steps, datum, dim)``, step n at
            ``[:, n - 1]``. Two models on the same noise are compared on common random numbers.
        reduce: Return the moments over draws (:class:`ELBOMoments`): memory then does not grow with draws.
        progress: Show a progress bar.

    Returns:
        :class:`ELBOTerms`, or :class:`ELBOMoments` if ``reduce``. Nats.

    Raises:
        ValueError, TypeError: If the data, ``noise`` or ``num_draws`` do not fit the model.
    """
    require(isinstance(diffusion, Diffusion), "diffusion", "a Diffusion", type(diffusion).__name__, TypeError)
    diffusion = diffusion.bind(params)
    diffusion.check(x)
    require(
        (key is None) != (noise is None), "key, noise", "exactly one of the two", "neither" if key is None else "both"
    )
    if noise is not None:
        noise = jnp.asarray(noise)
        shape = (len(noise) if num_draws is None else num_draws, diffusion.schedule.num_steps, *x.shape)
        require(
            noise.shape == shape and len(noise) > 0,
            "noise",
            f"shape (draw, num_steps, datum, dim) = {shape}",
            noise.shape,
        )
        require(jnp.issubdtype(noise.dtype, jnp.floating), "noise", "floats", f"dtype {noise.dtype}", TypeError)
        num_draws = len(noise)
    num_draws = 1 if num_draws is None else num_draws
    require(
        isinstance(num_draws, int | np.integer) and num_draws >= 1, "num_draws", "a positive integer", repr(num_draws)
    )
    return _in_blocks(diffusion, jnp.asarray(x), key, int(num_draws), noise, reduce, progress)


def _in_blocks(diffusion, x, key, num_draws, noise, reduce, progress):
    """Blocks of draws, a second or so each, so that a progress bar can move and Ctrl-C is heard."""
    per_draw = diffusion.schedule.num_steps * len(x)
    block = max(1, min(num_draws, 2**20 // per_draw))
    blocks, state = [], None
    with tqdm(total=num_draws, unit="draw", desc="ELBO", disable=not progress) as bar:
        for start in range(0, num_draws, block):
            draws = jnp.arange(start, min(start + block, num_draws))
            eps = None if noise is None else noise[start : start + block]
            if reduce:
                state = _accumulate(diffusion, x, key, draws, eps, state or _no_draws(diffusion, x))
            else:
                blocks.append(_evaluate(diffusion, x, key, draws, eps))
            jax.block_until_ready((blocks, state))
            bar.update(len(draws))
    if reduce:
        _, means, squares = state
        moments = [Moments(m, s / (num_draws - 1) if num_draws > 1 else s * jnp.nan) for m, s in zip(means, squares)]
        return ELBOMoments(prior_kl(diffusion.schedule, diffusion.likelihood.encode(x)), *moments, num_draws)
    if len(blocks) == 1:
        return blocks[0]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks)
    return eqx.tree_at(lambda terms: terms.prior_kl, joined, blocks[0].prior_kl)


def _no_draws(diffusion, x):
    per_datum = jnp.zeros(len(x), diffusion.likelihood.encode(x[:1]).dtype)
    zeros = (jnp.zeros((diffusion.schedule.num_steps - 1, len(x)), per_datum.dtype), per_datum, per_datum)
    return jnp.zeros((), per_datum.dtype), zeros, zeros


def all_steps(diffusion, x, x0, key, network_key):
    """Every step, each with noise of its own: N network evaluations for each datum."""
    reconstruction = _reconstruction(diffusion, x, x0, _noise(key, 0, 1, x0), _fold_in(network_key, 0)).sum()
    num_kls = diffusion.schedule.num_steps - 1
    chunk = _even_chunk(num_kls, ROWS // len(x))
    step_kl = _sum_of_kls(diffusion, x0, key, network_key, chunk) if num_kls else jnp.zeros_like(reconstruction)
    numpyro.deterministic("step_kl", step_kl)
    numpyro.deterministic("reconstruction", reconstruction)
    return reconstruction - step_kl


@eqx.filter_custom_vjp
def _sum_of_kls(diffusion, x0, key, network_key, chunk):
    """Σ step KL over steps and data, ``chunk`` steps at a time.

    Where it is differentiated, each chunk's gradient is taken along with its value and added up: the cost is that of
    one pass back and forth, and memory does not grow with N.
    """
    return _over_chunks(_kl_of_chunk, diffusion, x0, key, network_key, chunk)


@_sum_of_kls.def_fwd
def _sum_of_kls_forward(perturbed, diffusion, x0, key, network_key, chunk):
    def value_and_gradient(diffusion, *arguments):
        params, constants = eqx.partition(diffusion, is_trainable)

        def value(params):
            return _kl_of_chunk(eqx.combine(params, constants), *arguments)

        return jax.value_and_grad(value)(params)

    return _over_chunks(value_and_gradient, diffusion, x0, key, network_key, chunk)


@_sum_of_kls.def_bwd
def _sum_of_kls_backward(gradient, cotangent, perturbed, diffusion, *arguments):
    return jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), gradient)


def _over_chunks(function, diffusion, x0, key, network_key, chunk):
    """The sum of ``function`` over chunks of steps from n = 2 on."""

    def value(first):
        return function(diffusion, x0, key, network_key, first + jnp.arange(chunk))

    def add(total, first):
        return jax.tree.map(jnp.add, total, value(first)), None

    first = jnp.arange(2, diffusion.schedule.num_steps + 1, chunk)
    return jax.lax.scan(add, value(first[0]), first[1:])[0]


def _kl_of_chunk(diffusion, x0, key, network_key, n):
    """Σ step KL over the steps ``n``, of which those past N do not count, and over the data."""
    inside = jnp.minimum(n, diffusion.schedule.num_steps)
    eps = jax.vmap(_noise, (None, None, 0, None))(key, 0, inside, x0)
    kl = _step_kl(diffusion, x0, inside[:, None], eps, _fold_in(network_key, n[0]))
    return jnp.where(inside == n, kl.sum(1), 0).sum()


def uniform_n(key, size, num_steps):
    """Steps drawn independently, uniform on 1 … N."""
    return jax.random.randint(key, (size,), 1, num_steps + 1)


def stratified_n(key, size, num_steps):
    """Steps each uniform on 1 … N and together evenly spread: a lattice of ``size`` points with a random shift.

    Source: Kingma et al. (2021), arXiv:2107.00630, appendix I.1.
    """
    points = (jax.random.uniform(key) + jnp.arange(size) / size) % 1
    return jnp.clip(jnp.floor(num_steps * points).astype(jnp.int32) + 1, 1, num_steps)


def one_step(draw_n, diffusion, x, x0, key, network_key):
    """One step for each datum, n = 1 being the reconstruction: one network evaluation each.

    The term is multiplied by N; as n is uniform, its expectation is the sum over all steps.
    """
    num_steps = diffusion.schedule.num_steps
    step_key, noise_key = jax.random.split(key)
    n = draw_n(step_key, len(x), num_steps)
    eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
    z, eps_hat = _noisy(diffusion, x0, n, eps, network_key)
    kl = diffusion.kernel.step_kl_unchecked(diffusion.schedule, eps, eps_hat, n)
    term = jnp.where(n == 1, _log_likelihood(diffusion, x, z, n, eps_hat), -kl)
    numpyro.deterministic("n", n)
    numpyro.deterministic("term", term)
    return num_steps * term.sum()


STEPS = {
    "all": all_steps,
    "uniform": functools.partial(one_step, uniform_n),
    "stratified": functools.partial(one_step, stratified_n),
}


def _fold_in(key, data):
    return None if key is None else jax.random.fold_in(key, data)


class AnalyticELBO(ELBO):
    """The analytic bound as an objective for ``SVI``, in the place of ``Trace_ELBO``.

    The bound is itself a NumPyro program, :meth:`program`: its only log density is one ``factor``, and its terms are
    ``deterministic`` sites. The loss is ``Trace_ELBO`` on that program and an empty guide.

    Args:
        diffusion: The model. ``SVI`` must be given this model's ``model``, and its ``guide`` or
            ``posterior_guide``; ``handlers.scale`` by a number may be wrapped around both alike.
        steps: ``"all"``: every step, N network evaluations a datum; ``"uniform"``: one step a datum, uniform on
            1 … N, times N: an unbiased estimate with one network evaluation; ``"stratified"``: the same with steps
            spread evenly over the data of the batch.
        num_particles: Independent estimates to average, as in NumPyro.
        vectorize_particles: As in NumPyro.

    Raises:
        ValueError: In the constructor if ``steps`` is not one of those; in use, if the model or the guide that
            ``SVI`` was given is not this model's.
    """

    def __init__(self, diffusion, steps="all", num_particles=1, vectorize_particles=True):
        require(isinstance(diffusion, Diffusion), "diffusion", "a Diffusion", type(diffusion).__name__, TypeError)
        require(isinstance(steps, str) and steps in STEPS, "steps", f"one of {list(STEPS)}", repr(steps))
        super().__init__(num_particles, vectorize_particles)
        self.diffusion = diffusion
        self._steps = STEPS[steps]
        self._trace_elbo = Trace_ELBO(num_particles, vectorize_particles)

    def program(self, x, num_data=None):
        """The bound on ``x`` as a NumPyro program; arguments as for :meth:`Diffusion.model`.

        With all steps it can be differentiated with respect to the parameters, not the data.

        Sites: ``param`` of the model; ``deterministic`` ``prior_kl`` and the terms of the steps; ``factor`` ``elbo``.
        """
        self.diffusion.check(x)
        diffusion = self.diffusion.with_param_site()
        x = jnp.asarray(x)
        x0 = diffusion.likelihood.encode(x)
        prior = numpyro.deterministic("prior_kl", prior_kl(diffusion.schedule, x0))
        terms = self._steps(diffusion, x, x0, numpyro.prng_key(), diffusion.training_key(x))
        with _minibatch(x, num_data):
            numpyro.factor("elbo", terms - prior.sum())

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """Minus the bound, summed over the data; called by ``SVI``."""
        own = (self.diffusion.model,), (self.diffusion.guide, self.diffusion.posterior_guide)
        scales = _scales_around(model, "model", own[0])
        guide_scales = _scales_around(guide, "guide", own[1])
        require(
            len(scales) == len(guide_scales) and all(map(_same, scales, guide_scales)),
            "guide",
            f"the same handlers.scale as around the model, {scales}",
            guide_scales,
        )
        program = self.program
        for scale in reversed(scales):
            program = handlers.scale(program, scale=scale)
        return self._trace_elbo.loss_with_mutable_state(rng_key, param_map, program, _empty_guide, *args, **kwargs)


def _empty_guide(*args, **kwargs):
    pass


def _same(a, b):
    return a is b or bool(np.all(np.asarray(a) == np.asarray(b)))


def _scales_around(program, name, own):
    """The scales of the ``handlers.scale`` around one of the programs ``own``, outermost first."""
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
    names = " or ".join(f"diffusion.{p.__func__.__name__}" for p in own)
    require(mine, name, f"{names} of the Diffusion that AnalyticELBO was given", f"{program!r:.80}")
    return scales
