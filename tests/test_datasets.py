"""Data: splits, densities against samples, entropies, files."""

import numpy as np
import pytest
import scipy.stats

from probdiff import datasets


def test_digits():
    digits = datasets.load("digits")
    assert [len(split) for split in (digits.train, digits.validation, digits.test)] == [1000, 350, 447]
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal(np.concatenate([digits.train, digits.validation, digits.test]), load_digits().data)
    assert digits.levels == 17 and digits.train.dtype == np.int32 and digits.dim == 64
    mean, error = digits.independent_levels()
    assert -mean / (64 * np.log(2)) == pytest.approx(2.398, abs=0.002) and 0 < error < 1


@pytest.mark.parametrize("name", datasets.PLANAR)
def test_points_have_the_density(name):
    """Counts in the cells of a grid against the density integrated over each cell."""
    data = datasets.load(name, seed=3)
    counts, *_ = np.histogram2d(*data.train.T, bins=12, range=[[-6, 6]] * 2)
    centre = (np.arange(240) + 0.5) / 20 - 6
    p = np.exp(data.log_prob(np.stack(np.meshgrid(centre, centre, indexing="ij"), -1).reshape(-1, 2))).reshape(240, 240)
    mass = p.reshape(12, 20, 12, 20).sum((1, 3)) / 400
    assert mass.sum() == pytest.approx(1, abs=1e-6)
    seen = mass * len(data.train) > 20

    def pvalue(mass):
        expected = np.append(mass[seen], max(1 - mass[seen].sum(), 1e-9)) * len(data.train)
        observed = np.append(counts[seen], counts[~seen].sum())
        keep = expected > 5
        return scipy.stats.chi2.sf(((observed - expected) ** 2 / expected)[keep].sum(), keep.sum() - 1)

    assert pvalue(mass) > 1e-6 > pvalue(np.roll(mass, 1, 0) * 0.05 + 0.95 * mass)


@pytest.mark.parametrize("name, entropy", [
    ("checkerboard", np.log(32)), ("circles", 3.268), ("moons", 2.394), ("8gaussians", 2.832), ("swissroll", 2.670)
])  # fmt: skip
def test_entropies(name, entropy):
    data = datasets.load(name)
    value, error = data.entropy()
    assert value == pytest.approx(entropy, abs=1e-3) and error < 1e-6
    surprise = -data.log_prob(data.test)
    assert abs(surprise.mean() - value) <= 4.9 * surprise.std() / np.sqrt(len(surprise)) + 1e-12


def test_planar_data_are_drawn_anew_by_seed_and_splits_differ():
    a, b, c = (datasets.load("moons", seed).train for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    test = datasets.load("moons").test
    assert not set(map(tuple, test)) & set(map(tuple, a))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_files(tmp_path, suffix, kind):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 6, (50, 3)) if kind is np.int64 else rng.normal(5, 2, (50, 3))
    array[0, 0] = 5
    path = tmp_path / f"mine{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    elif suffix == ".npz":
        np.savez(path, array)
    else:
        np.savetxt(path, array, "%d" if kind is np.int64 else "%.17g", delimiter=",", header="a,b,c", comments="")
    data = datasets.load(path)
    assert data.name == "mine" and [len(s) for s in (data.train, data.validation, data.test)] == [40, 5, 5]
    rows = np.concatenate([data.train, data.validation, data.test])
    np.testing.assert_allclose(np.sort(rows, 0), np.sort(array, 0), rtol=1e-6)
    assert data.levels == (6 if kind is np.int64 else None)
    data.likelihood().check_data(data.train)


def test_data_are_standardised_by_the_training_split(tmp_path):
    """Of a data set whose splits differ, and of a file, whose training split is by chance unlike the others."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "mine.npy", rng.normal([5, -2], [3, 0.1], (50, 2)))
    splits = [rng.normal(loc, scale, (30, 2)) for loc, scale in ((1, 2), (5, 3), (-4, 1))]
    for dataset in (datasets.Dataset("points", *splits), datasets.load(tmp_path / "mine.npy", 1)):
        likelihood = dataset.likelihood()
        np.testing.assert_allclose(likelihood.loc, dataset.train.mean(0, np.float64), rtol=1e-6)
        np.testing.assert_allclose(likelihood.scale, dataset.train.std(0, np.float64), rtol=1e-6)
        x0 = np.asarray(likelihood.encode(dataset.train))
        np.testing.assert_allclose([x0.mean(0), x0.std(0)], [[0, 0], [1, 1]], atol=1e-5)


FLOATS = np.random.default_rng(0).normal(size=(20, 2))
BAD_FILES = {
    "nan": (np.where(np.arange(40).reshape(20, 2) == 7, np.nan, FLOATS), ValueError, r"nan at index \[3, 1\]"),
    "infinite": (np.where(np.arange(40).reshape(20, 2) == 0, np.inf, FLOATS), ValueError, r"inf at index \[0, 0\]"),
    "images": (np.zeros((20, 8, 8), int), ValueError, r"got shape \(20, 8, 8\).*x.reshape\(len\(x\), -1\)"),
    "one column without its axis": (FLOATS[:, 0], ValueError, r"got shape \(20,\).*x.reshape\(-1, 1\)"),
    "no rows": (FLOATS[:0], ValueError, "at least 10 rows"),
    "one row": (FLOATS[:1], ValueError, "at least 10 rows"),
    "no columns": (FLOATS[:, :0], ValueError, r"got shape \(20, 0\)"),
    "constant column": (FLOATS * [1, 0] + 0.5, ValueError, "constant column"),
    "whole numbers as floats": (np.round(10 * FLOATS), ValueError, r"x.astype\(int\)"),
    "float32 does not resolve it": (1e7 + FLOATS, ValueError, "subtract its mean"),
    "negative counts": (np.arange(-3, 37).reshape(20, 2), ValueError, "a negative integer, -3"),
    "zeros": (np.zeros((20, 2), int), ValueError, "zeros only"),
    "complex": (FLOATS + 1j, TypeError, "dtype complex128"),
    "strings": (FLOATS.astype(str), TypeError, "floats or integers; got dtype <U"),
    "booleans": (FLOATS > 0, TypeError, "dtype bool"),
    "objects": (FLOATS.astype(object), ValueError, "an intact .npy file; got: Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_arrays_in_files(case, tmp_path):
    array, error, message = BAD_FILES[case]
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    with pytest.raises(error, match=message):
        datasets.load(tmp_path / "bad.npy")


@pytest.mark.parametrize("name, content, error, message", [
    ("none.npy", None, FileNotFoundError, "which is not there"),
    ("empty.npy", b"", ValueError, "an empty file"),
    ("empty.csv", b"", ValueError, "an empty file"),
    ("noise.npy", b"not an array", ValueError, "an intact .npy file"),
    ("noise.npz", b"not an archive", ValueError, "an intact .npz file"),
    ("words.csv", b"a,b\n1,2\nthree,4\n", ValueError, "a readable .csv file"),
    ("missing.csv", b"1.5,NA\n" + b"1.5,2.5\n" * 20, ValueError, "a readable .csv file"),
    ("ragged.csv", b"1,2\n3\n", ValueError, "a readable .csv file"),
    ("data.txt", b"1,2\n", ValueError, "Expected one of digits, checkerboard"),
    ("moon", None, ValueError, "Expected one of digits, checkerboard"),
])  # fmt: skip
def test_bad_files(name, content, error, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        datasets.load(path)


def test_an_archive_of_two_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "two.npz", x=FLOATS, y=FLOATS)
    with pytest.raises(ValueError, match="one array; got 2: x, y"):
        datasets.load(tmp_path / "two.npz")


def test_a_byte_order_mark_is_not_a_header(tmp_path):
    (tmp_path / "mark.csv").write_bytes(
        b"\xef\xbb\xbf" + b"".join(b"%d,1.5\n" % k for k in range(20)).replace(b"3,1.5", b"3,2.5")
    )
    data = datasets.load(tmp_path / "mark.csv")
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 20


@pytest.mark.parametrize("shape", [(10**10, 2), (19, 2)])
def test_a_size_in_a_header_is_not_believed(shape, tmp_path):
    """Neither more than the file holds, for which nothing is allocated, nor less."""
    path = tmp_path / "mine.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
        file.write(FLOATS.tobytes())
    with pytest.raises(ValueError, match="Expected an intact .npy file"):
        datasets.load(path)
