# %% [markdown]
# # Do the tests notice a bug?
#
# Each line of the table below is a bug that somebody could make (several have been published) and the tests that are there to catch it.
# The bugs are put into a copy of the package one at a time; the named tests, which pass without, must then fail.

# %%
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

parser = argparse.ArgumentParser(description="Do the tests notice a bug?")
parser.add_argument("--quick", action="store_true", help="two bugs, to see that it runs")
quick = parser.parse_args().quick

ROOT = Path(__file__).parent.parent

# %% [markdown]
# The bug in words; file; what stands there; what the bug makes of it; the tests.

# %%
BUGS = [
    # the mathematics
    ("β̃ with ᾱ of the same step", "schedules.py", "self.one_minus_alpha_bar[:-1]])", "self.one_minus_alpha_bar[1:]])", "schedules properties"),
    ("ᾱ for its root in the marginal", "gaussians.py", "jnp.sqrt(alpha_bar)[..., None] * x0", "alpha_bar[..., None] * x0", "gaussians"),
    ("v_1 is β̃_1", "kernels.py", "xp.broadcast_to(beta[:1]", "xp.broadcast_to(posterior[:1]", "oracle"),
    ("½ missing in the step KL", "kernels.py", "/ (2 * schedule.alpha", "/ (schedule.alpha", "oracle"),
    ("log-variance missing in the step KL", "kernels.py", "(xp.expm1(-log_ratio) + log_ratio) / 2", "xp.expm1(-log_ratio) / 2", "oracle"),
    ("the prior KL dropped", "elbo.py", "self.reconstruction - self.step_kl.sum(1) - self.prior_kl", "self.reconstruction - self.step_kl.sum(1)", "oracle"),
    ("mean over the dimensions for the sum", "kernels.py", "* squared).sum(-1)", "* squared).mean(-1)", "estimators"),
    ("the forward guide in ascending order", "programs.py", "self._descending_steps(), reverse=True)", "self._descending_steps()[::-1])", "programs"),
    ("σ for σ² in the noising", "score.py", "jnp.square(_at(schedule, _sigma, n, x0))[..., 0]", "_at(schedule, _sigma, n, x0)[..., 0]", "score"),
    ("the network is given x_n for z_n", "score.py", "vp_from_ve(diffusion.schedule, x_n, n), n)", "x_n, n)", "score"),
    ("weights of scores for weights of noise", "score_matching.py", "weights / diffusion.schedule.sigma**2", "weights", "score_matching"),
    ("the sign of the divergence", "flow.py", "np.asarray(base(end))) + change", "np.asarray(base(end))) - change", "flow"),
    ("twice the drift of Langevin's step", "sampling.py", "drift = size / 2 * score", "drift = size * score", "sampling"),
    ("η for η² in DDIM", "sampling.py", "eta**2 * noise_before", "eta * noise_before", "sampling"),
    ("the same noise in every batch of samples", "sampling.py", "start + np.arange(batch)", "np.arange(batch)", "sampling"),
    # the parts of a model
    ("the evidence of z_n without its ½", "heads.py", "jnp.square(distance) / 2", "jnp.square(distance)", "heads"),
    ("the noise for its root in a head", "heads.py", "jnp.sqrt(noise) * self.output", "noise * self.output", "heads"),
    ("the SNR gained at another step", "mixture_kernel.py", "gained = snr[:-1]", "gained = snr[1:]", "heads"),
    ("the schedule of the guide is not trained", "programs.py", "else self.with_param_site().schedule", "else self.schedule", "learned"),
    ("the optimal variance without β̃", "variances.py", "jnp.log1p(jnp.asarray(factor", "jnp.log(jnp.asarray(factor", "learned"),
    ("the shape of the schedule raises the variance", "objective.py", "jax.lax.stop_gradient(mean_square) - mean_square", "mean_square - jax.lax.stop_gradient(mean_square)", "learned"),
    ("the sum of an ensemble for its mean", "networks.py", " / len(self.networks)", "", "networks"),
    ("the last part of the steps is counted twice", "elbo.py", "jnp.where(new[:, None], kl, 0).sum(0)", "kl.sum(0)", "elbo"),
    # parallel in n, and on several devices
    ("maps composed in the wrong order", "parallel.py", "later[0] * earlier[1] + later[1]", "earlier[0] * later[1] + earlier[1]", "parallel"),
    ("a path that begins at 0", "parallel.py", "        added = added.at[-1].add(factor[-1] * x0)", "        added = added", "parallel"),
    ("the network is told the step before", "parallel.py", "self.steps[:-1, 0], path[:-1]", "self.steps[1:, 0], path[:-1]", "parallel"),
    ("the whole batch on each device", "training.py", "spread(data[self._rows(key, iteration)], self.mesh)", "data[self._rows(key, iteration)]", "devices"),
    # files
    ("a checksum that is not looked at", "storage.py", "hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]", "True", "runs"),
    ("arrays written in place", "storage.py", "    replace(path, lambda temporary: temporary.write_bytes(content))", "    path.write_bytes(content)", "runs"),
    ("no previous checkpoint", "checkpoint.py", "if is_intact(self.path):", "if False:", "runs"),
    ("a damaged checkpoint replaces the previous one", "checkpoint.py", "if is_intact(self.path):", "if self.path.exists():", "runs"),
    ("sizes in a header are believed", "storage.py", "expected == size - file.tell() and", "", "runs datasets"),
    ("objects are loaded", "storage.py", "not dtype.hasobject", "True", "datasets"),
    ("a folder that exists is written into", "runs.py", "require_type(\"diffusion\", diffusion, Diffusion)\n    path = Path(path)\n    check_free(path)", "path = Path(path)", "runs"),
    ("a figure is overwritten", "runs.py", "for each in paths:\n            require(not each.exists()", "for each in paths[:1]:\n            require(not each.exists()", "cli"),
    # the fit
    ("an update that is not finite is taken", "training.py", "jax.lax.cond(good, lambda", "jax.lax.cond(True, lambda", "training"),
    ("updates that are not finite are not noticed", "training.py", "        if not good:", "        if False:", "training"),
    ("a resumed fit may be asked for anything", "training.py", "require(saved == value, name", "require(True, name", "training"),
    ("the keys of a resumed fit are new", "training.py", "state = (checkpoint and checkpoint.load(state)) or state", "fresh = state\n    state = (checkpoint and checkpoint.load(state)) or state\n    state = state._replace(keys=fresh.keys)", "training"),
    ("the position in the data is lost on a resume", "training.py", "        start = len(state.losses)\n        given", "        start = 0\n        given", "training"),
    ("data rows by the wrong key", "training.py", "jax.random.fold_in(key, iteration)", "jax.random.fold_in(key, 0)", "training"),
]  # fmt: skip


# %%
def tests(names, folder):
    """Run some test files on the package in ``folder``, up to the first failure; its name, or None if all pass."""
    files = [f"tests/test_{name}.py" for name in names.split()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout[-2000:]
    return next((line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR "))), None)


folder = Path(tempfile.mkdtemp())
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
for name in ("probdiff", "tests"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
bugs = [bug for bug in BUGS if bug[4] in ("gaussians", "schedules properties")][:2] if quick else BUGS

survivors = []
for words, file, right, wrong, names in tqdm(bugs, unit="bug"):
    path = folder / "probdiff" / file
    text = path.read_text()
    assert right in text, f"{file}: the line of the bug '{words}' has changed"
    path.write_text(text.replace(right, wrong, 1))
    caught = tests(names, folder)
    path.write_text(text)
    survivors += [words] * (caught is None)
    tqdm.write(f"{words:48}{file:20}{'caught by ' + caught if caught else 'NOT CAUGHT'}")

# %%
print(f"{len(bugs) - len(survivors)} of {len(bugs)} bugs were caught")
assert not survivors, survivors
