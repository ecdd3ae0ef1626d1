"""What the figures show is what they were given."""

import numpy as np
import pandas as pd

import probdiff
from probdiff.cli.common import sample_figures


def test_images_have_gaps_between_them():
    """Five images of 2 × 3 pixels: four in a square, NaN between them and nowhere else."""
    images = np.arange(30).reshape(5, 6)
    left, right = probdiff.plots.plot_samples(images + 1, images, (2, 3)).axes
    assert [ax.get_title().split(" (")[0] for ax in (left, right)] == ["data", "samples from the model"]
    nan = np.nan
    expected = [[0, 1, 2, nan, 6, 7, 8], [3, 4, 5, nan, 9, 10, 11], [nan] * 7, [12, 13, 14, nan, 18, 19, 20], [15, 16, 17, nan, 21, 22, 23]]
    np.testing.assert_array_equal(np.ma.filled(left.images[0].get_array().astype(float), nan), expected)
    np.testing.assert_array_equal(np.ma.filled(right.images[0].get_array().astype(float), nan), np.array(expected) + 1)


def test_the_kl_of_each_step_is_a_mean_over_all_draws_and_data():
    step_kl = np.random.default_rng(0).uniform(size=(100, 5, 3)).astype(np.float32)
    tree = probdiff.to_datatree(probdiff.elbo.ELBOTerms(np.ones(3), step_kl, np.zeros((100, 3))))
    figure = probdiff.plots.plot_step_kl(tree, probdiff.log_snr_schedule(6))
    step, mean = figure.axes[0].lines[0].get_data()
    assert list(step) == [2, 3, 4, 5, 6] and "mean of 100 draws" in figure.axes[0].get_ylabel()
    np.testing.assert_allclose(mean, step_kl.mean((0, 2)), rtol=1e-5)
    assert "90% of 3 items" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


DATA = pd.DataFrame({"size": np.linspace(-1, 3, 40), "kind": pd.Categorical(["oak"] * 30 + ["elm"] * 10), "age": np.arange(40) % 3})
SAMPLES = pd.DataFrame({"size": np.linspace(0, 1, 500), "kind": pd.Categorical(["oak"] * 100 + ["elm"] * 400), "age": np.ones(500, int)})


def test_marginals_are_shares_of_the_values_and_densities():
    """Data first, by name; of 500 samples as of 40 data."""
    figure = probdiff.plots.plot_marginals(SAMPLES, DATA, "trees")
    size, kind, age = figure.axes[:3]
    assert [axes.get_xlabel() for axes in (size, kind, age)] == ["size", "kind", "age"]
    data, samples = (patch.get_data() for patch in size.patches)
    assert data.edges[0] < -1 and data.edges[-1] > 3
    for stairs, column in ((data, DATA["size"]), (samples, SAMPLES["size"])):
        expected, _ = np.histogram(column, stairs.edges, density=True)
        np.testing.assert_allclose(stairs.values, expected)
    assert [bar.get_height() for bar in kind.patches] == [0.25, 0.75, 0.8, 0.2]
    assert [label.get_text() for label in kind.get_xticklabels()] == ["elm", "oak"]
    np.testing.assert_allclose([bar.get_height() for bar in age.patches], [14 / 40, 13 / 40, 13 / 40, 0, 1, 0])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["data (n = 40)", "samples from the model (n = 500)"]


def test_whole_numbers_are_counted_in_bins_of_as_many_each_and_samples_beyond_the_data_are_seen():
    ages = pd.DataFrame({"age": np.arange(20, 60)})
    drawn = pd.DataFrame({"age": np.concatenate([np.arange(20, 60), np.full(10, 95)])})
    (axes,) = probdiff.plots.plot_marginals(drawn, ages).axes
    data, samples = (patch.get_data() for patch in axes.patches)
    np.testing.assert_allclose(np.diff(data.edges), 4)
    assert np.ptp(data.values[data.values > 0][1:-1]) == 0 and data.edges[-1] > 95 and samples.values[samples.edges[1:] > 95][0] > 0


def test_pairs_have_data_below_the_diagonal_and_samples_above():
    grid = np.reshape(probdiff.plots.plot_pairs(SAMPLES, DATA).axes[:9], (3, 3))
    below, above = (grid[at].collections[0].get_offsets() for at in ((2, 0), (0, 2)))
    np.testing.assert_allclose(below[:, 0], DATA["size"])
    assert np.abs(below[:, 1] - DATA["age"]).max() <= 0.2
    np.testing.assert_allclose(above[:, 1], SAMPLES["size"].head(200))
    assert [grid[2, j].get_xlabel() for j in range(3)] == [grid[j, 0].get_ylabel() for j in range(3)] == ["size", "kind", "age"]
    assert [label.get_text() for label in grid[1, 0].get_yticklabels()] == ["elm", "oak"]
    wide = pd.DataFrame({f"c{j}": DATA["size"] for j in range(9)})
    figure = probdiff.plots.plot_pairs(wide, wide, "wide")
    assert len(figure.axes) == 36 and "first 6 of 9 columns" in figure.get_suptitle()


def test_the_samples_of_a_table_are_shown_beside_its_rows_and_named():
    """All rows where there are few, the test split where there are many."""
    rng = np.random.default_rng(0)
    for rows, words, count in ((50, "all splits", 50), (6000, "the test split", 600)):
        dataset = probdiff.datasets.split(pd.DataFrame({"a": rng.normal(size=rows), "b": rng.integers(0, 3, rows) + 0.5, "c": rng.normal(size=rows)}))
        figures = sample_figures(dataset.train[:7], dataset, "mine")
        assert set(figures) == {"samples", "pairs"} and words in figures["pairs"].get_suptitle()
        shown = figures["samples"].legends[0].get_texts()[0].get_text()
        assert shown == f"data (n = {min(count, 7)})"
    planar = probdiff.datasets.split(rng.normal(size=(50, 2)))
    assert set(sample_figures(planar.train, planar, "plane")) == {"samples"}
