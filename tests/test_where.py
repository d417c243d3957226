"""Where? builds the paper's network, the Dice that measures it, and its loss."""

import functools
import re

import numpy as np
import pytest
import segmentation_models
import tensorflow as tf
from conftest import CELLS, ENCODER, pack
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

# The network


@pytest.mark.parametrize(("activation", "channels"), [("sigmoid", 4), ("softmax", 5)])
def test_unet_takes_bytes_and_gives_float32_probabilities(unets, images, activation, channels):
    probabilities = unets[activation](images).numpy()
    assert probabilities.shape == (2, 64, 96, channels) and probabilities.dtype == np.float32
    assert probabilities.min() >= 0 and probabilities.max() <= 1
    if activation == "softmax":
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "size", "filters"),
    [
        ("efficientnetb0", (32, 64), (256, 128, 64, 32, 16)),
        ("efficientnetb3", (96, 160), (128, 64, 32)),
        (ENCODER, (64, 96), (8,)),
    ],
)
def test_unet_has_the_parameters_of_the_package_s_own(kernel, tiny, encoder, size, filters):
    config = kernel.replace(tiny, decoder_filters=filters)
    model = kernel.build_efficient_unet(config, encoder, size)
    options = {"classes": 4, "encoder_weights": None}
    options |= {"decoder_filters": filters} if len(filters) < 5 else {}
    reference = segmentation_models.Unet(kernel.name_encoder(encoder), (*size, 3), **options)
    assert model.count_params() == reference.count_params()
    assert model(np.zeros((1, *size, 3), np.uint8)).shape == (1, *size, 4)


@pytest.mark.parametrize("stages", [1, 3, 4])
def test_shorter_decoder_s_logits_are_brought_to_the_image_s_size_bilinearly(
    kernel, tiny, images, stages
):
    config = kernel.replace(tiny, decoder_filters=(8,) * stages, activation="softmax")
    model = kernel.build_efficient_unet(config, ENCODER, (64, 96))
    coarse = tf.keras.Model(model.input, model.get_layer("logits").input)(images)
    assert coarse.shape == (2, 2 * 2**stages, 3 * 2**stages, 5)
    expected = tf.nn.softmax(tf.image.resize(coarse, (64, 96), "bilinear"))
    np.testing.assert_allclose(model(images), expected, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_halves_are_used_in_the_layers_only(kernel, tiny, images, precision):
    tf.keras.mixed_precision.set_global_policy(precision)
    try:
        model = kernel.build_efficient_unet(tiny, ENCODER, (64, 96))
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    assert model.get_layer(index=2).output.dtype.name == precision.removeprefix("mixed_")
    assert model.output.dtype == tf.float32
    assert {weight.dtype for weight in model.weights} == {tf.float32}  # batch statistics too
    loss = kernel.unet_loss(tiny, tf.zeros((2, 64, 96), tf.uint8), model(images))
    assert loss.dtype == tf.float32 and loss.shape == (2,) and np.isfinite(loss).all()


def test_the_figure_of_the_network_has_its_channels(kernel, tiny):
    """Size by size, those of B0's maps and of the decoder's."""
    drawn = re.findall(r"(?m)^# 1/(\d+) +(?:(\d+) .*--> +)?(\d+) +upsample", CELLS)
    config = kernel.replace(tiny, decoder_filters=kernel.PAPER.decoder_filters)
    model = kernel.build_efficient_unet(config, "efficientnetb0", (64, 96)).get_layer(index=2)
    for stage, (part, encoder, decoder) in enumerate(reversed(drawn)):
        output = model.get_layer(f"decoder_stage{stage}b_relu").output
        assert output.shape[1:] == (64 // int(part), 96 // int(part), int(decoder))
        if stage < 4:
            _, skipped = model.get_layer(f"decoder_stage{stage}_concat").input
            assert skipped.shape[1:] == (64 // int(part), 96 // int(part), int(encoder))
    assert len(drawn) == 5 and "# 1/32  1280, from which" in CELLS
    assert model.get_layer("top_activation").output.shape[1:] == (2, 3, 1280)


# The measure and the loss

PAIRS = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda size: st.tuples(arrays(bool, size), arrays(bool, size))
)


@given(pair=PAIRS)
def test_dice_is_that_of_the_definition_and_scikit_learn_s_f1(kernel, pair):
    truth, prediction = pair
    found = kernel.dice(np.array((truth & prediction).sum()), truth.sum() + prediction.sum())
    first, second = ({*zip(*np.nonzero(mask))} for mask in pair)
    total = len(first) + len(second)
    assert found == pytest.approx(2 * len(first & second) / total if total else 1)
    if total:
        assert found == pytest.approx(f1_score(truth.ravel(), prediction.ravel()))


@pytest.mark.parametrize("background", [False, True])
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4))
def test_dice_at_half_is_the_mean_of_each_picture_s_four(kernel, background, seed, count):
    random = np.random.default_rng(seed)
    truth = random.integers(2, size=(count, 3, 4, 4)) * random.integers(2, size=(count, 1, 1, 4))
    probabilities = random.integers(5, size=truth.shape) / 4  # a half among them
    probabilities = probabilities * random.integers(2, size=(count, 1, 1, 4))
    predicted = probabilities >= 0.5
    expected = []
    for picture in range(count):
        scores = []
        for index in range(4):
            first, second = (
                {*zip(*np.nonzero(masks[picture, ..., index]))} for masks in (truth, predicted)
            )
            total = len(first) + len(second)
            scores.append(2 * len(first & second) / total if total else 1)
        expected.append(np.mean(scores))
    if background:  # of the softmax, before the classes
        others = random.random((count, 3, 4, 1))
        probabilities = np.concatenate([others, probabilities], axis=-1)
    config = kernel.PAPER if background else kernel.BEST
    planes, probabilities = pack(truth), tf.constant(probabilities, tf.float32)
    found = kernel.dice_at_half(config, planes, probabilities)
    assert found.shape == (count,)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = kernel.dice_at_half(config, tf.cast(planes, tf.float32), probabilities)
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # Keras gives its metrics floats


@pytest.fixture(scope="module")
def batch():
    """Random masks (2, 3, 4, classes), and logits of background and classes."""
    random = np.random.default_rng(0)
    return random.integers(2, size=(2, 3, 4, 4)), random.normal(size=(2, 3, 4, 5))


def exclude_slowly(masks):
    """The number of the channel that each pixel of one image belongs to, pixel by pixel."""
    areas = masks.sum(axis=(0, 1))
    winners = np.zeros(masks.shape[:2], int)
    for row, column in np.ndindex(*winners.shape):
        classes = np.flatnonzero(masks[row, column])
        if len(classes):
            winners[row, column] = 1 + min(classes, key=lambda index: areas[index])
    return winners


def test_overlaps_go_to_the_smaller_mask(kernel, batch):
    """What the cross-entropy asks of each pixel is the channel whose probability lowers it."""
    masks, uniform = batch[0], np.full((2, 3, 4, 5), 0.2)
    config = kernel.replace(kernel.PAPER, cross_entropy_weight=1.0)
    probabilities = tf.Variable(uniform, dtype=tf.float32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(kernel.unet_loss(config, pack(masks), probabilities))
    asked = np.argmin(tape.gradient(loss, probabilities), axis=-1)
    for image in range(2):
        np.testing.assert_array_equal(asked[image], exclude_slowly(masks[image]))


def reference_loss(entropy, truth, probabilities):
    """0.7 x cross-entropy + 0.3 x Dice loss of one image, from the text of the paper."""
    ratios = []
    for index in range(4):
        t, p = truth[..., index], probabilities[..., index]
        ratios.append((2 * (t * p).sum() + 1) / (t.sum() + p.sum() + 1))
    return 0.7 * entropy + 0.3 * (1 - np.mean(ratios))


def test_sigmoid_loss_is_binary_cross_entropy_and_dice(kernel, batch):
    masks, logits = batch
    probabilities = 1 / (1 + np.exp(-logits[..., :4]))
    found = kernel.unet_loss(kernel.BEST, pack(masks), tf.constant(probabilities))
    for image in range(2):
        t, p = masks[image], probabilities[image]
        entropy = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()
        assert found[image].numpy() == pytest.approx(reference_loss(entropy, t, p), rel=1e-5)


def test_softmax_loss_is_categorical_cross_entropy_and_dice(kernel, batch):
    masks, logits = batch
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    found = kernel.unet_loss(kernel.PAPER, pack(masks), tf.constant(probabilities))
    for image in range(2):
        winners, p = exclude_slowly(masks[image]), probabilities[image]
        entropy = -np.log(np.take_along_axis(p, winners[..., None], axis=-1)).mean()
        t = np.eye(5)[winners]
        expected = reference_loss(entropy, t[..., 1:], p[..., 1:])
        assert found[image].numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("preset", ["PAPER", "BEST"])
def test_loss_vanishes_for_a_perfect_prediction_only(kernel, preset):
    masks = np.zeros((1, 8, 8, 4), np.uint8)
    masks[0, :4, :, 0] = masks[0, 4:, 2:, 2] = 1
    background = (masks.sum(axis=-1, keepdims=True) == 0).astype(np.uint8)
    perfect = np.concatenate([background, masks], axis=-1) if preset == "PAPER" else masks
    loss = functools.partial(kernel.unet_loss, getattr(kernel, preset))
    assert loss(pack(masks), tf.constant(perfect, tf.float32)).numpy() == pytest.approx(0, abs=1e-5)
    assert loss(pack(masks), tf.constant(perfect[..., ::-1].copy(), tf.float32)).numpy() > 1
