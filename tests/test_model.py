"""EfficientUNet: what goes in, what comes out, what is inside."""

import inspect

import efficientnet.tfkeras
import numpy as np
import pytest
import segmentation_models
import tensorflow as tf


@pytest.fixture(scope="module")
def unets(kernel, tiny):
    """The network with either activation."""
    configs = {name: kernel.replace(tiny, activation=name) for name in ("sigmoid", "softmax")}
    return {name: kernel.build_efficient_unet(config) for name, config in configs.items()}


@pytest.fixture(scope="module")
def images():
    """Two random images."""
    return np.random.default_rng(0).integers(256, size=(2, 64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize(("activation", "channels"), [("sigmoid", 4), ("softmax", 5)])
def test_bytes_in_and_float32_probabilities_out(unets, images, activation, channels):
    probabilities = unets[activation](images).numpy()
    assert probabilities.shape == (2, 64, 96, channels) and probabilities.dtype == np.float32
    assert probabilities.min() >= 0 and probabilities.max() <= 1
    if activation == "softmax":
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)


def test_normalisation_is_the_one_the_encoder_was_trained_with(unets, images):
    model = unets["sigmoid"]
    normalised = tf.keras.Model(model.input, model.get_layer(index=1).output)(images)
    expected = efficientnet.tfkeras.preprocess_input(images.astype(np.float32))
    np.testing.assert_allclose(normalised, expected, atol=1e-5)


def upsampling_layers(unet):
    """The five layers that double the size."""
    return [layer for layer in unet.layers if isinstance(layer, tf.keras.layers.UpSampling2D)]


def test_decoder_upsamples_bilinearly(unets):
    unet = unets["sigmoid"].get_layer(index=2)
    layers = upsampling_layers(unet)
    assert len(layers) == 5
    ends = tf.keras.Model(unet.input, [(layer.input, layer.output) for layer in layers])
    for low, high in ends(tf.random.stateless_normal((1, 64, 96, 3), (0, 0))):
        expected = tf.image.resize(low, high.shape[1:3], "bilinear")
        np.testing.assert_allclose(high, expected, rtol=1e-4, atol=1e-5)


def test_whole_network_follows_the_interpolation(unets, images):
    model = unets["sigmoid"]
    bilinear = model(images).numpy()
    for layer in upsampling_layers(model.get_layer(index=2)):
        layer.interpolation = "nearest"
    nearest = model(images).numpy()
    for layer in upsampling_layers(model.get_layer(index=2)):
        layer.interpolation = "bilinear"
    assert np.abs(bilinear - nearest).max() > 1e-3
    np.testing.assert_array_equal(model(images), bilinear)


def test_batch_normalisation_takes_its_momentum_from_the_configuration(unets, tiny):
    layers = unets["sigmoid"].get_layer(index=2).layers
    momenta = {x.momentum for x in layers if isinstance(x, tf.keras.layers.BatchNormalization)}
    assert momenta == {tiny.batch_norm_momentum}


@pytest.mark.parametrize("encoder", ["efficientnetb0", "efficientnetb3"])
@pytest.mark.parametrize("size", [(32, 64), (96, 160)])
def test_encoders_and_sizes(kernel, tiny, encoder, size):
    config = kernel.replace(tiny, encoder=encoder, image_size=size)
    model = kernel.build_efficient_unet(config)
    reference = segmentation_models.Unet(encoder, (*size, 3), classes=4, encoder_weights=None)
    assert model.count_params() == reference.count_params()
    assert model(np.zeros((1, *size, 3), np.uint8)).shape == (1, *size, 4)


def count_published(width, depth):
    """The parameters of the EfficientNet that Keras itself ships, without its normalisation."""
    build = inspect.unwrap(tf.keras.applications.efficientnet.EfficientNetB0).__globals__
    model = build["EfficientNet"](width, depth, 224, weights=None, include_top=False)
    return model.count_params() - 7  # mean, variance and count of three channels


@pytest.mark.parametrize(
    ("encoder", "width", "depth"),
    [
        ("efficientnetb0", 1.0, 1.0),
        ("efficientnetb1", 1.0, 1.1),
        ((1.0, 1.0), 1.0, 1.0),
        ((1.1, 1.2), 1.1, 1.2),  # B2
        ((0.5, 0.3), 0.5, 0.3),
        ((0.75, 1.5), 0.75, 1.5),
    ],
)
def test_encoders_have_as_many_parameters_as_keras_s(kernel, tiny, encoder, width, depth):
    config = kernel.replace(tiny, encoder=encoder)
    encoder = kernel.build_classifier(config).get_layer(index=2)
    assert encoder.count_params() == count_published(width, depth)
    unet = kernel.build_efficient_unet(config).get_layer(index=2)
    inside = tf.keras.Model(unet.input, unet.get_layer("top_activation").output)
    assert inside.count_params() == encoder.count_params()


def test_coefficients_of_b0_make_b0(kernel, tiny):
    """The same layers with the same shapes, in both networks."""
    configs = [kernel.replace(tiny, encoder=encoder) for encoder in ("efficientnetb0", (1.0, 1.0))]
    for build in (kernel.build_classifier, kernel.build_efficient_unet):
        first, second = ([w.shape for w in build(config).weights] for config in configs)
        assert first == second


def test_scaling_multiplies_channels_and_repeats_layers(kernel, tiny):
    """B0's widths 32 to 320 and depths 1, 2, 2, 3, 3, 4, 1, scaled and rounded by hand."""
    encoder = kernel.build_classifier(kernel.replace(tiny, encoder=(1.5, 0.6))).get_layer(index=2)
    assert encoder.get_layer("stem_conv").filters == 48
    repeats = [1, 2, 2, 2, 2, 3, 1]  # 0.6 times as many, rounded up
    widths = [24, 40, 64, 120, 168, 288, 480]  # 1.5 times as many, to the nearest 8; 36 to 40
    for block, (count, width) in enumerate(zip(repeats, widths), start=1):
        names = [f"block{block}{letter}_project_conv" for letter in "abcd"]
        there = [layer for layer in encoder.layers if layer.name in names]
        assert [layer.filters for layer in there] == [width] * count
    assert encoder.get_layer("top_conv").filters == 1920


def test_coefficients_have_no_imagenet_weights(kernel, tiny):
    config = kernel.replace(tiny, encoder=(1.0, 1.3), encoder_weights="imagenet")
    for build in (kernel.build_classifier, kernel.build_efficient_unet):
        with pytest.raises(ValueError, match="efficientnet-1.0-1.3 has no ImageNet weights"):
            build(config)


def test_encoder_weights_come_from_a_file(kernel, tiny, tmp_path):
    encoder = efficientnet.tfkeras.EfficientNetB0(
        include_top=False, weights=None, input_shape=(64, 96, 3)
    )
    encoder.save_weights(tmp_path / "encoder.h5")
    path = str(tmp_path / "encoder.h5")
    config = kernel.replace(tiny, encoder="efficientnetb0", encoder_weights=path)
    for network in (kernel.build_efficient_unet(config), kernel.build_classifier(config)):
        ours = network.get_layer(index=2)
        for layer in (layer for layer in encoder.layers if layer.weights):
            weights = ours.get_layer(layer.name).get_weights()
            for expected, found in zip(layer.get_weights(), weights):
                np.testing.assert_array_equal(found, expected)


def test_float16_inside_leaves_the_output_and_the_global_policy_alone(kernel, tiny, images):
    config = kernel.replace(tiny, precision="mixed_float16")
    model = kernel.build_efficient_unet(config)
    assert model.get_layer(index=2).output.dtype == tf.float16
    assert model.output.dtype == tf.float32
    assert tf.keras.mixed_precision.global_policy().name == "float32"
    assert np.isfinite(model(images)).all()
