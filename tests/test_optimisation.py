"""The measure, the losses and the optimiser."""

import functools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

PAIRS = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda size: st.tuples(arrays(bool, size), arrays(bool, size))
)


@given(pair=PAIRS)
@settings(max_examples=2000)
def test_dice_is_scikit_learn_s_f1_where_that_is_defined(kernel, pair):
    truth, prediction = pair
    expected = 1.0
    if truth.any() or prediction.any():
        expected = f1_score(truth.ravel(), prediction.ravel())
    assert kernel.dice(*pair) == pytest.approx(expected)


@given(pair=PAIRS)
def test_dice_is_the_one_of_the_definition(kernel, pair):
    truth, prediction = ({*zip(*np.nonzero(mask))} for mask in pair)
    total = len(truth) + len(prediction)
    expected = 2 * len(truth & prediction) / total if total else 1
    assert kernel.dice(*pair) == pytest.approx(expected)
    assert kernel.dice(*(pair[::-1])) == kernel.dice(*pair)


def test_dice_of_a_stack_is_one_value_per_mask(kernel):
    masks = np.random.default_rng(0).integers(2, size=(2, 3, 4, 5, 6))
    scores = kernel.dice(masks[0], masks[1])
    assert scores.shape == (3, 4)
    assert scores[2, 1] == kernel.dice(masks[0, 2, 1], masks[1, 2, 1])


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
    loss = functools.partial(kernel.unet_loss, kernel.PRESETS[preset])
    assert loss(pack(masks), tf.constant(perfect, tf.float32)).numpy() == pytest.approx(0, abs=1e-5)
    assert loss(pack(masks), tf.constant(perfect[..., ::-1].copy(), tf.float32)).numpy() > 1


def test_rectified_adam_warms_up_and_decays(kernel):
    """Step for step equal to the algorithm of arXiv 1908.03265 with a linear rise and fall."""
    total, peak, first_decay, second_decay = 20, 0.01, 0.9, 0.999
    # Eight images in a step: the square root of a quarter of the rate for 32.
    config = kernel.replace(
        kernel.BEST, learning_rate=2 * peak, batch_size=8, warmup_proportion=0.2
    )
    variable = tf.Variable([1.0, -2.0])
    optimizer = kernel.make_optimizer(config, total, [variable])
    expected = np.array([1.0, -2.0])
    mean, square = np.zeros(2), np.zeros(2)
    longest = 2 / (1 - second_decay) - 1
    for step in range(1, total + 1):
        gradient = np.array([math.sin(step), 0.5])
        optimizer.apply_gradients([(tf.constant(gradient, tf.float32), variable)])
        mean = first_decay * mean + (1 - first_decay) * gradient
        square = second_decay * square + (1 - second_decay) * gradient**2
        length = longest - 2 * step * second_decay**step / (1 - second_decay**step)
        rate = peak * step / 4 if step <= 4 else peak + (peak / 100 - peak) * (step - 4) / 16
        update = mean / (1 - first_decay**step)
        if length >= 5:
            update /= np.sqrt(square / (1 - second_decay**step)) + 1e-7
            numerator = (length - 4) * (length - 2) * longest
            update *= math.sqrt(numerator / ((longest - 4) * (longest - 2) * length))
        expected = expected - rate * update
        np.testing.assert_allclose(variable.numpy(), expected, rtol=2e-4)
