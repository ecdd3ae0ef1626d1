"""What tests/test_sharding.py runs on one device and on four, or in two processes: fits and evaluations, into .npz files."""

import sys
from pathlib import Path

import jax
import numpy as np

import probdiff

folder, *process = sys.argv[1:]
if process:
    jax.distributed.initialize(process[0], 2, int(process[1]))

X = np.random.default_rng(0).normal(size=(41, 2))
C = X[::-1] + 0.5
STOP = 100


class Keeper:
    """A checkpoint in memory; it can start a fit from a state of another."""

    def __init__(self, state=None):
        self.state = state

    def load(self, template):
        return self.state

    def save(self, state):
        self.state = state if len(state.losses) == STOP else self.state


def everything(devices):
    """By name: losses, parameters and evaluations, of a conditional model: rows of the data and of the context are cut alike."""
    with jax.enable_x64(True):
        network = probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1, dropout=0.2, context_dim=2)
        model = probdiff.Diffusion(probdiff.log_snr_schedule(6), network)
        # 30 data and 41 cannot be cut into four equal parts.
        options = {"context": C, "iterations": 200, "batch_size": 30, "validate_every": STOP, "progress": False}
        keeper = Keeper()
        fit = probdiff.fit(model, X, devices=devices, checkpoint=keeper, **options)
        if devices:
            resumed = probdiff.fit(model, X, checkpoint=Keeper(keeper.state), **options)
            np.testing.assert_allclose(resumed.losses, fit.losses, rtol=1e-10)
        found = {"losses": fit.losses, "parameters": np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(fit.params)])}
        options = {"key": jax.random.key(1), "devices": devices}
        found |= {
            "elbo": probdiff.elbo_terms(fit.diffusion, X, num_draws=2, context=C, **options).elbo,
            "samples": probdiff.samplers.ancestral(fit.diffusion, context=C[:7], **options),
        }
        if not process:
            moments = probdiff.elbo_terms(fit.diffusion, X, num_draws=2, reduce=True, context=C, **options)
            comparison = probdiff.compare_estimators(fit.diffusion, X[:2], num_draws=3, estimators=["kl_uniform"], context=C[:2], **options)
            found |= {
                "mean": moments.elbo.mean,
                "estimates": comparison.draws,
                "gradients": comparison.projections["kl_uniform"],
                "paths": probdiff.elbo.path_elbo(fit.diffusion, X[:5], num_draws=2, context=C[:5], **options),
            }
    return found


for where, devices in {"two processes": 2}.items() if process else {"one": None, "four": 4}.items():
    found = everything(devices)
    if jax.process_index() == 0:
        np.savez(Path(folder) / f"{where}.npz", **found)
