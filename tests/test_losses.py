"""The measure, the losses and the optimiser, against their definitions."""

import functools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

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


@pytest.fixture(scope="module")
def batch():
    """Random masks (2, 3, 4, classes), and logits of background and classes."""
    random = np.random.default_rng(0)
    return random.integers(2, size=(2, 3, 4, 4)), random.normal(size=(2, 3, 4, 5))


def pack(masks):
    """Masks (batch, height, width, classes) as planes."""
    return tf.constant((masks << np.arange(4)).sum(axis=-1).astype(np.uint8))


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


def exclude_slowly(masks):
    """The number of the channel that each pixel of one image belongs to, pixel by pixel."""
    areas = masks.sum(axis=(0, 1))
    winners = np.zeros(masks.shape[:2], int)
    for row, column in np.ndindex(*winners.shape):
        classes = np.flatnonzero(masks[row, column])
        if len(classes):
            winners[row, column] = 1 + min(classes, key=lambda index: areas[index])
    return winners


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


def test_overlaps_go_to_the_smaller_mask(kernel, batch):
    masks = batch[0]
    found = kernel.exclude_overlaps(tf.constant(masks, tf.float32)).numpy()
    for image in range(2):
        np.testing.assert_array_equal(found[image], np.eye(5)[exclude_slowly(masks[image])])


@pytest.mark.parametrize("preset", ["PAPER", "BEST"])
def test_loss_vanishes_for_a_perfect_prediction_only(kernel, preset):
    masks = np.zeros((1, 8, 8, 4), np.uint8)
    masks[0, :4, :, 0] = masks[0, 4:, 2:, 2] = 1
    background = (masks.sum(axis=-1, keepdims=True) == 0).astype(np.uint8)
    perfect = np.concatenate([background, masks], axis=-1) if preset == "PAPER" else masks
    loss = functools.partial(kernel.unet_loss, getattr(kernel, preset))
    assert loss(pack(masks), tf.constant(perfect, tf.float32)).numpy() == pytest.approx(0, abs=1e-5)
    assert loss(pack(masks), tf.constant(perfect[..., ::-1].copy(), tf.float32)).numpy() > 1


def test_the_classifier_s_loss_asks_for_a_pixel_of_the_mask(kernel):
    masks = np.zeros((2, 5, 6, 4), np.uint8)
    masks[0, 4, 5, 1] = masks[1, :, :, 3] = masks[1, 0, 0, 0] = 1
    probabilities = np.array([[0.1, 0.8, 0.3, 0.4], [0.6, 0.2, 0.1, 0.9]])
    found = kernel.classifier_loss(kernel.BEST, pack(masks), tf.constant(probabilities))
    right = np.array([[0.9, 0.8, 0.7, 0.6], [0.6, 0.8, 0.9, 0.9]])
    np.testing.assert_allclose(found, -np.log(right).mean(axis=1), rtol=1e-5)
    softmax = np.array([[0.1, 0.6, 0.2, 0.1], [0.3, 0.1, 0.1, 0.5]])
    found = kernel.classifier_loss(kernel.PAPER, pack(masks), tf.constant(softmax))
    expected = [-np.log(0.6), -np.log(0.3) - np.log(0.5)]  # a 1 for each class in the image
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rectified_adam_warms_up_and_decays(kernel):
    """Step for step equal to the algorithm of arXiv 1908.03265 with a linear rise and fall."""
    total, peak, first_decay, second_decay = 40, 0.01, 0.9, 0.999
    # Eight images in a step: the square root of a quarter of the rate for 32.
    config = kernel.replace(kernel.BEST, learning_rate=2 * peak)
    variable = tf.Variable([1.0, -2.0])
    optimizer = kernel.make_optimizer(config, 8, total)
    expected = np.array([1.0, -2.0])
    mean, square = np.zeros(2), np.zeros(2)
    longest = 2 / (1 - second_decay) - 1
    for step in range(1, total + 1):
        gradient = np.array([math.sin(step), 0.5])
        optimizer.apply_gradients([(tf.constant(gradient, tf.float32), variable)])
        mean = first_decay * mean + (1 - first_decay) * gradient
        square = second_decay * square + (1 - second_decay) * gradient**2
        length = longest - 2 * step * second_decay**step / (1 - second_decay**step)
        rate = peak * step / 4 if step <= 4 else peak + (peak / 100 - peak) * (step - 4) / 36
        update = mean / (1 - first_decay**step)
        if length >= 5:
            update /= np.sqrt(square / (1 - second_decay**step)) + 1e-7
            numerator = (length - 4) * (length - 2) * longest
            update *= math.sqrt(numerator / ((longest - 4) * (longest - 2) * length))
        expected = expected - rate * update
        np.testing.assert_allclose(variable.numpy(), expected, rtol=2e-4)
