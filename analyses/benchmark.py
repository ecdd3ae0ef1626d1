# %% [markdown]
# # What does a probabilistic program cost?
#
# Each result is a ratio of two times (or bytes), measured alternately in one run, so that a machine that slows down slows both.
# A row gives the median of each, and the median and the quartiles of the ratios pair by pair.

# %%
import argparse
import dataclasses
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import probdiff
from probdiff._devices import compiler_options
from probdiff.networks.convolution import Convolution

try:
    import torch
except ImportError:  # an extra: pip install 'probdiff[frameworks]'
    torch = None

parser = argparse.ArgumentParser(description="What does a probabilistic program cost?")
parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
parser.add_argument("--json", action="store_true", help="print one JSON document")
SECTIONS = ["step", "images", "quality", "elbo", "parallel", "compile", "evaluation", "costs", "torch", "precision", "start"]
parser.add_argument("--only", choices=SECTIONS, help="one of the sections")
arguments = parser.parse_args()
quick = arguments.quick

REPETITIONS = 3 if quick else 15
KEY = jax.random.key(0)
machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}"
rows = []


def say(text):
    print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)


def report(section, setting, first, second, names, unit="ms"):
    """A row: two quantities and their ratio."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    low, ratio, high = np.quantile(first / second, [0.25, 0.5, 0.75])
    row = {"section": section, "setting": setting, "unit": unit, "ratio": ratio, "quartiles": [low, high]}
    row |= {name: float(np.median(values)) for name, values in zip(names, (first, second))}
    rows.append(row)
    values = "  ".join(f"{name} {row[name]:.4g} {unit}" for name in names)
    say(f"{section:11}{setting:58}{values:62} ratio {ratio:.2f} [{low:.2f}, {high:.2f}]")


def wanted(section):
    return arguments.only in (None, section)


def seconds(function, *args):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def in_turns(*calls):
    """Milliseconds of some functions, called in turns after a warm-up: shape ``(function, repetition)``."""
    times = [[seconds(call) for call in calls] for _ in range(REPETITIONS + 2)]
    return 1e3 * np.array(times[2:]).T


def make(num_steps, dim, hidden):
    network = probdiff.MLP(dim, key=jax.random.key(0), hidden=hidden, num_blocks=3)
    return probdiff.Diffusion(probdiff.log_snr_schedule(num_steps), network)


say(f"machine: {machine}; jax {jax.__version__}" + ("" if torch is None else f", torch {torch.__version__}"))

# %% [markdown]
# ## A training step
#
# `probdiff.fit` with one uniform step per datum is compared with the same computation written by hand: minibatch, noise, network, weighted
# error, Adam with its learning rate, moving average. The loop by hand dispatches each update separately; PyTorch is eager. The other loops run
# between stretches of the fit, whenever it saves its checkpoint.


# %%
class Tables:
    def __init__(self, schedule):
        previous = np.concatenate([[1.0], schedule.alpha_bar[:-1]])
        variance = schedule.beta * (1 - previous) / (1 - schedule.alpha_bar)
        variance[0] = schedule.beta[0]
        self.num_steps = schedule.num_steps
        self.beta, self.variance, self.alpha_bar, self.log_snr = (
            jnp.asarray(t, jnp.float32) for t in (schedule.beta, variance, schedule.alpha_bar, schedule.log_snr)
        )
        weight = schedule.beta**2 / (2 * variance * schedule.alpha * (1 - schedule.alpha_bar))
        self.weight = jnp.asarray(weight, jnp.float32)


def one_step_loss(network, tables, x, key):
    """The loss in nats per datum, up to a constant."""
    step_key, noise_key = jax.random.split(key)
    n = jax.random.randint(step_key, (len(x),), 1, tables.num_steps + 1)
    eps = jax.random.normal(noise_key, x.shape)
    alpha_bar = tables.alpha_bar[n - 1][:, None]
    eps_hat = network(jnp.sqrt(alpha_bar) * x + jnp.sqrt(1 - alpha_bar) * eps, tables.log_snr[n - 1])
    errors = tables.num_steps * tables.weight[n - 1] * ((eps - eps_hat) ** 2).sum(-1)
    return (errors + tables.alpha_bar[-1] * (x**2).sum(-1) / 2).mean()


def loop_by_hand(diffusion, data, batch, iterations):
    """A function that makes a given number of updates."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, min(200, iterations // 10), iterations)
    optimiser, tables = optax.adam(rate), Tables(diffusion.schedule)
    params, static = eqx.partition(diffusion.network, eqx.is_inexact_array)

    @jax.jit
    def update(state, data):
        params, optimiser_state, average, key = state
        key, row_key, loss_key = jax.random.split(key, 3)
        x = data[jax.random.randint(row_key, (batch,), 0, len(data))]
        loss, grads = jax.value_and_grad(lambda p: one_step_loss(eqx.combine(p, static), tables, x, loss_key))(params)
        updates, optimiser_state = optimiser.update(grads, optimiser_state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + 0.001 * (p - a), average, params)
        return (params, optimiser_state, average, key), loss

    state = [(params, optimiser.init(params), params, jax.random.key(0))]
    data = jnp.asarray(data)

    def run(count):
        losses = []
        for _ in range(count):
            state[0], loss = update(state[0], data)
            losses.append(loss)
        return np.array(jax.device_get(losses))

    return run


def net_in_torch(diffusion):
    """The same network in PyTorch, as a function of the step."""
    network, tables = diffusion.network, Tables(diffusion.schedule)
    hidden, dim = network.hidden, network.dim
    linear, silu = torch.nn.Linear, torch.nn.functional.silu

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Sequential(linear(16, 32), torch.nn.SiLU(), linear(32, 32), torch.nn.SiLU())
            self.read, self.write, self.skip = linear(dim, hidden), linear(hidden, dim), linear(32, dim)
            parts = (lambda: torch.nn.LayerNorm(hidden), lambda: linear(32, 2 * hidden), *(lambda: linear(hidden, hidden),) * 2)
            self.blocks = torch.nn.ModuleList(torch.nn.ModuleList(part() for part in parts) for _ in network.blocks)
            self.register_buffer("log_snr", torch.tensor(np.array(tables.log_snr)))
            self.register_buffer("frequencies", torch.tensor(np.geomspace(0.05, 5, 8), dtype=torch.float32))

        def forward(self, z, n):
            angles = self.log_snr[n - 1][:, None] * self.frequencies
            embedding = self.embed(torch.cat([angles.sin(), angles.cos()], -1))
            h = self.read(z)
            for norm, modulate, up, down in self.blocks:
                scale, shift = modulate(embedding).chunk(2, -1)
                h = h + down(silu(up(norm(h)) * (1 + scale) + shift))
            return self.write(silu(h)) + z * self.skip(embedding)

    return Net()


def loop_in_torch(diffusion, data, batch, iterations):
    """The same network, loss and optimiser in eager PyTorch."""
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    tables = Tables(diffusion.schedule)
    net = net_in_torch(diffusion).to(device)
    data, weight, alpha_bar = (torch.tensor(np.array(a), device=device) for a in (data, tables.weight, tables.alpha_bar))
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    average = [p.detach().clone() for p in net.parameters()]

    def run(count):
        for _ in range(count):
            x = data[torch.randint(len(data), (batch,), device=device)]
            n = torch.randint(1, tables.num_steps + 1, (batch,), device=device)
            eps, level = torch.randn_like(x), alpha_bar[n - 1][:, None]
            error = (eps - net(level.sqrt() * x + (1 - level).sqrt() * eps, n)).square().sum(-1)
            loss = (tables.num_steps * weight[n - 1] * error).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
            torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 0.001)
        return float(loss.detach())

    return run


class BetweenStretches:
    """A checkpoint that keeps nothing, but times the stretches of a fit, and the other loops between them."""

    def __init__(self, rivals, count):
        self.rivals, self.count, self.times, self.since = rivals, count, [], None

    def load(self, template):
        return None

    def save(self, state):
        now = time.perf_counter()
        if self.since is not None:
            others = [seconds(rival, self.count) for rival in self.rivals]
            self.times.append([now - self.since, *others])
        self.since = time.perf_counter()


def compare_steps(section, setting, diffusion, loops, batch, count):
    """Rows: an update of a fit, and one of each loop, a function of the data, the batch size and the number of iterations."""
    data = np.random.default_rng(0).normal(size=(2000, diffusion.dim)).astype(np.float32)
    iterations = count * (REPETITIONS + 3)
    between = BetweenStretches([loop(data, batch, iterations) for loop in loops.values()], count)
    options = {"iterations": iterations, "batch_size": batch, "validate_every": count, "ema_decay": 0.999}
    elbo = probdiff.AnalyticELBO(diffusion, "uniform")
    probdiff.fit(diffusion, data, elbo=elbo, checkpoint=between, progress=False, **options)
    times = np.array(between.times[2:]).T * 1e3 / count
    for name, other in zip(loops, times[1:]):
        report(section, f"{setting}, batch {batch}", times[0], other, ("fit", name))


if wanted("step"):
    for dim, hidden, batch in [(2, 8, 4)] if quick else [(2, 128, 128), (64, 256, 128), (64, 512, 512)]:
        diffusion = make(10 if quick else 1000, dim, hidden)
        loops = {"by hand": functools.partial(loop_by_hand, diffusion)}
        if torch is not None:
            loops["PyTorch"] = functools.partial(loop_in_torch, diffusion)
        compare_steps("step", f"dim {dim}, hidden {hidden}", diffusion, loops, batch, 5 if quick else 100)

# %% [markdown]
# ## Images
#
# The same comparison for a `UNet`, whose convolutions are matrix products, and for the same network with XLA's convolutions; and the time of an image in the terms
# of the bound, compared with the network alone on as many images.


# %%
class ConvolutionOfXLA(eqx.Module):
    """The same convolution by XLA."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, image, products=None):
        images = image.reshape(-1, *image.shape[-3:])
        out = jax.lax.conv_general_dilated(images, self.weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (out + self.bias).reshape(*image.shape[:-1], -1)


def with_convolutions_of_xla(network):
    def replaced(part):
        return ConvolutionOfXLA(part.weight, part.bias) if isinstance(part, Convolution) else part

    return jax.tree.map(replaced, network, is_leaf=lambda part: isinstance(part, Convolution))


if wanted("images"):
    side, channels, batch, num_blocks = (4, 2, 2, 1) if quick else (28, 64, 64, 2)
    size = {"channels": channels, "num_blocks": num_blocks}
    network, rounded_network = (probdiff.networks.UNet((side, side), key=KEY, products=products, **size) for products in (None, "bfloat16"))
    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(10 if quick else 1000), network)
    by_xla = diffusion.with_network(with_convolutions_of_xla(network))
    loops = {"by hand": functools.partial(loop_by_hand, diffusion), "with XLA's convolutions": functools.partial(loop_by_hand, by_xla)}
    setting = f"{side} × {side}, {channels} channels"
    compare_steps("images", setting, diffusion, loops, batch, 2 if quick else 4)
    if probdiff.networks.has_fast_bfloat16() and not quick:  # the default on such a device
        del loops["by hand"]
        compare_steps("images", f"bfloat16, {setting}", diffusion.with_network(rounded_network), loops, batch, 4)
    few = probdiff.Diffusion(probdiff.log_snr_schedule(4 if quick else 16), network).bind({})
    x, size = jax.random.normal(jax.random.key(1), (batch, side * side)), few.schedule.num_steps * batch
    z, log_snr, alone = jnp.tile(x, (few.schedule.num_steps, 1)), jnp.full(size, 0.3), eqx.filter_jit(network)
    times = in_turns(lambda: probdiff.elbo_terms(few, x, key=KEY).elbo, lambda: alone(z, log_snr)) / size
    report("images", f"evaluation, {setting}", *times, ("elbo_terms", "network"))


# %% [markdown]
# ## Time to quality
#
# Seconds of fitting until the bound of the test data has reached a value, by the defaults of `probdiff fit`, and by the same network, optimiser and
# schedule with the usual estimator, one uniform step per datum. Compilation is included. If a fit does not reach the value, there is no ratio.


# %%
class Clock:
    """A checkpoint that records the best averaged parameters at each time."""

    def __init__(self):
        self.start, self.states = time.perf_counter(), []

    def load(self, template):
        return None

    def save(self, state):
        self.states.append((time.perf_counter() - self.start, state.best))


def seconds_to(wanted, dataset, options, **usual):
    """Seconds of a fit until the bound of the test data reaches each of ``wanted``, in bits/dim or in nats of gap; infinite if never."""
    diffusion, clock = probdiff.presets.default_diffusion(dataset, options["num_steps"]), Clock()
    elbo = probdiff.AnalyticELBO(diffusion, **usual) if usual else None
    given = {name: options[name] for name in ("iterations", "batch_size", "learning_rate")}
    probdiff.fit(
        diffusion, dataset.train, validation=dataset.validation, validate_every=100, elbo=elbo, checkpoint=clock, progress=False, **given
    )
    test = dataset.test[:2000]
    found = []
    for when, params in clock.states:
        fitted = diffusion.bind(params)
        if fitted.kernel.is_estimated:
            fitted = probdiff.elbo.optimal_variance(fitted, dataset.train[:500], key=KEY)
        bound = probdiff.elbo.data_set_elbo(fitted, test, key=KEY).elbo.mean()
        loss = probdiff.elbo.bits_per_dim(bound, dataset.dim) if dataset.levels is not None else dataset.log_prob(test).mean() - bound
        found.append((when, loss))
    return [min((when for when, loss in found if loss <= each), default=np.inf) for each in wanted]


if wanted("quality"):
    for name, wanted_values, unit in (("digits", (1.85, 1.81), "bits/dim"), ("moons", (0.05, 0.03, 0.02), "nats of gap")):
        dataset = probdiff.datasets.load(name, 0)
        options = probdiff.presets.default_options(dataset)
        if quick:
            if name == "digits":  # whose network takes long to compile
                continue
            splits = {each: getattr(dataset, each)[:200] for each in ("train", "validation", "test")}
            dataset, wanted_values = dataclasses.replace(dataset, **splits), (1e6,)
            options |= {"iterations": 5, "num_steps": 8, "batch_size": 8}
        times = [seconds_to(wanted_values, dataset, options, **usual) for usual in ({}, {"steps": "uniform"})]
        for value, first, second in zip(wanted_values, *times):
            if np.isfinite([first, second]).all():
                report("quality", f"{name}, {value} {unit}", [first], [second], ("probdiff", "uniform"), "s")
            else:
                reached = [f"{each:.4g} s" if np.isfinite(each) else "not reached" for each in (first, second)]
                rows.append({"section": "quality", "setting": f"{name}, {value} {unit}", "unit": "s", "reached": reached})
                say(f"{'quality':11}{f'{name}, {value} {unit}':58}probdiff {reached[0]}  uniform {reached[1]}")

# %% [markdown]
# ## The objectives on all steps
#
# One SVI update through NumPyro is compared with `value_and_grad` by hand. By hand the path estimate runs the forward chain once and adds up
# log p − log q on the way; the analytic one evaluates all steps in one batch. The two must agree in value, within 4.9 standard errors.


# %%
def log_normal(x, mean, variance):
    return -((x - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance)).sum() / 2


def path_loss(network, tables, x, key):
    def step(carry, n):
        z, total, key = carry
        key, noise_key = jax.random.split(key)
        beta, variance, alpha_bar = tables.beta[n - 1], tables.variance[n - 1], tables.alpha_bar[n - 1]
        mean = jnp.sqrt(1 - beta) * z
        new = mean + jnp.sqrt(beta) * jax.random.normal(noise_key, z.shape)
        eps_hat = network(new, jnp.full(len(x), tables.log_snr[n - 1]))
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
    eps_hat = network(z, tables.log_snr[n - 1])
    kl = (tables.weight[1:, None] * ((eps - eps_hat)[1:] ** 2).sum(-1)).sum()
    beta, last = tables.beta[0], tables.alpha_bar[-1]
    mean = (z[0] - beta / jnp.sqrt(1 - tables.alpha_bar[0]) * eps_hat[0]) / jnp.sqrt(1 - beta)
    prior_kl = (last * x**2 - last - jnp.log1p(-last)).sum() / 2
    return prior_kl + kl - log_normal(x, mean, beta)


OPTIMISER = optax.adam(1e-3)


def update_by_hand(loss, diffusion, x):
    params, static = eqx.partition(diffusion.network, eqx.is_inexact_array)
    tables = Tables(diffusion.schedule)

    @jax.jit
    def update(key, params, optimiser_state):
        value, grads = jax.value_and_grad(lambda p: loss(eqx.combine(p, static), tables, x, key))(params)
        updates, optimiser_state = OPTIMISER.update(grads, optimiser_state)
        return value, optax.apply_updates(params, updates), optimiser_state

    state = params, OPTIMISER.init(params)
    return lambda key: update(key, *state)


def update_by_program(model, guide, elbo, x):
    svi = SVI(model, guide, OPTIMISER, elbo)
    state = jax.jit(svi.init)(jax.random.key(0), x)

    @jax.jit
    def update(key, state):
        new, value = svi.update(state._replace(rng_key=key), x)
        return value, new

    return lambda key: update(key, state)


def check_same(first, second):
    values = np.array([[first(key)[0], second(key)[0]] for key in jax.random.split(jax.random.key(2), 20)])
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    z = (values[:, 0].mean() - values[:, 1].mean()) / np.hypot(*error)
    assert abs(z) < 4.9, f"the two do not compute the same: {z:.1f} standard errors"


SIZES = [(5, 2, 16, 8)] if quick else [(100, 2, 128, 128), (100, 64, 256, 128), (1000, 2, 128, 32)]
if wanted("elbo"):
    for name, elbo, loss in (
        ("Trace_ELBO", lambda diffusion: Trace_ELBO(), path_loss),
        ("AnalyticELBO, all", probdiff.AnalyticELBO, analytic_loss),
    ):
        for num_steps, dim, hidden, batch in SIZES:
            x = jax.random.normal(jax.random.key(1), (batch, dim))
            diffusion = make(num_steps, dim, hidden)
            program = update_by_program(diffusion.model, diffusion.guide, elbo(diffusion), x)
            hand = update_by_hand(loss, diffusion, x)
            check_same(program, hand)
            times = in_turns(lambda p=program: p(KEY), lambda h=hand: h(KEY))
            setting = f"{name}: N {num_steps}, dim {dim}, hidden {hidden}, batch {batch}"
            report("elbo", setting, *times, ("program", "by hand"))


# %% [markdown]
# ## Parallel in n
#
# The programs with one site per chain (`ParallelPrograms`) are compared with the programs that scan: a `Trace_ELBO` update, its value alone, and a path of the forward chain.


# %%
def value_by_program(model, guide, x):
    elbo = Trace_ELBO()
    evaluate = jax.jit(lambda key: (elbo.loss(key, {}, model, guide, x),))
    return evaluate


if wanted("parallel"):
    for num_steps, dim, hidden, batch in SIZES if quick else [*SIZES, (1000, 64, 512, 8), (1000, 2, 128, 1)]:
        x = jax.random.normal(jax.random.key(1), (batch, dim))
        diffusion = make(num_steps, dim, hidden)
        programs = probdiff.programs.ParallelPrograms(diffusion)
        setting = f"N {num_steps}, dim {dim}, hidden {hidden}, batch {batch}"
        pairs = [update_by_program(each.model, each.guide, Trace_ELBO(), x) for each in (programs, diffusion)]
        check_same(*pairs)
        report("parallel", f"update: {setting}", *in_turns(*(lambda p=p: p(KEY) for p in pairs)), ("parallel", "scan"))
        bound = diffusion.bind({})
        pairs = [value_by_program(each.model, each.guide, x) for each in (probdiff.programs.ParallelPrograms(bound), bound)]
        report("parallel", f"value: {setting}", *in_turns(*(lambda p=p: p(KEY) for p in pairs)), ("parallel", "scan"))
        paths = [
            jax.jit(lambda key, g=each.guide, x=x: handlers.trace(handlers.seed(g, key)).get_trace(x)["z"]["value"])
            for each in (programs, diffusion)
        ]
        report("parallel", f"path: {setting}", *in_turns(*(lambda p=p: p(KEY) for p in paths)), ("parallel", "scan"))

# %% [markdown]
# ## Compilation and working memory against N
#
# Seconds to compile, and bytes of working memory besides arguments and results, relative to N = 10: for a training step with one uniform step per datum, for
# one on all steps, and for `elbo_terms` in its reduced form. Then, for the update of a default fit: XLA with the options that a fit and the
# commands set, against its defaults.


# %%
def lowered(kind, num_steps):
    diffusion, x = make(num_steps, 2, 128), jnp.ones((2048 if kind == "elbo_terms" else 128, 2))
    if kind == "elbo_terms":
        return jax.jit(
            lambda x, key: probdiff.elbo_terms(diffusion, x, key=key, num_draws=2, reduce=True)
        ).lower(x, KEY)
    svi = SVI(diffusion.model, diffusion.guide, OPTIMISER, probdiff.AnalyticELBO(diffusion, kind))
    return jax.jit(svi.update).lower(jax.eval_shape(svi.init, KEY, x), x)


def compiled(kind, num_steps):
    """Seconds to trace and compile, and bytes."""
    jax.clear_caches()
    start = time.perf_counter()
    executable = lowered(kind, num_steps).compile()
    return time.perf_counter() - start, executable.memory_analysis().temp_size_in_bytes


def updates_by_options(name):
    """Seconds to compile an update of a default fit with probdiff's options of XLA and without, shape ``(repetition, 2)``, and milliseconds of the update,
    ``(2, repetition)``."""
    dataset = probdiff.datasets.load(name)
    options = probdiff.presets.default_options(dataset)
    diffusion, x = probdiff.presets.default_diffusion(dataset, options["num_steps"]), dataset.train[: 8 if quick else options["batch_size"]]
    elbo = probdiff.AnalyticELBO(diffusion, "stratified_importance", points="batch")
    svi = SVI(diffusion.model, elbo.guide, OPTIMISER, elbo)
    state, choices = jax.jit(svi.init)(KEY, x), [compiler_options(), {}]
    times = []
    for _ in range(1 if quick else 3):
        jax.clear_caches()
        programs = [jax.jit(svi.update).lower(state, x) for _ in choices]
        times.append([seconds(program.compile, options) for program, options in zip(programs, choices)])
    with_options, without = (functools.partial(program.compile(options), state, x) for program, options in zip(programs, choices))
    updates = in_turns(with_options, without, without, with_options)  # the place in a turn counts
    return np.array(times), (updates[[0, 3]].mean(0), updates[[1, 2]].mean(0))


if wanted("compile"):
    for name in ("moons",) if quick else ("moons", "digits"):
        times, updates = updates_by_options(name)
        report("compile", f"update of {name}", *times.T, ("options", "none"), "s")
        report("step", f"update of {name}", *updates, ("options", "none"))
    for kind in ("uniform",) if quick else ("uniform", "all", "elbo_terms"):
        for num_steps in (20,) if quick else (100, 1000, 10_000):
            pairs = np.array([(compiled(kind, num_steps), compiled(kind, 10)) for _ in range(1 if quick else 3)])
            setting = f"{kind}, N {num_steps}"
            report("compile", setting, *pairs[:, :, 0].T, ("this N", "N 10"), "s")
            report("memory", setting, *pairs[:, :, 1].T / 2**20, ("this N", "N 10"), "MiB")

# %% [markdown]
# ## Evaluation of all steps
#
# Network evaluations per second of `elbo_terms`, and the rate of its matrix products as a share of the machine's peak: the fastest of a few large products,
# measured in the same turns.

# %%
if wanted("evaluation"):
    dim, hidden, num_steps, size = (4, 16, 10, 8) if quick else (64, 512, 100, 512)
    diffusion = make(num_steps, dim, hidden).bind({})
    x = jax.random.normal(jax.random.key(1), (size, dim))
    products = [dim * hidden, hidden * dim, 32 * dim] + [32 * 2 * hidden + 2 * hidden * hidden] * 3 + [16 * 32 + 32 * 32]
    operations = 2 * sum(products) * num_steps * size
    sides = (64,) if quick else (1024, 2048, 4096)
    squares = [jax.random.normal(KEY, (side, side)) for side in sides]
    product = jax.jit(jnp.matmul)
    times = in_turns(
        lambda: probdiff.elbo_terms(diffusion, x, key=KEY).elbo, *(lambda a=a: product(a, a) for a in squares)
    )
    peak = np.max([2 * side**3 / times[1 + i] for i, side in enumerate(sides)], 0) / 1e6
    report("evaluation", f"dim {dim}, hidden {hidden}, N {num_steps}, {size} data", operations / times[0] / 1e6, peak, ("elbo_terms", "peak"), "GFLOP/s")
    rate = num_steps * size / times[0] * 1e3
    say(f"{'':11}{np.median(rate):.4g} network evaluations per second")

# %% [markdown]
# ## What a network evaluation costs
#
# Time per network evaluation in the terms of the bound, in the estimators of `compare_estimators` and in each sampler, compared with the network alone on as
# many rows. (For the terms and the samplers, evaluations are counted in a run.)


# %%
class Counted(probdiff.networks.AbstractNetwork):
    """A network that counts the rows that it evaluates."""

    inner: probdiff.MLP
    counted: list = eqx.field(static=True)

    @property
    def dim(self):
        return self.inner.dim

    def __call__(self, z, log_snr, *, key=None):
        jax.debug.callback(lambda: self.counted.append(log_snr.size))
        return self.inner(z, log_snr)


def evaluations(call, diffusion):
    """The number of rows that the network evaluates in ``call(diffusion)``."""
    counted = []
    call(diffusion.with_network(Counted(diffusion.network, counted)))
    jax.effects_barrier()
    return sum(counted)


if wanted("costs"):
    dim, hidden, num_steps, size = (2, 8, 5, 8) if quick else (64, 256, 100, 512)
    diffusion = make(num_steps, dim, hidden).bind({})
    network = eqx.filter_jit(diffusion.network)
    x = jax.random.normal(jax.random.key(1), (size, dim))
    z, log_snr = jax.random.normal(KEY, (size, dim)), jnp.full(size, 0.3)
    alone = in_turns(lambda: network(z, log_snr))[0] / size
    calls = {
        "elbo_terms": lambda diffusion: probdiff.elbo_terms(diffusion, x, key=KEY).elbo,
        "elbo_terms, reduced": lambda diffusion: probdiff.elbo_terms(diffusion, x, key=KEY, reduce=True).elbo.mean,
        "data_set_elbo": lambda diffusion: probdiff.elbo.data_set_elbo(diffusion, x, key=KEY).elbo,
    }
    for name, sampler in probdiff.samplers.SAMPLERS.items():
        calls[f"sampler {name}"] = lambda diffusion, sampler=sampler: sampler(diffusion, key=KEY, num_samples=size)
    for name, call in list(calls.items())[2:4] if quick else calls.items():
        times = in_turns(lambda call=call: call(diffusion))[0] / evaluations(call, diffusion)
        report("costs", f"{name}, dim {dim}, hidden {hidden}", 1e3 * times, 1e3 * alone, ("there", "network"), "µs")
    comparison = probdiff.compare_estimators(diffusion, x[:8], key=KEY, num_draws=8, estimators=["kl_marginal", "kl_combined"])
    for name, row in comparison.table.iterrows():
        there = 1e6 * row["seconds"] / (row["evaluations"] * 8)
        report("costs", f"compare_estimators, {name}", [there], [1e3 * np.median(alone)], ("there", "network"), "µs")

# %% [markdown]
# ## A network of PyTorch
#
# Calls of a module through `from_torch` in a compiled loop are compared with as many calls of the module itself, and a whole sampler with the calls that it needs.

# %%
if wanted("torch") and torch is not None:
    dim, hidden, batch, num_steps = (2, 8, 4, 5) if quick else (64, 512, 256, 100)
    diffusion = make(num_steps, dim, hidden)
    module = net_in_torch(diffusion).eval()
    network = probdiff.networks.from_torch(module)
    z, n = jax.random.normal(KEY, (batch, dim)), jnp.full(batch, 3)
    tensors = torch.from_numpy(np.array(z)), torch.from_numpy(np.array(n)).long()
    np.testing.assert_allclose(network(z, n), module(*tensors).detach(), rtol=1e-3, atol=1e-4)

    @jax.jit
    def in_loop(z):
        # (Each call depends on the one before; otherwise the compiler would merge them.)
        return jax.lax.fori_loop(0, num_steps, lambda _, z: (z + network(z, n)) / 2, z)

    @torch.no_grad()
    def directly():
        return sum(module(*tensors) for _ in range(num_steps))

    sampled = diffusion.with_network(network).bind({})
    times = in_turns(lambda: in_loop(z), directly, lambda: probdiff.samplers.ancestral(sampled, key=KEY, num_samples=batch))
    setting = f"{num_steps} calls, dim {dim}, hidden {hidden}, batch {batch}"
    report("torch", setting, times[0], times[1], ("from_torch", "module"))
    report("torch", f"ancestral, {setting}", times[2], times[1], ("sampler", "module"))

# %% [markdown]
# ## Precision
#
# The bound in float32 is compared with float64 on the same noise, and so is the bound with the factors of every matrix product of the network rounded to bfloat16
# (sums in float32), as on accelerators; on CPU JAX has no such setting, so that the script rounds them itself. The network is untrained, with noise in its weights.


# %%
class Rounded(eqx.Module):
    """A linear layer whose factors are rounded to bfloat16."""

    layer: eqx.nn.Linear

    def __call__(self, x):
        weight, x = (a.astype(jnp.bfloat16) for a in (self.layer.weight, x))
        return jnp.matmul(weight, x, preferred_element_type=jnp.float32) + self.layer.bias


def rounded(diffusion):
    def is_linear(node):
        return isinstance(node, eqx.nn.Linear)

    network = jax.tree.map(lambda node: Rounded(node) if is_linear(node) else node, diffusion.network, is_leaf=is_linear)
    return probdiff.Diffusion(diffusion.schedule, network).bind({})


def noisy_weights(num_steps, dim, hidden):
    random = np.random.default_rng(2)
    trainable = make(num_steps, dim, hidden).trainable()
    return jax.tree.map(lambda a: np.asarray(a) + 0.02 * random.standard_normal(a.shape).astype(np.float32), trainable)


def bounds(precision, weights, num_steps, dim, hidden, size):
    noise = np.random.default_rng(0).standard_normal((1, num_steps, size, dim))
    x = np.random.default_rng(1).standard_normal((size, dim))
    with jax.enable_x64(precision == "float64"):
        dtype = np.float64 if precision == "float64" else np.float32
        own = jax.tree.map(lambda a: jnp.asarray(a.astype(dtype)), weights)
        diffusion = make(num_steps, dim, hidden).bind({"diffusion$params": own})
        diffusion = rounded(diffusion) if precision == "bfloat16" else diffusion
        return np.asarray(probdiff.elbo_terms(diffusion, x.astype(dtype), noise=noise.astype(dtype)).elbo[0], np.float64)


if wanted("precision"):
    for num_steps in (10,) if quick else (100, 1000, 10_000):
        size = (num_steps, 4, 16, 3) if quick else (num_steps, 64, 256, 8)
        weights = noisy_weights(*size[:3])
        exact = bounds("float64", weights, *size)
        for precision in ("float32", "bfloat16"):
            change = bounds(precision, weights, *size) - exact
            rows.append({"section": "precision", "setting": f"{precision}, N {num_steps}", "unit": "nats", "change": np.abs(change).max()})
            say(f"{'precision':11}{f'{precision} products, N {num_steps}, dim {size[1]}':58}bound {exact.mean():.1f}, changed by at most {np.abs(change).max():.2g} nats")

# %% [markdown]
# ## Start-up
#
# Importing probdiff is compared with importing NumPyro, and a second small `probdiff fit`, which finds the code that the first one compiled, with the first.


# %%
def start(*command, **environment):
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    return time.perf_counter() - begin


if wanted("start"):
    count = 1 if quick else 11
    for name in () if quick else ("numpyro", "probdiff"):
        start(sys.executable, "-c", f"import {name}")
    times = np.array(
        [[start(sys.executable, "-c", f"import {name}") for name in ("probdiff", "numpyro")] for _ in range(count)]
    ).T
    report("start", "import", *times, ("probdiff", "NumPyro"), "s")
    extra = np.median(times[0] - times[1])
    say(f"{'':11}probdiff takes {extra:.2f} s more than NumPyro")
    command = [sys.executable, "-m", "probdiff.cli", "fit", "--num-steps", "5", "--iterations", "5", "--batch-size", "8"]
    pairs = []
    for _ in range(0 if quick else 3):
        with tempfile.TemporaryDirectory() as folder:
            data = os.path.join(folder, "x.npy")
            np.save(data, np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32))
            out = [[*command, "--data", data, "--out", os.path.join(folder, run)] for run in ("first", "second")]
            pairs.append([start(*each, XDG_CACHE_HOME=folder) for each in out])
    if pairs:
        first, second = np.array(pairs).T
        report("start", "probdiff fit, a second time", second, first, ("second", "first"), "s")

if arguments.json:
    print(json.dumps({"machine": machine, "jax": jax.__version__, "rows": rows}))
