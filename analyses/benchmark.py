# %% [markdown]
# # What does a probabilistic program cost?
#
# One SVI update through NumPyro against the same mathematics written by hand in JAX, and compile time against the
# number of steps. Every ratio is the median over interleaved repetitions in this one run: first one program, then the
# other, so that a machine that slows down slows both.

# %%
import argparse
import platform
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import SVI, Trace_ELBO

import probdiff

parser = argparse.ArgumentParser(description="What does a probabilistic program cost?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
quick = parser.parse_args().quick

REPETITIONS = 3 if quick else 15
OPTIMISER = optax.adam(1e-3)


# %% [markdown]
# ## The same mathematics by hand
#
# A network, arrays of constants, `lax.scan`, `value_and_grad`. The path estimate runs the forward chain once and adds
# up log p − log q on the way; the analytic one evaluates all steps in one batch. The optimiser is the same.


# %%
def log_normal(x, mean, variance):
    return -((x - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance)).sum() / 2


class Tables:
    def __init__(self, schedule):
        previous = np.concatenate([[1.0], schedule.alpha_bar[:-1]])
        variance = schedule.beta * (1 - previous) / (1 - schedule.alpha_bar)
        variance[0] = schedule.beta[0]
        self.num_steps = schedule.num_steps
        self.beta, self.variance, self.alpha_bar = (
            jnp.asarray(t, jnp.float32) for t in (schedule.beta, variance, schedule.alpha_bar)
        )
        weight = schedule.beta**2 / (2 * variance * schedule.alpha * (1 - schedule.alpha_bar))
        self.weight = jnp.asarray(weight, jnp.float32)


def path_loss(network, tables, x, key):
    def step(carry, n):
        z, total, key = carry
        key, noise_key = jax.random.split(key)
        beta, variance, alpha_bar = tables.beta[n - 1], tables.variance[n - 1], tables.alpha_bar[n - 1]
        mean = jnp.sqrt(1 - beta) * z
        new = mean + jnp.sqrt(beta) * jax.random.normal(noise_key, z.shape)
        eps_hat = network(new, jnp.full(len(x), n))
        reverse_mean = (new - beta / jnp.sqrt(1 - alpha_bar) * eps_hat) / jnp.sqrt(1 - beta)
        total += log_normal(z, reverse_mean, variance) - log_normal(new, mean, beta)
        return (new, total, key), None

    (z, total, _), _ = jax.lax.scan(step, (x, 0.0, key), jnp.arange(1, tables.num_steps + 1))
    return -(total + log_normal(z, 0.0, 1.0))


def analytic_loss(network, tables, x, key):
    n = jnp.broadcast_to(jnp.arange(1, tables.num_steps + 1)[:, None], (tables.num_steps, len(x)))
    eps = jax.random.normal(key, (tables.num_steps, *x.shape))
    alpha_bar = tables.alpha_bar[:, None, None]
    z = jnp.sqrt(alpha_bar) * x + jnp.sqrt(1 - alpha_bar) * eps
    eps_hat = network(z, n)
    kl = (tables.weight[1:, None] * ((eps - eps_hat)[1:] ** 2).sum(-1)).sum()
    beta, last = tables.beta[0], tables.alpha_bar[-1]
    mean = (z[0] - beta / jnp.sqrt(1 - tables.alpha_bar[0]) * eps_hat[0]) / jnp.sqrt(1 - beta)
    prior_kl = (last * x**2 - last - jnp.log1p(-last)).sum() / 2
    return prior_kl + kl - log_normal(x, mean, beta)


def by_hand(loss, diffusion, x):
    params, static = eqx.partition(diffusion.network, eqx.is_inexact_array)
    tables = Tables(diffusion.schedule)

    def update(state, x):
        params, optimiser_state, key = state
        key, step_key = jax.random.split(key)
        value, grads = jax.value_and_grad(lambda p: loss(eqx.combine(p, static), tables, x, step_key))(params)
        updates, optimiser_state = OPTIMISER.update(grads, optimiser_state)
        return (optax.apply_updates(params, updates), optimiser_state, key), value

    return jax.jit(update), (params, OPTIMISER.init(params), jax.random.key(0)), x


def by_program(elbo, diffusion, x):
    svi = SVI(diffusion.model, diffusion.guide, OPTIMISER, elbo(diffusion))
    return jax.jit(svi.update), jax.jit(svi.init)(jax.random.key(0), x), x


# %% [markdown]
# ## Measuring


# %%
def seconds(update, state, x):
    start = time.perf_counter()
    jax.block_until_ready(update(state, x))
    return time.perf_counter() - start


def compare(a, b):
    """Seconds of each and their ratios, pair by pair, after a warm-up."""
    pairs = [(seconds(*a), seconds(*b)) for _ in range(REPETITIONS + 3)][3:]
    first, second = np.array(pairs).T
    return first, second, first / second


def make(num_steps, dim, hidden):
    network = probdiff.MLP(dim, key=jax.random.key(0), hidden=hidden, num_blocks=3)
    return probdiff.Diffusion(probdiff.log_snr_schedule(num_steps), network)


def compile_seconds(num_steps, elbo):
    """Seconds to trace and compile an update; the state is only described, not computed."""
    diffusion, x = make(num_steps, 2, 128), jnp.ones((4, 2))
    svi = SVI(diffusion.model, diffusion.guide, OPTIMISER, elbo(diffusion))
    state = jax.eval_shape(svi.init, jax.random.key(0), x)
    start = time.perf_counter()
    jax.jit(svi.update).lower(state, x).compile()
    return time.perf_counter() - start


objectives = {
    "Trace_ELBO": (lambda diffusion: Trace_ELBO(), path_loss),
    "AnalyticELBO, all steps": (probdiff.AnalyticELBO, analytic_loss),
}
sizes = [(5, 2, 16, 8)] if quick else [(100, 2, 128, 128), (100, 64, 256, 128), (1000, 2, 128, 32)]

print(f"machine: {platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}; jax {jax.__version__}")
print("\nOne SVI update, program against the same mathematics by hand; median [quartiles] of pairwise ratios")
print(f"{'objective':26}{'N':>6}{'dim':>5}{'hidden':>8}{'batch':>7}{'program':>11}{'by hand':>11}   ratio")
for name, (elbo, loss) in objectives.items():
    for num_steps, dim, hidden, batch in sizes:
        x = jax.random.normal(jax.random.key(1), (batch, dim))
        diffusion = make(num_steps, dim, hidden)
        program, hand = by_program(elbo, diffusion, x), by_hand(loss, diffusion, x)
        values = np.array(
            [
                [
                    update(state._replace(rng_key=key) if hasattr(state, "_replace") else (*state[:2], key), x)[1]
                    for update, state, x in (program, hand)
                ]
                for key in jax.random.split(jax.random.key(2), 20)
            ]
        )
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        z = (values[:, 0].mean() - values[:, 1].mean()) / np.hypot(*error)
        assert abs(z) < 4.9, f"the two do not compute the same: {z:.1f} standard errors"
        a, b, ratio = compare(program, hand)
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        print(
            f"{name:26}{num_steps:6}{dim:5}{hidden:8}{batch:7}{np.median(a) * 1e3:9.1f}ms{np.median(b) * 1e3:9.1f}ms"
            f"   {middle:.2f} [{low:.2f}, {high:.2f}]",
            flush=True,
        )

print("\nCompile time of an update at N = 1000 against N = 10; median [range] of pairwise ratios")
for name, (elbo, _) in list(objectives.items())[: 1 if quick else None]:
    pairs = np.array([[compile_seconds(n, elbo) for n in (1000, 10)] for _ in range(1 if quick else 9)])
    ratio = pairs[:, 0] / pairs[:, 1]
    print(
        f"{name:26}{np.median(pairs[:, 0]):8.2f}s{np.median(pairs[:, 1]):8.2f}s   {np.median(ratio):.2f} "
        f"[{ratio.min():.2f}, {ratio.max():.2f}]",
        flush=True,
    )
