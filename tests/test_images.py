"""Images from files: idx, folders made like MNIST's, arrays; what they become, and what is refused."""

import gzip

import numpy as np
import pytest

from probdiff import datasets, presets
from probdiff.datasets import images
from probdiff.networks import LevelMixtureHead, UNet


def idx(array, code=8):
    """The bytes of an idx file, by its description."""
    big = np.asarray(array)
    return bytes([0, 0, code, big.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in big.shape) + big.astype(big.dtype.newbyteorder(">")).tobytes()


PICTURES = np.random.default_rng(0).integers(0, 250, (40, 5, 6)).astype(np.uint8)
LABELS = (np.arange(40) % 3).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "shoes"
    path.mkdir()
    (path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PICTURES)))
    (path / "train-labels.idx1-ubyte").write_bytes(idx(LABELS))
    (path / "t10k-images-idx3-ubyte").write_bytes(idx(PICTURES[::-1]))
    (path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[::-1])))
    return path


@pytest.mark.parametrize("dtype, code", [("uint8", 8), ("int8", 9), ("int16", 11), ("int32", 12), ("float32", 13), ("float64", 14)])
def test_an_idx_file_of_every_kind(tmp_path, dtype, code):
    array = np.arange(-6, 6).reshape(2, 3, 2).astype(dtype)
    for name, content in (("a.idx", idx(array, code)), ("a-ubyte.gz", gzip.compress(idx(array, code)))):
        (tmp_path / name).write_bytes(content)
        found = images.read_idx(tmp_path / name)
        assert found.dtype == dtype and found.dtype.isnative
        np.testing.assert_array_equal(found, array)


def test_a_folder_keeps_its_test_images_and_its_order(folder):
    data = datasets.load(str(folder), context="labels")
    assert (data.name, data.levels, data.image_shape) == ("shoes", 256, (5, 6))
    np.testing.assert_array_equal(data.train, PICTURES[:36].reshape(36, 30))
    np.testing.assert_array_equal(data.validation, PICTURES[36:].reshape(4, 30))
    np.testing.assert_array_equal(data.test, PICTURES[::-1].reshape(40, 30))
    assert data.train.dtype == np.uint8  # as large as the files
    np.testing.assert_array_equal(data.test_context.argmax(1), LABELS[::-1])
    np.testing.assert_array_equal(data.validation_context.argmax(1), LABELS[36:])
    assert datasets.load(str(folder)).context_dim is None


def test_fine_images_get_a_unet():
    data = datasets.Dataset("wide", *(np.zeros((4, 90), np.uint8),) * 3, levels=256, image_shape=(9, 10))
    diffusion = presets.default_diffusion(data, 10)
    assert isinstance(diffusion.network, LevelMixtureHead) and isinstance(diffusion.network.network, UNet)


def test_images_of_8_bits_in_an_array_have_256_levels(tmp_path):
    np.save(tmp_path / "mine.npy", PICTURES)
    (tmp_path / "mine.idx").write_bytes(idx(PICTURES))
    for data in (datasets.load(tmp_path / "mine.npy"), datasets.load(tmp_path / "mine.idx"), datasets.split(PICTURES, name="mine")):
        assert (data.name, data.levels, data.image_shape, data.train.dtype) == ("mine", 256, (5, 6), np.uint8)
        np.testing.assert_array_equal(data.train, PICTURES.reshape(40, 30)[data.rows["train"]])
    of_labels = datasets.split(PICTURES, context=LABELS)
    np.testing.assert_array_equal(of_labels.test_context.argmax(1), LABELS[of_labels.rows["test"]])
    # Of another kind of integers, it is not known.
    assert datasets.split(PICTURES.astype(int)).levels == PICTURES.max() + 1


def test_smaller_images_are_means_of_tiles_in_the_middle():
    picture = np.zeros((1, 28, 28), np.uint8)
    picture[0, 0, 0], picture[0, 14:16, 14:16] = 100, 40
    small = images.resized(picture, 16)
    assert small.shape == (1, 16, 16) and small.dtype == np.uint8
    # Two pixels of 0 on each side: that in the corner is one of four of its tile.
    assert small[0, 1, 1] == 25 and small[0, 8, 8] == 40 and small.sum() == 65


def test_fashion_mnist_is_found_or_asked_for(folder, monkeypatch):
    monkeypatch.setattr(images, "FASHION_MNIST", folder)
    assert datasets.load("fashion-mnist").image_shape == (5, 6)
    small = datasets.load("fashion-mnist-16")
    assert small.name == "fashion-mnist-16" and small.image_shape == (16, 16)
    assert {split.shape[1] for split in (small.train, small.validation, small.test)} == {256}
    monkeypatch.setattr(images, "FASHION_MNIST", folder / "none")
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        datasets.load("fashion-mnist")


@pytest.mark.parametrize("content, message", [
    (b"", "an idx file; got one that begins with nothing"),
    (b"PK\x03\x04", "an idx file; got one that begins with 50 4b 03 04"),
    (idx(PICTURES)[:-1], r"1200 bytes of numbers, for the shape \(40, 5, 6\); got 1199"),
    (bytes([0, 0, 8, 3, 255]), "the lengths of its axes; got 5 bytes"),
    (bytes([0, 0, 8, 3]) + b"\xff" * 12, "bytes of numbers, for the shape"),
    (gzip.compress(idx(PICTURES), mtime=0)[:-9], "a gzipped idx file"),
], ids=["empty", "zip", "short", "no lengths", "lengths too great", "gzip cut off"])  # fmt: skip
def test_a_damaged_idx_file_is_named(tmp_path, content, message):
    (tmp_path / "bad.idx").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.idx: Expected .*{message}"):
        images.read_idx(tmp_path / "bad.idx")


@pytest.mark.parametrize("file, content, error, message", [
    ("train-images-idx3-ubyte.gz", None, FileNotFoundError, "the file train-images-idx3-ubyte, or train-images-idx3-ubyte.gz; got a folder without"),
    ("train-images-idx3-ubyte.gz", idx(PICTURES[0]), ValueError, r"8-bit images, shape \(image, height, width\); got uint8 of shape \(5, 6\)"),
    ("train-images-idx3-ubyte.gz", idx(PICTURES.astype(np.int32), 12), ValueError, "8-bit images"),
    ("train-images-idx3-ubyte.gz", idx(PICTURES[:5]), ValueError, "at least 10 training images; got 5"),
    ("t10k-images-idx3-ubyte", idx(PICTURES[:, 1:]), ValueError, r"test images of shape \(5, 6\), as the others; got \(4, 6\)"),
    ("train-labels.idx1-ubyte", idx(LABELS[1:]), ValueError, "40 labels, one for each image"),
])  # fmt: skip
def test_a_folder_whose_files_do_not_go_together_is_refused(folder, file, content, error, message):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(error, match=message):
        datasets.load(folder, context="labels")
