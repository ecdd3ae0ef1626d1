"""The networks for images that are wide: convolutions against XLA's own, the U-Net, and the head that predicts a mixture on the levels."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probdiff
from probdiff._checks import is_trainable
from probdiff.networks import CategoricalHead, LevelMixtureHead, UNet
from probdiff.networks.convolution import convolve
from probdiff.networks.unet import _gathered, _scattered

KEYS = jax.random.split(jax.random.key(0), 4)


def xla(image, weight):
    return jax.lax.conv_general_dilated(image, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("products, tolerance", [(None, 1e-5), ("bfloat16", 2e-2)])
def test_a_convolution_and_its_derivatives_are_those_of_xla(products, tolerance):
    image, output = jax.random.normal(KEYS[0], (3, 5, 6, 4)), jax.random.normal(KEYS[1], (3, 5, 6, 2))
    weight = jax.random.normal(KEYS[2], (3, 3, 4, 2))
    own = lambda image, weight: convolve(image, weight, products)  # noqa: E731
    for found, expected in zip(
        jax.tree.leaves([f(own) for f in derivatives(image, weight, output)]),
        jax.tree.leaves([f(xla) for f in derivatives(image, weight, output)]),
        strict=True,
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def derivatives(image, weight, output):
    """What makes the value, the derivatives with respect to both arguments, and the derivative along a direction, of a convolution."""
    return [
        lambda f: f(image, weight),
        lambda f: jax.vjp(f, image, weight)[1](output),
        lambda f: jax.jvp(f, (image, weight), (image[::-1], weight[::-1]))[1],
        lambda f: jax.vmap(jax.linearize(lambda image: f(image, weight), image)[1])(jnp.stack([image, 2 * image])),
    ]


def test_in_float64_nothing_is_rounded(float64):
    image, weight = jax.random.normal(KEYS[0], (2, 4, 4, 3)), jax.random.normal(KEYS[1], (3, 3, 3, 2))
    np.testing.assert_array_equal(convolve(image, weight, "bfloat16"), convolve(image, weight))


def awake(network):
    """A network whose zero-initialised output is not zero."""
    return jax.tree.map(lambda a: a + 0.01 if is_trainable(a) else a, network)


@pytest.mark.parametrize("options", [{"products": "bfloat16"}, {"outputs": 3, "fourier": (2, 3), "context_dim": 2}], ids=repr)
def test_a_unet_takes_images_of_any_size(options):
    network = awake(UNet((5, 7), key=KEYS[0], channels=4, num_blocks=1, **options))
    z, log_snr = jax.random.normal(KEYS[1], (70, 35)), jnp.linspace(-5, 5, 70)
    context = {"context": jnp.ones((70, 2))} if "context_dim" in options else {}
    found = eqx.filter_jit(network)(z, log_snr, **context)  # in two pieces
    assert found.shape == ((70, 35, 3) if "outputs" in options else (70, 35))
    assert jnp.isfinite(found).all()
    few = eqx.filter_jit(network)(z[-3:], log_snr[-3:], **jax.tree.map(lambda c: c[-3:], context))  # at once
    np.testing.assert_allclose(found[-3:], few, atol=1e-5 if options.get("products") is None else 0.05)
    one = eqx.filter_jit(network)(z[66], log_snr[66], **jax.tree.map(lambda c: c[0], context))
    np.testing.assert_allclose(found[66], one, atol=1e-5 if options.get("products") is None else 0.05)
    assert type(network)(**network.arguments, key=KEYS[2]).arguments == network.arguments


def test_pixels_come_back_to_their_places():
    image = jax.random.normal(KEYS[0], (2, 4, 6, 3))
    np.testing.assert_array_equal(_scattered(_gathered(image)), image)
    # One pixel of the half resolution is a block of 2×2.
    np.testing.assert_array_equal(np.sort(_gathered(image)[1, 1, 2]), np.sort(image[1, 2:4, 4:6].ravel()))


@pytest.mark.long
def test_every_pixel_of_a_unet_sees_every_other_and_is_in_its_place():
    network = awake(UNet((8, 8), key=KEYS[0], channels=4, num_blocks=1))
    z = jax.random.normal(KEYS[1], (64,))
    jacobian = np.asarray(jax.jit(jax.jacobian(lambda z: network(z, jnp.asarray(0.0))))(z))
    assert (np.abs(jacobian) > 1e-12).all()
    # A pixel is worth most to its neighbours: none is written elsewhere than it was read.
    place = np.stack(np.unravel_index(np.arange(64), (8, 8)), 1)
    distance = np.abs(place[:, None] - place[None]).max(-1)
    near, far = (np.abs(jacobian[mask]).mean() for mask in (distance <= 2, distance > 4))
    assert near > 3 * far


def test_a_mixture_on_the_levels_is_the_categorical_of_its_probabilities(float64):
    """Against all levels one by one, with normals that end within the grid, from noise that hides all to noise finer than a level."""
    levels, count = 40, 2
    rng = np.random.default_rng(0)
    output = rng.normal(size=(50, 5, LevelMixtureHead.outputs(count)))
    log_scale = np.log(rng.uniform(0.01, 0.12, (50, 5, count)))
    output[..., 2:4], output[..., 4:6] = rng.uniform(-0.05, 0.05, (50, 5, count)), log_scale + 1
    z, log_snr = rng.normal(size=(50, 5)), np.linspace(-8, 2 * np.log(3.4 * (levels - 1)), 50)
    grid, mean = np.linspace(-1, 1, levels), output[..., 2:4] + [-0.5, 0.5]
    scale = np.maximum(np.exp(log_scale), 0.5 / (levels - 1))
    density = np.exp(output[..., None, :2] - np.square((grid[:, None] - mean[..., None, :]) / scale[..., None, :]) / 2) / scale[..., None, :]
    p = density.sum(-1) * 2 / (levels - 1) / np.sqrt(2 * np.pi)
    p[..., 0] += np.exp(output[..., 6])
    p[..., -1] += np.exp(output[..., 7])
    given = jnp.asarray(z), jnp.asarray(log_snr)
    found = LevelMixtureHead(lambda z, n: z, levels, count).noise(jnp.asarray(output), *given)
    expected = CategoricalHead(lambda z, n: z, levels).noise(jnp.log(p), *given)
    x0 = lambda noise: (z - np.sqrt(1 / (1 + np.exp(log_snr)))[:, None] * noise) / np.sqrt(1 / (1 + np.exp(-log_snr)))[:, None]  # noqa: E731
    np.testing.assert_allclose(x0(np.asarray(found)), x0(np.asarray(expected)), atol=2e-4)


def test_the_derivatives_of_a_mixture_on_the_levels_are_finite_everywhere():
    head = LevelMixtureHead(lambda z, n: z, 256)
    output = 30 * jax.random.normal(KEYS[0], (200, 4, 11))
    z, log_snr = 5 * jax.random.normal(KEYS[1], (200, 4)), jnp.linspace(-15, 15, 200)
    value, gradient = jax.jit(jax.value_and_grad(lambda output: head.noise(output, z, log_snr).sum()))(output)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    assert jnp.abs(gradient).max() > 0


def test_a_network_of_other_outputs_is_refused():
    head = LevelMixtureHead(lambda z, n: z, 8)
    with pytest.raises(ValueError, match=r"Expected shape \(2, 16, 11\), for a LevelMixtureHead; got \(2, 16\)"):
        probdiff.Diffusion(probdiff.cosine_schedule(3), head, probdiff.DiscretizedNormalLikelihood(8)).predict_noise(jnp.zeros((2, 16)), 1)
