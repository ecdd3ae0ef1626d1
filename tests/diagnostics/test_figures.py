"""What the figures show is what they were given."""

import numpy as np

import probdiff


def test_images_have_gaps_between_them():
    """Five images of 2 × 3 pixels: four in a square, NaN between them and nowhere else."""
    images = np.arange(30).reshape(5, 6)
    left, right = probdiff.plots.plot_samples(images + 1, images, (2, 3)).axes
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
