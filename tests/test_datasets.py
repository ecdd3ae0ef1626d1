"""Data: splits, densities against samples, entropies, files."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.stats

from probdiff import datasets


def test_digits():
    digits = datasets.load("digits")
    assert [len(split) for split in (digits.train, digits.validation, digits.test)] == [1000, 350, 447]
    from sklearn.datasets import load_digits

    np.testing.assert_array_equal(np.concatenate([digits.train, digits.validation, digits.test]), load_digits().data)
    assert digits.levels == 17 and digits.train.dtype == np.int32 and digits.dim == 64
    mean, error = digits.independent_columns()
    assert -mean / (64 * np.log(2)) == pytest.approx(2.398, abs=0.002) and 0 < error < 1


@pytest.mark.long
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


@pytest.mark.long
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
    "images of floats": (np.zeros((20, 8, 8)), ValueError, r"got shape \(20, 8, 8\).*x.reshape\(len\(x\), -1\)"),
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
    ("data.txt", b"1,2\n", ValueError, "Expected one of digits, fashion-mnist"),
    ("moon", None, ValueError, "Expected one of digits, fashion-mnist"),
])  # fmt: skip
def test_bad_files(name, content, error, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        datasets.load(path)


def test_an_archive_of_two_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "two.npz", x=FLOATS, y=FLOATS)
    with pytest.raises(ValueError, match="one array, or two and the name of the context; got 2: x, y"):
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


# Tables: what the columns are taken for, and how they are named.

ROWS = 60
RNG = np.random.default_rng(7)
TABLE = pd.DataFrame({
    "length": RNG.normal(5, 2, ROWS),
    "site": pd.Categorical(RNG.choice(["north", "south", "east"], ROWS), ["north", "south", "east", "west"]),
    "age": RNG.integers(20, 81, ROWS).astype(float),
    "half": RNG.integers(0, 5, ROWS) / 2,
    "ill": RNG.random(ROWS) < 0.4,
    "weight": RNG.normal(-100, 9, ROWS),
})  # fmt: skip
KINDS = {1: ("east", "north", "south"), 3: (0.0, 0.5, 1.0, 1.5, 2.0), 4: ("False", "True")}


@pytest.mark.parametrize("frame", [TABLE, pl.DataFrame({name: TABLE[name].tolist() for name in TABLE}).cast({"site": pl.Categorical})])
def test_each_column_is_taken_for_what_it_is(frame):
    data = datasets.load(frame, seed=1)
    assert data.columns == tuple(TABLE) and data.levels is None and data.dim == 6
    found = {j: part.categories for j, part in data.discrete.items() if j != 2}
    assert {j: tuple(sorted(map(str, each))) for j, each in found.items()} == {j: tuple(map(str, each)) for j, each in KINDS.items()}
    assert data.discrete[2].arguments == {"levels": int(np.ptp(TABLE["age"])) + 1, "first": int(TABLE["age"].min())}
    words = data.describe()
    assert "continuous, with a density: length, weight" in words and "3 categories (" in words
    assert "48 train, 6 validation, 6 test rows of 6 columns" in words
    back = pd.concat([data.to_frame(split) for split in (data.train, data.validation, data.test)])
    order = np.random.default_rng(1).permutation(ROWS)
    np.testing.assert_allclose(back["length"], TABLE["length"].to_numpy()[order], rtol=1e-6)
    assert back["site"].astype(str).tolist() == TABLE["site"].astype(str).to_numpy()[order].tolist()
    assert back["ill"].astype(str).tolist() == TABLE["ill"].astype(str).to_numpy()[order].tolist()
    likelihood = data.likelihood()
    likelihood.check_data(data.train)
    np.testing.assert_allclose(likelihood.decode(likelihood.encode(data.train)), data.train, rtol=1e-5)
    x0 = np.asarray(likelihood.encode(data.train))
    np.testing.assert_allclose([x0[:, :2].mean(0), x0[:, :2].std(0)], [[0, 0], [1, 1]], atol=1e-4)
    np.testing.assert_allclose(likelihood.read(frame), likelihood.read(TABLE))


@pytest.mark.parametrize("change, error, message", [
    (dict(name=["x"] * ROWS), TypeError, "columns of numbers; got String in column 'name'; leave the column out"),
    (dict(length=np.where(np.arange(ROWS) == 5, np.nan, 1.5)), ValueError, "in row 5 .* of column 'length'"),
    (dict(length=np.where(np.arange(ROWS) == 5, np.inf, 1.5)), ValueError, "finite values; got .*inf.* in row 5 .* of column 'length'"),
    (dict(length=1.5), ValueError, "a constant column: column 'length'"),
    (dict(site=pd.Categorical([None] + ["a", "b"] * (ROWS // 2 - 1) + ["a"])), ValueError, "none in row 0 .* of column 'site'"),
])  # fmt: skip
def test_columns_that_are_no_data_are_named(change, error, message):
    with pytest.raises(error, match=message):
        datasets.split(TABLE.assign(**change))


def test_a_class_column_of_an_array_is_no_density():
    """Without names; integers throughout stay a grid, and a table of unlike integers with names is none."""
    array = np.column_stack([RNG.normal(size=(ROWS, 2)), RNG.integers(1, 4, ROWS)])
    data = datasets.split(array)
    assert list(data.discrete) == [2] and data.discrete[2].values == (1, 2, 3)
    assert data.likelihood().encoded_dim(3) == 5 and data.column_name(2) == "x[2]"
    assert datasets.split(RNG.integers(0, 9, (ROWS, 3))).levels == 9
    unlike = pd.DataFrame({"a": RNG.integers(0, 2, ROWS), "b": RNG.integers(0, 3, ROWS), "c": RNG.integers(100, 300, ROWS)})
    data = datasets.split(unlike)
    assert data.levels is None and len(data.discrete) == 3 and "continuous" not in data.describe()
    assert datasets.split(unlike.assign(c=unlike["b"])).levels == 3


@pytest.mark.parametrize("index, name, note", [
    (np.arange(ROWS), "", "no name"), (np.arange(1, ROWS + 1), "id", "'id'"), (RNG.permutation(ROWS), "", "no name"), (RNG.permutation(ROWS), "id", None)
])  # fmt: skip
def test_a_column_that_numbers_the_rows_is_left_out(index, name, note, tmp_path):
    """It is recognised; or it is named."""
    TABLE[["length", "weight"]].set_index(pd.Index(index, name=name)).to_csv(tmp_path / "mine.csv")
    data = datasets.load(tmp_path / "mine.csv")
    if note is None:
        assert data.columns == ("id", "length", "weight")
        data = datasets.load(tmp_path / "mine.csv", index="id")
    assert data.columns == ("length", "weight") and (note or "'id'") in data.describe()
    with pytest.raises(ValueError, match="index: Expected one of the columns .*; got 'nothing'"):
        datasets.load(tmp_path / "mine.csv", index="nothing")


@pytest.mark.parametrize("cell, message", [
    ("", "a number in every cell; got none in line 4, column 'b'"),
    ("NA", "a number in every cell; got none in line 4, column 'b'"),
    ("tall", "got 'tall' in line 4, column 'b'; leave the column out, or number its categories"),
    ("-inf", "finite numbers; got infinity in line 4, column 'b'"),
])  # fmt: skip
def test_a_cell_of_a_file_is_named_by_line_and_column(cell, message, tmp_path):
    rows = [f"{a:.3f},{b}" for a, b in zip(RNG.normal(size=20), ["1.5", "2.25", cell] + ["3.125"] * 17)]
    (tmp_path / "mine.csv").write_text("\n".join(["a,b", *rows]))
    with pytest.raises(ValueError, match=message):
        datasets.load(tmp_path / "mine.csv")


@pytest.mark.parametrize("content, message", [
    ("a;b\n1,5;2\n", "cells separated by commas, and points in numbers; got ';' in the first line"),
    ("172,76;2,26;0\n" * 20, "got ';' in the first line"),
    ("a\tb\n1\t2\n", r"got '\\t' in the first line"),
    ("a,b\n", "rows of numbers; got the names of columns alone"),
    ("a,b, a\n1,2,3\n", "columns of different names; got 'a' twice"),
])  # fmt: skip
def test_what_is_no_table_of_commas_is_refused(content, message, tmp_path):
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        datasets.load(tmp_path / "mine.csv")


def test_integers_with_names_are_columns_of_their_own_unless_alike():
    """Pixels, of which there are many, and counts of one range are a grid; sex, age and score are not."""
    frame = pd.DataFrame({"sex": RNG.integers(0, 2, ROWS), "age": RNG.integers(18, 90, ROWS), "score": RNG.integers(0, 200, ROWS)})
    data = datasets.split(frame)
    assert data.levels is None and data.discrete[0].values == (0, 1) and data.discrete[1].first == frame["age"].min()
    pixels = pd.DataFrame({f"pixel {j}": RNG.integers(0, 17 if j else 2, ROWS) for j in range(16)})
    assert datasets.split(pixels).levels == 17


def test_each_row_says_which_it_was():
    data = datasets.split(TABLE, seed=3)
    for split in ("train", "validation", "test"):
        np.testing.assert_allclose(getattr(data, split)[:, 0], TABLE["length"].to_numpy()[data.rows[split]], rtol=1e-6)
    assert repr(data) == data.describe() and len(repr(data).splitlines()) < 10


def test_ties_are_told():
    tied = np.where(np.arange(ROWS) % 4 == 0, 2.5, RNG.normal(size=ROWS))
    words = datasets.split(TABLE[["length"]].assign(tied=tied)).describe()
    assert "of the rows of tied are 2.5" in words and "of the rows of length" not in words


def test_the_reference_of_a_table_codes_each_column_by_itself():
    data = datasets.split(TABLE[["length", "half"]])
    values, counts = np.unique(data.train[:, 1], return_counts=True)
    log_p = dict(zip(values, np.log((counts + 0.5) / (counts + 0.5).sum())))
    normal = scipy.stats.norm(data.train[:, 0].mean(), data.train[:, 0].std())
    expected = normal.logpdf(data.test[:, 0]) + np.array([log_p[value] for value in data.test[:, 1]])
    mean, error = data.independent_columns()
    assert mean == pytest.approx(expected.mean(), rel=1e-5)
    assert error == pytest.approx(expected.std(ddof=1) / np.sqrt(len(expected)), rel=1e-5)


# What a conditional model is given.

GIVEN = pd.DataFrame({
    "age": RNG.normal(40, 9, ROWS),
    "site": pd.Categorical(RNG.choice(["north", "south", "east"], ROWS)),
    "grade": RNG.integers(3, 7, ROWS),
    "ill": RNG.random(ROWS) < 0.4,
})  # fmt: skip
OWN = pd.DataFrame({"ten": 10 * GIVEN["age"] + 1, "code": GIVEN["site"].cat.codes + GIVEN["grade"] / 8 + GIVEN["ill"] / 16})
MIXED = pd.concat([GIVEN[["age", "site"]], OWN, GIVEN[["grade", "ill"]]], axis=1)
CONTEXT = list(GIVEN)


def in_a_csv_file(folder):
    MIXED.to_csv(folder / "mine.csv", index=False)
    return datasets.load(folder / "mine.csv", 5, context=CONTEXT)


def in_an_archive(folder):
    np.savez(folder / "mine.npz", x=OWN.to_numpy(), age=GIVEN["age"])
    return datasets.load(folder / "mine.npz", 5, context="age")


SOURCES = {
    "csv": in_a_csv_file,
    "npz": in_an_archive,
    "frame": lambda _: datasets.load(MIXED, 5, context=CONTEXT),
    "numbered columns": lambda _: datasets.split(MIXED, seed=5, context=[0, 1, 4, 5]),
    "polars": lambda _: datasets.split(pl.DataFrame({name: MIXED[name].tolist() for name in MIXED}), seed=5, context=CONTEXT),
    "another frame": lambda _: datasets.split(OWN, seed=5, context=GIVEN),
    "arrays": lambda _: datasets.split(OWN.to_numpy(), seed=5, context=GIVEN["age"].to_numpy()),
    "a column of an array": lambda _: datasets.split(np.column_stack([OWN, GIVEN["age"]]), seed=5, context=2),
}


@pytest.mark.parametrize("source", SOURCES)
def test_rows_of_data_and_context_are_split_together(source, tmp_path):
    """In each split the context is that of the same row, in the user's units, and the columns of the context are no data."""
    data = SOURCES[source](tmp_path)
    plain = datasets.split(OWN, seed=5)
    for split in ("train", "validation", "test"):
        x, context = getattr(data, split), getattr(data, f"{split}_context")
        np.testing.assert_array_equal(x, getattr(plain, split))
        assert context.dtype == np.float32 and context.shape == (len(x), data.context_dim)
        cells = list(data.covariates.decode(context).values())
        np.testing.assert_allclose(10 * cells[0] + 1, x[:, 0], rtol=1e-5)
        if len(cells) > 1:
            kinds = GIVEN["site"].cat.categories.get_indexer(cells[1]) + cells[2] / 8 + (cells[3] == "True") / 16
            np.testing.assert_allclose(kinds, x[:, 1], rtol=1e-6)


def test_a_context_is_standardised_by_the_training_split_and_labels_have_a_dimension_each():
    data = datasets.split(MIXED, seed=5, context=CONTEXT)
    np.testing.assert_allclose([data.train_context[:, 0].mean(), data.train_context[:, 0].std()], [0, 1], atol=1e-5)
    assert abs(datasets.split(MIXED, context=CONTEXT).test_context[:, 0].mean()) > 0.02
    age, site, grade, ill = data.covariates.columns
    assert (age.categories, site.categories, ill.categories) == (None, ("east", "north", "south"), ("False", "True"))
    assert grade.categories == (3, 4, 5, 6) and data.context_dim == 1 + 3 + 4 + 2 == data.covariates.width
    for first, last in ((1, 4), (4, 8), (8, 10)):
        size, part = last - first, data.test_context[:, first:last]
        np.testing.assert_allclose(part, np.sqrt(size) * np.eye(size)[part.argmax(1)] - 1 / np.sqrt(size), rtol=1e-6)
    assert "given: site, 3 categories (east, north, south)" in data.describe() and "48 train, 6 validation, 6 test rows of 2 columns" in data.describe()
    halves = datasets.split(OWN, context=GIVEN["grade"].to_numpy() / 2).covariates.columns[0]
    assert halves.categories is None and datasets.split(OWN).context_dim is None


def test_rows_that_come_later_are_encoded_like_the_data():
    """Of a frame with other columns, of a mapping, of an array, and in words."""
    data = datasets.split(MIXED, seed=5, context=CONTEXT)
    encoded, rows = data.covariates.encode, data.rows["test"]
    np.testing.assert_array_equal(encoded(MIXED.iloc[rows]), data.test_context)
    cells = {name: GIVEN[name].to_numpy()[rows] for name in reversed(CONTEXT)}
    np.testing.assert_array_equal(encoded(cells), data.test_context)
    np.testing.assert_array_equal(encoded(GIVEN.iloc[rows].astype(str).to_numpy()), data.test_context)
    found = [data.covariates.parse(text) for text in ("49, east ,6,True", "ill=True,grade=6,age=49,site=east")]
    mean, scale = data.covariates.columns[0].loc, data.covariates.columns[0].scale
    np.testing.assert_allclose([each[0, 0] for each in found], (49 - mean) / scale, rtol=1e-6)
    assert np.array_equal(*found) and np.flatnonzero(found[0][0, 1:] > 0).tolist() == [0, 6, 8]
    back = data.covariates.decode(found[0])
    assert {name: each.tolist() for name, each in back.items()} == {"age": [49.0], "site": ["east"], "grade": [6], "ill": ["True"]}
    frame = data.to_frame(data.test, data.test_context)
    assert list(frame) == ["ten", "code", *CONTEXT] and frame["site"].tolist() == GIVEN["site"].to_numpy()[rows].tolist()


def test_the_labels_of_the_digits():
    from sklearn.datasets import load_digits

    digits, plain = datasets.load("digits", context="labels"), datasets.load("digits")
    contexts = np.concatenate([digits.train_context, digits.validation_context, digits.test_context])
    np.testing.assert_array_equal(contexts.argmax(1), load_digits().target)
    assert digits.context_dim == 10 and np.array_equal(digits.test, plain.test) and plain.test_context is None
    assert np.flatnonzero(digits.covariates.parse("label=7") > 0).tolist() == [7]
    assert digits.without_context().context_dim is None


def test_a_first_column_that_counts_can_be_given(tmp_path):
    """Time, say: it is then not taken to number the rows."""
    OWN.set_index(pd.Index(range(ROWS), name="time")).to_csv(tmp_path / "mine.csv")
    data = datasets.load(tmp_path / "mine.csv", context="time")
    assert data.index is None and data.covariates.names == ("time",) and data.columns == ("ten", "code")
    np.testing.assert_allclose(data.covariates.decode(data.test_context)["time"], data.rows["test"], atol=1e-4)


def of_columns(context=CONTEXT, frame=MIXED, **options):
    return lambda folder: datasets.split(frame, context=context, **options)


def of_a_file(name, context, **arrays):
    def load(folder):
        np.savez(folder / name, **arrays) if name.endswith("npz") else GIVEN.to_csv(folder / name, index=False)
        return datasets.load(folder / name, context=context)

    return load


LATER = datasets.split(MIXED, context=CONTEXT).covariates
BAD_CONTEXTS = {
    "no such column": (of_columns("agee"), "context: Expected some of the columns age, site, ten, code, grade, ill, by name or counted from 0; got 'agee'"),
    "no such number": (of_columns([6]), "by name or counted from 0; got 6"),
    "a column twice": (of_columns(["age", 0]), "context: Expected each column once; got age, age"),
    "all columns": (of_columns(list(MIXED)), "context: Expected some of the columns, so that there are others to model; got all: age, site"),
    "all columns of an array": (of_columns([0, 1], OWN.to_numpy()), "others to model; got all: 0, 1"),
    "the index": (of_columns(["age"], index="age"), "context: Expected columns other than 'age', which numbers the rows"),
    "a constant": (of_columns(frame=MIXED.assign(age=3.0)), "context: Expected columns that vary; got a constant column: 'age'"),
    "nan": (of_columns(frame=MIXED.assign(age=np.where(np.arange(ROWS) == 5, np.nan, 1.5))), "in row 5 .* of column 'age'"),
    "names": (of_columns(frame=MIXED.assign(site=[f"row {k}" for k in range(ROWS)])), "at most 30 different labels in a column of 60 rows; got 60 in 'site'"),
    "rows": (of_columns(GIVEN[:50], OWN), "context: Expected as many rows as there are data, 60; got 50 rows"),
    "names of the data": (of_columns(OWN, OWN), "context: Expected names of columns that the data do not have; got ten, code"),
    "nan in an array": (of_columns(np.full(ROWS, np.nan), OWN), r"context: Expected finite values; got nan at index \[0\]"),
    "three axes": (of_columns(np.ones((ROWS, 2, 2)), OWN), r"context: Expected shape \(datum, covariate\); got shape \(60, 2, 2\)"),
    "no array in the file": (of_a_file("a.npz", "d", x=OWN, c=GIVEN["age"]), "context: Expected one of the arrays x, c; got d"),
    "three arrays": (of_a_file("a.npz", "c", x=OWN, c=GIVEN["age"], d=OWN), "one array beside c; got 2: x, d"),
    "no column of the file": (of_a_file("a.csv", ["age", "sex"]), "some of the columns age, site, grade, ill, by name or counted from 0; got 'sex'"),
    "digits": (lambda _: datasets.load("digits", context="label"), "context: Expected labels, or none, for digits; got 'label'"),
    "moons": (lambda _: datasets.load("moons", context="labels"), "context: Expected none for moons; got 'labels'"),
    "too few values": (lambda _: LATER.parse("49,east,3"), "context: Expected 4 values, of age, site, grade, ill; got 3: 49,east,3"),
    "a value missing": (lambda _: LATER.parse("age=49,site=east"), "context: Expected one value of each of age, site, grade, ill, as NAME=VALUE; got age=49"),
    "half of them named": (lambda _: LATER.parse("age,site=east,grade=3,ill=True"), "context: Expected numbers of 'age'; got ''"),
    "an unknown label": (lambda _: LATER.parse("49,west,3,True"), "context: Expected one of the labels east, north, south; got west in row 0"),
    "an unknown number": (lambda _: LATER.parse("49,east,7,True"), "context: Expected one of the labels 3, 4, 5, 6; got 7"),
    "no number": (lambda _: LATER.parse("old,east,3,True"), "context: Expected numbers of 'age'; got 'old'"),
    "not finite": (lambda _: LATER.parse("nan,east,3,True"), "context: Expected finite values; got .*nan.* of column 'age'"),
    "a column missing": (lambda _: LATER.encode(GIVEN[["age", "ill"]]), "the columns age, site, grade, ill; got none named site, grade"),
    "an array of other columns": (lambda _: LATER.encode(np.ones((3, 2))), r"shape \(row, 4\), of age, site, grade, ill; got shape \(3, 2\)"),
    "no rows": (lambda _: LATER.encode(GIVEN[:0]), "context: Expected as many rows of each covariate, at least one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONTEXTS)
def test_a_context_that_cannot_be_used_is_refused(case, tmp_path):
    make, message = BAD_CONTEXTS[case]
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_labels_in_a_file_are_words_and_columns_without_names_are_numbered(tmp_path):
    rows = [f"{a:.3f},{b},{c:.3f}" for a, b, c in zip(RNG.normal(size=20), ["oak", "elm"] * 10, RNG.normal(size=20))]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    data = datasets.load(tmp_path / "mine.csv", context=["1"])
    assert data.columns is None and data.dim == 2 and data.covariates.names == ("1",)
    assert data.covariates.columns[0].categories == ("elm", "oak")
