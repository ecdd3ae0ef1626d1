"""Several devices, and several processes, against one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probdiff
from probdiff._devices import data_mesh

SCRIPT = Path(__file__).with_name("on_devices.py")
FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


def run(*command, **environment):
    return subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def wait(*processes):
    for process in processes:
        _, problems = process.communicate(timeout=300)
        assert process.returncode == 0, problems[-3000:]


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the script finds, by where it ran: a function of the place."""
    folder = tmp_path_factory.mktemp("devices")

    def found(where):
        if where == "two processes":
            address = free_address()
            wait(*(run(SCRIPT, folder, address, process) for process in (0, 1)))
        return dict(np.load(folder / f"{where}.npz"))

    wait(run(SCRIPT, folder, **FOUR))
    return found


@pytest.mark.release
@pytest.mark.xdist_group("devices")
@pytest.mark.parametrize("where", ["four", "two processes"])
def test_the_result_is_that_of_one_device(results, where):
    """Losses of 200 updates and parameters; resumed on one device (in the script); evaluations: in float64, where a wrong row is no rounding."""
    found, one = results(where), results("one")
    assert len(found["losses"]) == 200 and found["losses"].dtype == np.float64
    for name in found:
        np.testing.assert_allclose(found[name], one[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.release
@pytest.mark.xdist_group("devices")
def test_the_command_in_two_processes(tmp_path):
    """Both run the same command; the first writes the run, which one process can open; the losses are those of one process."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32))
    small = ["--data", tmp_path / "x.npy", "--num-steps", 4, "--iterations", 20, "--batch-size", 8]
    together = ["--out", tmp_path / "both", "--coordinator", free_address(), "--processes", 2, "--json"]
    wait(*(run("-m", "probdiff.cli", "fit", *small, *together, "--process", process) for process in (0, 1)))
    both = probdiff.open_run(tmp_path / "both")
    data, same = both.data, {name: both.config[name] for name in ("iterations", "batch_size", "learning_rate")}
    key, _ = jax.random.split(jax.random.key(both.config["seed"]))
    one = probdiff.fit(both.untrained, data.train, validation=data.validation, key=key, progress=False, **same)
    np.testing.assert_allclose(both.losses, one.losses, rtol=1e-5)


def test_the_work_is_shared():
    """A quarter of the arithmetic on each of four devices, for an update and for the terms of the bound."""
    code = """if True:
        import jax, jax.numpy as jnp, probdiff
        from probdiff._devices import data_mesh, replicate
        from probdiff.elbo.terms import _evaluate
        from probdiff.training.loop import Loop
        from probdiff.training.minibatches import Minibatches
        from probdiff.training.optimiser import build_optimiser
        network = probdiff.MLP(8, key=jax.random.key(0), hidden=64, num_blocks=2)
        model, x = probdiff.Diffusion(probdiff.log_snr_schedule(5), network), jnp.ones((256, 8))
        def flops(devices):
            mesh = data_mesh(devices)
            loop = Loop(model, x, None, Minibatches(len(x), 256, None), build_optimiser(1e-3, 10, 0.9), None, mesh)
            state = replicate(loop.init(jax.random.key(0), {}), mesh)
            update = loop._advance.lower(state.svi, loop.data, state.keys[0], 0, 10, False).compile()
            given = replicate((model.bind({}), x, jax.random.key(0), jnp.arange(2), jnp.arange(2, 6)), mesh)
            terms = _evaluate.lower(*given, True, None, mesh).compile().compiled
            return [compiled.cost_analysis()["flops"] for compiled in (update, terms)]
        for one, four in zip(flops(None), flops(4)):
            assert four < 0.35 * one, (one, four)
    """
    wait(run("-c", code, **FOUR))


@pytest.mark.parametrize(
    "devices, error, match",
    [
        (0, ValueError, "devices: Expected 1 to 1, the devices that JAX has; got 0"),
        (2, ValueError, "devices: Expected 1 to 1, the devices that JAX has; got 2"),
        (1.0, TypeError, "devices: Expected a number of devices, or a list of JAX devices; got 1.0"),
        (True, TypeError, "devices: Expected a number"),
        ([], TypeError, "devices: Expected a number"),
        (["cpu"], TypeError, "devices: Expected a number"),
        (jax.devices()[:1] * 2, ValueError, "devices: Expected different devices"),
    ],
)
def test_what_it_refuses(devices, error, match):
    diffusion = probdiff.Diffusion(probdiff.log_snr_schedule(3), lambda z, n: z, dim=2)
    with pytest.raises(error, match=match):
        probdiff.elbo_terms(diffusion, jnp.ones((2, 2)), key=jax.random.key(0), devices=devices)


def test_a_list_of_devices():
    assert data_mesh(jax.devices()).size == len(jax.devices())
    assert data_mesh(None) is None
