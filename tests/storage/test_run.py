"""Run folders and exports: what was saved comes back bitwise; nothing is overwritten; damage is named."""

import contextlib
import dataclasses
import hashlib
import io
import json
import pickle
import resource
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import release_but

import probdiff
from probdiff.diagnostics.datatree import from_datatree
from probdiff.storage import files as storage
from probdiff.storage import run as runs
from probdiff.storage.checkpoint import read_leaves, save_tree

X = np.random.default_rng(0).normal(3, 2, (300, 2)).astype(np.float32)


def npy_header(**header):
    """The beginning of an array in a file."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"fortran_order": False} | header)
    return buffer.getvalue()


class Custom(eqx.Module):
    weight: jax.Array

    def __call__(self, z, n):
        return z * self.weight


def make(network=None, num_steps=6):
    network = network or probdiff.MLP(2, key=jax.random.key(4), hidden=8, num_blocks=1, dropout=0.1)
    likelihood = probdiff.NormalLikelihood.standardized(X)
    return probdiff.Diffusion(probdiff.log_snr_schedule(num_steps), network, likelihood, "forward", dim=2)


def fitted_run(path, diffusion, **config):
    run = probdiff.storage.create_run(path, diffusion, config)
    fit = probdiff.fit(diffusion, X, iterations=20, batch_size=16, checkpoint=run.checkpoint, progress=False)
    terms = probdiff.elbo_terms(fit.diffusion, X[:9], key=jax.random.key(0), num_draws=3)
    run.save(fit=fit, terms=terms)
    return fit, terms


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype


@pytest.mark.long
@pytest.mark.parametrize("num_steps", release_but([6], [1, 6]))
def test_a_run_comes_back(tmp_path, num_steps):
    diffusion = make(num_steps=num_steps)
    fit, terms = fitted_run(tmp_path / "run", diffusion, data="moons", seed=5)
    run = probdiff.open_run(tmp_path / "run")
    assert_same(run.diffusion.trainable(), fit.diffusion.trainable())
    assert run.diffusion.schedule == diffusion.schedule and run.diffusion.likelihood == diffusion.likelihood
    assert run.diffusion.kernel == diffusion.kernel and run.diffusion.training is False
    assert_same(run.terms, terms)
    np.testing.assert_allclose(run.losses, fit.losses, rtol=1e-6)
    assert run.data.name == "moons" and run.config["seed"] == 5
    key = jax.random.key(1)
    assert_same(*(probdiff.elbo_terms(d, X[:4], key=key) for d in (run.diffusion, fit.diffusion)))


def test_the_best_so_far_is_in_the_checkpoint(tmp_path):
    """Of a run that has not ended; not the last parameters, which a large learning rate has made worse; none without validation."""
    run = probdiff.storage.create_run(tmp_path / "run", make())
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint of a fit with validation data"):
        _ = run.best_so_far
    options = {"iterations": 20, "batch_size": 16, "validate_every": 5, "learning_rate": 1.0, "checkpoint": run.checkpoint, "progress": False}
    fit = probdiff.fit(run.untrained, X, validation=X[:20] + 9, **options)
    bounds = fit.validation[:, 1]
    best = probdiff.open_run(run.path).best_so_far
    assert_same(best.trainable(), fit.diffusion.trainable())
    assert bounds.argmax() < len(bounds) - 1 and best.frozen
    unvalidated = probdiff.storage.create_run(tmp_path / "unvalidated", make())
    probdiff.fit(unvalidated.untrained, X, **options | {"checkpoint": unvalidated.checkpoint, "iterations": 5})
    with pytest.raises(FileNotFoundError, match="before the first validation"):
        _ = unvalidated.best_so_far


@pytest.mark.release
def test_a_run_of_single_precision_opens_in_double_and_not_the_other_way_round(tmp_path):
    """No number changes on the way up; on the way down, and for a fit to go on, it says what to set."""
    single, _ = fitted_run(tmp_path / "single", make())
    with jax.enable_x64(True):
        run = probdiff.open_run(tmp_path / "single")
        for a, b in zip(*(jax.tree.leaves(d.trainable()) for d in (run.diffusion, single.diffusion)), strict=True):
            assert a.dtype == np.float64 and np.array_equal(a, b)
        assert probdiff.elbo_terms(run.diffusion, X[:4].astype(np.float64), key=jax.random.key(0)).elbo.dtype == np.float64
        with pytest.raises(ValueError, match="Expected arrays of int64, .* got int32: the fit had JAX_ENABLE_X64=0; set it so"):
            probdiff.fit(run.untrained, X, iterations=20, batch_size=16, checkpoint=run.checkpoint, progress=False)
        fitted_run(tmp_path / "double", make())
    with pytest.raises(ValueError, match="Expected arrays of float32, .* got float64: the fit had JAX_ENABLE_X64=1; set it so"):
        _ = probdiff.open_run(tmp_path / "double").diffusion


def test_discretised_run_comes_back(tmp_path):
    diffusion = probdiff.Diffusion(
        probdiff.cosine_schedule(4),
        probdiff.MLP(2, key=jax.random.key(0), hidden=8, num_blocks=1),
        probdiff.DiscretizedNormalLikelihood(levels=7),
    )
    run = probdiff.storage.create_run(tmp_path / "run", diffusion)
    assert probdiff.open_run(run.path).untrained.likelihood == diffusion.likelihood
    with pytest.raises(FileNotFoundError, match="Expected a finished run"):
        _ = run.diffusion
    with pytest.raises(ValueError, match="without 'data'"):
        _ = run.data


@pytest.mark.long
@pytest.mark.parametrize("like", ["network", "diffusion"])
def test_a_custom_network_needs_like(tmp_path, like):
    network = Custom(jnp.array([0.1, 0.2]))
    fit, _ = fitted_run(tmp_path / "run", make(network))
    with pytest.raises(ValueError, match="like: Expected .* custom network Custom"):
        _ = probdiff.open_run(tmp_path / "run").diffusion
    structure = network if like == "network" else make(network)
    assert_same(probdiff.open_run(tmp_path / "run", like=structure).diffusion.trainable(), fit.diffusion.trainable())
    with pytest.raises(ValueError, match="of a run with other options"):
        _ = probdiff.open_run(tmp_path / "run", like=Custom(jnp.zeros(3))).diffusion


def same_data(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and isinstance(y, np.ndarray)
            np.testing.assert_array_equal(x, y)
        elif field.name == "rows":
            np.testing.assert_equal(x, y)
        elif field.name != "oracle":
            assert x == y, field.name


def test_the_data_of_a_run_come_back(tmp_path):
    """In their precision, with the names and kinds of columns, and the density of the planar sets; a run without them names the remedy."""
    frame = pd.DataFrame({"id": range(40), "size": np.random.default_rng(0).normal(size=40), "kind": pd.Categorical(list("abca") * 10)})
    table = probdiff.datasets.split(frame, index="id", name="mine")
    mixed = probdiff.Diffusion(probdiff.cosine_schedule(4), lambda z, n: z, table.likelihood(), dim=4)
    run = probdiff.storage.create_run(tmp_path / "table", mixed, {"note": "mine"}, table)
    found = probdiff.open_run(run.path).data
    same_data(table, found)
    assert table.discrete and run.config["note"] == "mine" and "data" not in run.config
    grid = dataclasses.replace(probdiff.datasets.split(np.arange(160).reshape(40, 4) % 3), image_shape=(2, 2))
    plain = probdiff.Diffusion(probdiff.cosine_schedule(4), lambda z, n: z, grid.likelihood(), dim=4)
    same_data(grid, probdiff.storage.create_run(tmp_path / "grid", plain, data=grid).data)
    double = dataclasses.replace(probdiff.datasets.split(X), test=X.astype(np.float64) / 3)
    same_data(double, probdiff.storage.create_run(tmp_path / "double", make(), data=double).data)
    moons = dataclasses.replace(probdiff.datasets.load("moons"), train=X)
    assert probdiff.storage.create_run(tmp_path / "moons", make(), data=moons).data.log_prob(X[:2]) == pytest.approx(moons.log_prob(X[:2]))


def conditional(context_dim):
    network = probdiff.MLP(2, key=jax.random.key(4), hidden=8, num_blocks=1, context_dim=context_dim)
    return probdiff.Diffusion(probdiff.log_snr_schedule(6), network, probdiff.NormalLikelihood.standardized(X), dim=2)


def test_the_context_of_a_run_comes_back(tmp_path):
    """With what encodes other rows; as arrays, of a data set that does not say; it is left out of a model that is given none."""
    rng = np.random.default_rng(0)
    context = pd.DataFrame({"age": rng.normal(40, 9, 300), "site": list("abc") * 100, "grade": rng.integers(0, 3, 300)})
    data = probdiff.datasets.split(X, context=context)
    run = probdiff.storage.create_run(tmp_path / "given", conditional(7), data=data)
    found = probdiff.open_run(run.path)
    same_data(data, found.data)
    assert found.untrained.is_conditional and found.data.describe() == data.describe()
    np.testing.assert_array_equal(found.data.covariates.encode(context.iloc[data.rows["test"]]), data.test_context)
    bare = dataclasses.replace(data, covariates=None, rows=None)
    same_data(bare, probdiff.storage.create_run(tmp_path / "bare", conditional(7), data=bare).data)
    plain = probdiff.storage.create_run(tmp_path / "plain", make(), data=data).data
    same_data(data.without_context(), plain)
    with pytest.raises(ValueError, match=r"context: Expected an array of shape \(datum, 3\).*got shape \(240, 7\)"):
        probdiff.storage.create_run(tmp_path / "other", conditional(3), data=data)
    with pytest.raises(ValueError, match="context: Expected an array.*got None"):
        probdiff.storage.create_run(tmp_path / "other", conditional(7), data=plain)
    with pytest.raises(ValueError, match="context: Expected as many rows as there are data, 30; got 240 rows"):
        probdiff.storage.create_run(tmp_path / "other", conditional(7), data=dataclasses.replace(data, test_context=data.train_context))
    assert not (tmp_path / "other").exists()


def test_the_data_of_a_run_of_before_contexts_come_back(tmp_path):
    data = probdiff.datasets.split(pd.DataFrame({"size": X[:40, 0], "kind": pd.Categorical(list("abca") * 10)}))
    diffusion = probdiff.Diffusion(probdiff.cosine_schedule(4), lambda z, n: z, data.likelihood(), dim=4)
    run = probdiff.storage.create_run(tmp_path / "run", diffusion, data=data)
    about, leaves = read_leaves(run.path / "data.eqx")
    assert about.pop("contexts") is False and about.pop("covariates") is None
    save_tree(run.path / "data.eqx", leaves, **about)
    same_data(data, run.data)


def test_data_that_are_not_whole_or_not_the_models_are_refused(tmp_path):
    data = probdiff.datasets.split(X)
    with pytest.raises(TypeError, match="data: Expected a Dataset; got ndarray"):
        probdiff.storage.create_run(tmp_path / "run", make(), data=X)
    with pytest.raises(ValueError, match=r"x: Expected shape \(datum, 2\); got shape"):
        probdiff.storage.create_run(tmp_path / "run", make(), data=probdiff.datasets.split(np.hstack([X, X])))
    run = probdiff.storage.create_run(tmp_path / "run", make(), data=data)
    path = run.path / "data.eqx"
    path.write_bytes(damaged(path.read_bytes(), "flipped"))
    with pytest.raises(ValueError, match="data.eqx: Expected an intact file"):
        _ = run.data
    save_tree(path, [np.zeros(3)], name="mine")
    with pytest.raises(ValueError, match="data.eqx: Expected the data of a run; got KeyError"):
        _ = run.data


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out: Expected a new folder"):
        probdiff.storage.create_run(tmp_path / "run", make())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="out: Expected a new folder"):
        probdiff.storage.create_run(tmp_path / "file", make())
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "moons-1").mkdir()
    assert runs.next_free("moons", tmp_path) == tmp_path / "moons-2"


def resume(path, diffusion=None, iterations=20):
    checkpoint = probdiff.storage.Checkpoint(path)
    return probdiff.fit(
        diffusion or make(), X, iterations=iterations, batch_size=16, validate_every=10, checkpoint=checkpoint, progress=False
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The whole fit; and the bytes of its checkpoint, after 20 iterations, and of the one before, after 10."""
    path = tmp_path_factory.mktemp("checkpoints") / "checkpoint.eqx"
    whole = resume(path)
    return whole, path.read_bytes(), path.with_name("checkpoint.previous.eqx").read_bytes()


def npz_of_0_1(arrays):
    """What probdiff 0.1 wrote: arrays by name, and their checksum."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def damaged(content, damage):
    content = bytearray(content)
    if damage == "empty":
        return b""
    if damage == "foreign":
        return npz_of_0_1({"leaf_0000": np.zeros(3)})
    if damage == "truncated":
        return bytes(content[: len(content) // 2])
    content[len(content) // 2] ^= 4
    return bytes(content)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_passed_over_for_the_previous_one(damage, tmp_path, checkpoints):
    whole, last, previous = checkpoints
    path = tmp_path / "checkpoint.eqx"
    path.write_bytes(damaged(last, damage))
    path.with_name("checkpoint.previous.eqx").write_bytes(previous)
    with pytest.warns(UserWarning, match="checkpoint.eqx: Expected .* going on from checkpoint.previous.eqx"):
        fit = resume(path)
    assert_same(fit.diffusion.trainable(), whole.diffusion.trainable())
    assert path.read_bytes() == last
    if damage != "foreign":  # the good one is not replaced by the damaged one
        assert path.with_name("checkpoint.previous.eqx").read_bytes() == previous


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_with_no_intact_checkpoint_left_there_is_a_clear_error(damage, tmp_path, checkpoints):
    _, last, previous = checkpoints
    path = tmp_path / "checkpoint.eqx"
    path.write_bytes(damaged(last, damage))
    path.with_name("checkpoint.previous.eqx").write_bytes(damaged(previous, damage))
    with pytest.raises(ValueError, match="checkpoint: Expected an intact one .*checkpoint.eqx.*checkpoint.previous.eqx"):
        resume(path)
    assert path.read_bytes() == damaged(last, damage)


def test_no_truncated_or_flipped_checkpoint_is_loaded(tmp_path, checkpoints):
    """Cut at every 4 KiB, and 200 times with one random bit flipped."""
    _, last, _ = checkpoints
    path, rng = tmp_path / "checkpoint.eqx", np.random.default_rng(0)
    cases = [last[:size] for size in range(0, len(last), 4096)]
    for place in rng.integers(0, 8 * len(last), 200):
        content = bytearray(last)
        content[place // 8] ^= 1 << (place % 8)
        cases.append(bytes(content))
    for content in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.eqx: Expected an intact file"):
            read_leaves(path)
    path.write_bytes(last)
    assert storage.is_intact(path) and len(read_leaves(path)[1]) > 10


@pytest.mark.parametrize("content", [
    b"", b"\n", b"[]\n", b"{}\n", b"PK",
    b'{"leaves": [["float32", 3]]}\n', b'{"leaves": [["float32", -3]]}\n', b'{"leaves": [["object", 3]]}\n',
    b'{"leaves": [["float32", 10000000000]]}\n' + npy_header(shape=(10**10,), descr="<f4"),
    b'{"leaves": [["float32", 1]]}\n' + npy_header(shape=(1,), descr="|O") + pickle.dumps([1.0]),
    b'{"leaves": [["float32", 1]]}\n' + pickle.dumps([1.0]),
])  # fmt: skip
def test_a_file_of_something_else_with_a_right_checksum_is_refused(content, tmp_path):
    """And nothing in it is executed, or allocated."""
    storage.write_checked(tmp_path / "other.eqx", content)
    with pytest.raises(ValueError, match="other.eqx: Expected arrays of probdiff"):
        read_leaves(tmp_path / "other.eqx")


def rewritten_as_0_1(path):
    """The file as probdiff 0.1 wrote it, in its place."""
    about, leaves = read_leaves(path)
    histories = ("losses", "validation") if "settings" in about else ()
    names = [f"leaf_{i:04}" for i in range(len(leaves) - len(histories))] + list(histories)
    settings = {"settings": np.frombuffer(json.dumps(about["settings"]).encode(), np.uint8)} if histories else {}
    path.with_suffix(".npz").write_bytes(npz_of_0_1(dict(zip(names, leaves)) | settings))
    path.unlink()


@pytest.mark.long
def test_a_run_of_0_1_opens(tmp_path):
    fit, _ = fitted_run(tmp_path / "run", make())
    rewritten_as_0_1(tmp_path / "run" / "parameters.eqx")
    assert_same(probdiff.open_run(tmp_path / "run").diffusion.trainable(), fit.diffusion.trainable())


def test_a_fit_of_0_1_goes_on(tmp_path, checkpoints):
    _, last, previous = checkpoints
    path = tmp_path / "checkpoint.eqx"
    path.write_bytes(previous)
    rewritten_as_0_1(path)
    assert probdiff.storage.Checkpoint(path).exists() and not path.exists()
    resume(path)
    assert path.read_bytes() == last


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond ``size`` bytes, and somebody tries."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        with pytest.raises(OSError, match="File too large"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_file_that_finds_no_room_stays_as_it_was(tmp_path):
    path = tmp_path / "arrays.eqx"
    save_tree(path, {"a": np.zeros(10)})
    before = path.read_bytes()
    with full_disk(2 * len(before)):
        save_tree(path, {"a": np.zeros(10_000)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.release
def test_a_full_disk_leaves_the_checkpoint_as_it_was(tmp_path, checkpoints):
    """The next save runs into a limit on the size of files: an OSError, and both checkpoints intact."""
    _, last, previous = checkpoints
    path = tmp_path / "checkpoint.eqx"
    path.write_bytes(previous)
    with full_disk(len(previous) // 2):
        resume(path)
    assert path.read_bytes() == previous and not list(tmp_path.glob(".*"))
    assert_same(resume(path).diffusion.trainable(), checkpoints[0].diffusion.trainable())


@pytest.mark.long
def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    fitted_run(tmp_path / "run", make())
    other = make(probdiff.MLP(2, key=jax.random.key(4), hidden=9, num_blocks=1))
    with pytest.raises(ValueError, match="of a run with other options"):
        resume(tmp_path / "run" / "checkpoint.eqx", other)


@pytest.mark.long
def test_equal_runs_leave_equal_files(tmp_path):
    for name in "ab":
        fitted_run(tmp_path / name, make())
    for file in ("checkpoint.eqx", "parameters.eqx", "config.json", "losses.csv", "schedule.npy"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert not list((tmp_path / "a").glob(".*"))


def old_layout(terms):
    """The DataTree that probdiff 0.1 made of the terms."""
    step_kl, reconstruction, elbo = (np.asarray(each)[None] for each in (terms.step_kl, terms.reconstruction, terms.elbo))
    dims, steps = ("chain", "draw", "datum"), np.arange(2, step_kl.shape[2] + 2)
    posterior = {"step_kl": (("chain", "draw", "step", "datum"), step_kl), "reconstruction": (dims, reconstruction), "elbo": (dims, elbo)}
    constant = xr.Dataset({"prior_kl": ("datum", np.asarray(terms.prior_kl))})
    return xr.DataTree.from_dict({"posterior": xr.Dataset(posterior, {"step": steps}), "constant_data": constant})


@pytest.mark.long
@pytest.mark.parametrize("num_draws, num_data", [(3, 9), (100, 16)])
def test_datatree(num_draws, num_data, tmp_path):
    """What is in the groups, and that the terms come back from it bit for bit; so they do from a run of before."""
    terms = probdiff.elbo_terms(make(), X[:num_data], key=jax.random.key(0), num_draws=num_draws)
    tree = probdiff.to_datatree(terms)
    step_kl, per_datum = tree["per_step"]["step_kl"], tree["per_datum"]
    noise, data = (4, 25) if num_draws == 100 else (1, 3), (2, 8) if num_data == 16 else (1, 9)
    assert step_kl.dims == ("chain", "draw", "step", "datum") and step_kl.shape == (*noise, 5, num_data)
    assert step_kl["step"].values.tolist() == [2, 3, 4, 5, 6] and step_kl.attrs["units"] == "nats"
    assert per_datum["elbo"].dims == per_datum["reconstruction"].dims == ("chain", "draw", "datum")
    total = per_datum["reconstruction"] - step_kl.sum("step") - tree["constant_data"]["prior_kl"]
    np.testing.assert_allclose(total, per_datum["elbo"], rtol=1e-5)
    posterior = tree["posterior"].to_dataset()
    assert posterior["elbo"].dims == ("chain", "draw") and posterior["step_kl"].dims == ("chain", "draw", "steps")
    assert posterior["elbo"].shape == data and posterior["datum"].values.ravel().tolist() == list(range(num_data))
    for name, values in (("prior_kl", terms.prior_kl), ("elbo", terms.elbo.mean(0)), ("reconstruction", terms.reconstruction.mean(0))):
        np.testing.assert_allclose(posterior[name].values.ravel(), values, rtol=1e-5)
    np.testing.assert_allclose(posterior["step_kl"].values.reshape(num_data, 5), terms.step_kl.mean(0).T, rtol=1e-5)
    assert_same(from_datatree(tree), terms)
    run = probdiff.storage.create_run(tmp_path / "run", make())
    old_layout(terms).to_netcdf(run.path / "elbo.nc", engine="h5netcdf")
    assert_same(run.terms, terms)
    assert run.datatree.identical(tree)


def test_ranges_of_steps():
    """Ten, as equal as can be, that hold every step once."""
    step_kl = np.random.default_rng(0).uniform(size=(2, 24, 3)).astype(np.float32)
    tree = probdiff.to_datatree(probdiff.elbo.ELBOTerms(np.ones(3), step_kl, np.zeros((2, 3))))
    summed = tree["per_datum"]["step_kl"]
    assert summed["steps"].values.tolist() == ["2-4", "5-7", "8-10", "11-13", "14-15", "16-17", "18-19", "20-21", "22-23", "24-25"]
    np.testing.assert_allclose(summed.sel(steps="11-13").values[0], step_kl[:, 9:12].sum(1), rtol=1e-6)
    np.testing.assert_allclose(summed.sum("steps").values[0], step_kl.sum(1), rtol=1e-6)
