"""The classifier: its sizes, its two phases, what it is measured by and what it looks at."""

import itertools

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score


@pytest.mark.parametrize(
    ("encoder", "size"),
    [
        ("efficientnetb0", (224, 336)),
        ("efficientnetb1", (240, 360)),
        ("efficientnetb2", (260, 390)),
        ("efficientnetb3", (300, 450)),
        ("efficientnetb4", (380, 570)),
        ("efficientnetb5", (456, 684)),
        ((1.0, 1.0), (224, 336)),
        ((1.0, 1.3), (280, 420)),  # half way from B2 to B3
        ((0.5, 0.3), (224, 336)),
    ],
)
def test_input_is_the_encoder_s_own_size_in_the_shape_of_the_pictures(kernel, encoder, size):
    config = kernel.configure_classifier(kernel.replace(kernel.BEST, encoder=encoder))
    assert config.image_size == size and config.batch_size == 32
    assert kernel.configure_classifier(config) == config


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_bytes_in_and_float32_probabilities_out(kernel, tiny, activation):
    config = kernel.replace(tiny, activation=activation)
    images = np.random.default_rng(0).integers(256, size=(2, 64, 96, 3), dtype=np.uint8)
    probabilities = kernel.build_classifier(config)(images).numpy()
    assert probabilities.shape == (2, 4) and probabilities.dtype == np.float32
    assert probabilities.min() > 0 and probabilities.max() < 1
    if activation == "softmax":
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)


def test_presence_is_a_pixel_of_the_mask(kernel):
    masks = np.zeros((2, 5, 6, 4), np.uint8)
    masks[0, 4, 5, 1] = masks[1, :, :, 3] = masks[1, 0, 0, 0] = 1
    planes = (masks << np.arange(4, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    presence = kernel.find_presence(tf.constant(planes))
    assert presence.numpy().tolist() == [[0, 1, 0, 0], [1, 0, 0, 1]]


def test_baseline_trains_the_head_and_fine_tuning_all_with_a_new_optimiser(
    kernel, session, tiny, labels, sample, tmp_path, monkeypatch
):
    optimizers, make_optimizer = [], kernel.make_optimizer

    def remember(config, total_steps, weights):
        optimizers.append((make_optimizer(config, total_steps, weights), total_steps))
        return optimizers[-1][0]

    monkeypatch.setattr(kernel, "make_optimizer", remember)
    config = kernel.replace(tiny, classifier_epochs=(2, 1), activation="softmax", folds=3)
    (run,) = kernel.list_runs(kernel.replace(config, folds_to_run=()), tmp_path)
    folds = kernel.assign_folds(labels, 3, seed=0)
    histories = kernel.train_classifier(session, run, labels, folds, sample / "train_images")
    assert {name: len(history) for name, history in histories.items()} == {
        "baseline": 2,
        "classifier": 1,
    }
    (first, first_steps), (second, second_steps) = optimizers
    assert (first_steps, second_steps) == (8, 4)  # 2 x 8 images in batches of 4
    assert (first.iterations, second.iterations) == (8, 4)

    tf.keras.utils.set_random_seed(config.seed)
    fresh = kernel.build_classifier(config)
    weights = [model.get_weights() for model in (fresh, kernel.load_network(run, "baseline"))]
    weights.append(kernel.load_network(run, "classifier").get_weights())
    changed = [
        [not np.array_equal(*pair) for pair in zip(before, after)]
        for before, after in itertools.pairwise(weights)
    ]
    assert changed[0] == [False] * (len(weights[0]) - 2) + [True] * 2  # the last layer's two
    assert np.mean(changed[1]) > 0.8


def test_probabilities_of_each_image_in_order(kernel, tiny, paths, tmp_path):
    (run,) = kernel.list_runs(kernel.replace(tiny, folds_to_run=()), tmp_path)
    config = kernel.configure_classifier(run.config)
    model = kernel.build_classifier(config)
    model.save_weights(run.files("classifier").weights)
    found = kernel.predict_presence(run, "classifier", paths[:5])
    for path, probabilities in zip(paths, found):
        expected = model(kernel.read_image(path, config.image_size)[None], training=False)
        np.testing.assert_allclose(probabilities, expected[0], rtol=1e-3)


def test_accuracy_is_the_share_of_right_answers(kernel):
    truth = np.array([[1, 0, 1, 0], [0, 0, 0, 1]], bool)
    probabilities = np.array([[0.5, 0.1, 0.3, 0.1], [0.2, 0.3, 0.1, 0.4]])
    assert kernel.measure_accuracy(truth, probabilities, "sigmoid") == 6 / 8
    assert kernel.measure_accuracy(truth, probabilities, "softmax") == 7 / 8


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
    enough = [point[0] for point in reached.values() if point[1] >= kernel.QUOTED_PRECISION]
    assert precise_recall == pytest.approx(max(enough, default=np.nan), nan_ok=True)


def test_absent_class_has_no_curve_and_an_open_gate(kernel):
    truth = pd.DataFrame(np.eye(3, 4, dtype=bool), columns=kernel.CLASSES)
    probabilities = truth * 0.6 + 0.2
    table = kernel.describe_classifier(truth, probabilities, 0.94)
    assert table["average precision"].tolist()[:3] == [1, 1, 1]
    assert table.loc["Sugar"].isna().tolist() == [False, True, True, True, True, False]
    np.testing.assert_allclose(table["Brier score"], 0.04)
    gates = kernel.choose_gates(truth.to_numpy(), probabilities.to_numpy(), 0.94)
    np.testing.assert_allclose(gates, [0.8, 0.8, 0.8, 0])


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


def test_grad_cam_of_a_real_classifier_has_the_encoder_s_resolution(kernel, tiny):
    images = np.random.default_rng(0).integers(256, size=(2, 64, 96, 3), dtype=np.uint8)
    heat = kernel.grad_cam(kernel.build_classifier(tiny), images).numpy()
    assert heat.shape == (2, 2, 3, 4) and heat.dtype == np.float32
    assert heat.min() >= 0 and heat.max() > 0


def test_heat_is_shared_between_inside_and_outside(kernel):
    masks = np.zeros((2, 4, 4, 4), np.uint8)
    masks[0, :2, :, 0] = masks[0, :, 0, 1] = masks[0, :, :, 2] = 1
    heat = np.ones((2, 4, 4, 4), np.float32)
    heat[0, 2:, :, 0] = 3
    heat[0, ..., 2] = 0
    in_mask, in_image = kernel.share_heat(heat, masks)
    np.testing.assert_allclose(in_mask[0], [1 / 4, 1 / 4, np.nan, np.nan])  # no heat, no mask
    np.testing.assert_allclose(in_image[0], [1 / 2, 1 / 4, np.nan, np.nan])
    assert np.isnan(in_mask[1]).all() and np.isnan(in_image[1]).all()
