"""Classify the patterns measures the classifier, and shows what it looks at."""

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score


@given(
    answers=st.lists(st.tuples(st.booleans(), st.integers(0, 10)), min_size=1, max_size=30),
    recall=st.floats(0.01, 1),
)
def test_points_of_the_curve_are_those_of_brute_force(kernel, answers, recall):
    truth, probability = np.array([(True, 3), *answers]).T
    probability = probability / 10
    threshold, precision, precise_recall = kernel.find_points(truth, probability, recall)
    reached = {
        level: (recall_score(truth, found), precision_score(truth, found))
        for level in probability
        for found in [probability >= level]
    }
    assert threshold == max(level for level, point in reached.items() if point[0] >= recall)
    assert precision == pytest.approx(reached[threshold][1])
    enough = [point[0] for point in reached.values() if point[1] >= 0.9]
    assert precise_recall == pytest.approx(max(enough, default=np.nan), nan_ok=True)


def test_an_absent_class_has_no_curve(kernel):
    truth = pd.DataFrame(np.eye(3, 4, dtype=bool), columns=kernel.CLASSES)
    table = kernel.describe_classifier(truth, truth * 0.6 + 0.2, 0.94)
    assert table["average precision"].tolist()[:3] == [1, 1, 1]
    assert table["frequency"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert table.loc["Sugar"].isna().tolist() == [False, True, True, True, True, False]
    np.testing.assert_allclose(table["Brier score"], 0.04)


def build_color_classifier():
    """A classifier whose maps are the red and the green channel, each the evidence of a class.

    Class 0 is red, class 1 is green and not red, class 2 is never there.
    """
    images = tf.keras.layers.Input((6, 8, 3), dtype=tf.uint8)
    maps = tf.keras.layers.Rescaling(1 / 255)(images)[..., :2]
    average = tf.keras.layers.GlobalAveragePooling2D(name="average")(maps)
    logits = tf.keras.layers.Dense(3, name="logits", use_bias=False)
    model = tf.keras.Model(images, tf.keras.layers.Activation("sigmoid")(logits(average)))
    logits.set_weights([np.array([[2.0, -1.0, -1.0], [0.0, 3.0, -1.0]])])
    return model


def test_grad_cam_finds_the_evidence(kernel):
    """With one average and one layer behind the maps, it is their sum weighted by that layer."""
    image = np.zeros((1, 6, 8, 3), np.uint8)
    image[0, 1:3, 2:5, 0] = 255
    image[0, 2:5, 4:7, 1] = 255
    red, green = image[0, ..., 0] / 255, image[0, ..., 1] / 255
    heat = kernel.grad_cam(build_color_classifier(), np.concatenate([image, 0 * image])).numpy()
    assert heat.shape == (2, 6, 8, 3) and not heat[1].any()
    for index, evidence in enumerate((2 * red, np.maximum(3 * green - red, 0), 0 * red)):
        np.testing.assert_allclose(heat[0, ..., index], evidence / 48, atol=1e-7)


def test_grad_cam_of_a_real_classifier_is_what_its_gradients_say(kernel, tiny):
    """Equations 1 and 2 of arXiv 1610.02391 with TensorFlow's own gradients."""
    images = np.random.default_rng(0).integers(256, size=(2, 64, 96, 3), dtype=np.uint8)
    classifier = kernel.build_classifier(tiny, (0.5, 0.3), (64, 96))
    heat = kernel.grad_cam(classifier, images).numpy()
    assert heat.shape == (2, 2, 3, 4) and heat.dtype == np.float32 and heat.max() > 0
    average, logits = classifier.get_layer("average"), classifier.get_layer("logits")
    maps = tf.keras.Model(classifier.input, average.input)(images)
    for index in range(4):
        with tf.GradientTape() as tape:
            tape.watch(maps)
            score = logits(average(maps))[:, index]
        weights = tf.reduce_mean(tape.gradient(score, maps), axis=(1, 2), keepdims=True)
        expected = tf.nn.relu(tf.reduce_sum(weights * maps, axis=-1))
        np.testing.assert_allclose(heat[..., index], expected, rtol=1e-4, atol=1e-8)
