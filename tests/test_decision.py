"""From probability maps to masks: the counts, the rules and the black band, against brute force."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st


def draw_maps(seed, count=6, size=(9, 11)):
    """Random maps, uint8 (count, *size, 4), and masks that follow them; some masks are empty."""
    random = np.random.default_rng(seed)
    masks = random.integers(2, size=(count, *size, 4)) * random.integers(2, size=(count, 1, 1, 4))
    maps = np.clip(random.normal(90 + 60 * masks, 60), 0, 255).astype(np.uint8)
    return maps, masks


def count_all(kernel, maps, masks):
    """count_pixels over a stack."""
    counts = [kernel.count_pixels(*pair) for pair in zip(maps, masks)]
    return np.stack(counts, axis=1)


def test_counts_are_the_areas_and_overlaps_of_every_threshold(kernel):
    (maps,), (masks,) = draw_maps(0, count=1)
    areas, overlaps = kernel.count_pixels(maps, masks)
    for index, threshold in itertools.product(range(4), range(256)):
        mask = maps[..., index] >= threshold
        assert areas[index, threshold] == mask.sum()
        assert overlaps[index, threshold] == (mask & (masks[..., index] > 0)).sum()


@pytest.fixture
def small_areas(kernel, monkeypatch):
    """Minimum areas that suit maps of 9 x 11 pixels."""
    monkeypatch.setattr(kernel, "MINIMUM_AREAS", np.array([0, 10, 30, 60]))
    return kernel.MINIMUM_AREAS


def score_slowly(kernel, maps, masks, rules):
    """The Dice of each image and class under the rules, mask by mask."""
    open_gates = np.ones(4), np.asarray(rules), np.zeros(4)
    predicted = np.stack([kernel.make_masks(image, *open_gates) for image in maps])
    scores = np.empty((len(maps), 4))
    for image, index in np.ndindex(*scores.shape):
        truth, mask = masks[image, ..., index], predicted[image, ..., index]
        total = truth.sum() + mask.sum()
        scores[image, index] = 2 * (truth * mask).sum() / total if total else 1
    return scores


def test_every_rule_scores_as_by_brute_force(kernel, small_areas):
    maps, masks = draw_maps(1)
    areas, overlaps = count_all(kernel, maps, masks)
    for index in range(4):
        scores = kernel.score_rules(areas[:, index], overlaps[:, index])
        assert scores.shape == (4, 256)
        for row, threshold in itertools.product(range(4), range(0, 256, 5)):
            rules = np.tile([threshold, small_areas[row]], (4, 1))
            expected = score_slowly(kernel, maps, masks, rules)[:, index].mean()
            assert scores[row, threshold] == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 1000), count=st.integers(1, 8))
def test_tuned_rules_are_the_optimum_and_score_what_they_say(kernel, seed, count):
    maps, masks = draw_maps(seed, count)
    areas, overlaps = count_all(kernel, maps, masks)
    rules = kernel.tune_rules(areas, overlaps)
    found = kernel.apply_rules(areas, overlaps, rules)
    np.testing.assert_allclose(found, score_slowly(kernel, maps, masks, rules))
    assert rules[:, 0].min() >= 1
    for index in range(4):
        scores = kernel.score_rules(areas[:, index], overlaps[:, index])[:, 1:]
        assert found[:, index].mean() == pytest.approx(scores.max())


def test_among_equal_rules_the_one_nearest_to_one_half_wins(kernel):
    maps = np.full((1, 350, 525, 4), 0, np.uint8)
    maps[:, :100] = 250
    masks = (maps > 0).astype(int)
    masks[..., 3] = 0  # absent, so that every rule which predicts nothing scores 1
    rules = kernel.tune_rules(*count_all(kernel, maps, masks))
    assert rules[:3].tolist() == [[128, 0]] * 3
    assert rules[3, 0] == 128 and rules[3, 1] > 100 * 525


def test_every_way_to_decide_is_scored_on_the_other_half(kernel):
    """Each way's masks, made image by image, against the Dice coefficient of whole masks."""
    maps, masks = draw_maps(3, count=9)
    presence = np.random.default_rng(4).random((9, 4))
    found = kernel.cross_validate(*count_all(kernel, maps, masks), presence, recall=0.7, seed=5)
    order = np.random.default_rng(5).permutation(9)
    for chosen, scored in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        rules = kernel.tune_rules(*count_all(kernel, maps[chosen], masks[chosen]))
        truth = masks[chosen].any(axis=(1, 2))
        gates = kernel.choose_gates(truth, presence[chosen], 0.7)
        for image in scored:
            there, ones, no_gates = masks[image].any(axis=(0, 1)), np.ones(4), np.zeros(4)
            through = presence[image] >= gates
            full = np.ones(maps[image].shape, bool)
            expected = {
                "all masks empty": ~full,
                "whole image where the class is present": full & there,
                "whole image where the gate lets through": full & through,
                "threshold 0.5": maps[image] >= 128,
                "tuned": kernel.make_masks(maps[image], ones, rules, no_gates),
                "tuned, gated": kernel.make_masks(maps[image], presence[image], rules, gates),
            }
            assert found.keys() == expected.keys()
            for way, predicted in expected.items():
                scores = kernel.dice(
                    np.moveaxis(masks[image], -1, 0), np.moveaxis(predicted, -1, 0)
                )
                np.testing.assert_allclose(found[way][image], scores, err_msg=way)


@given(seed=st.integers(0, 1000), recall=st.floats(0.05, 1))
def test_gates_let_enough_images_through_and_no_more(kernel, seed, recall):
    random = np.random.default_rng(seed)
    truth, probabilities = random.random((20, 4)) < 0.5, random.integers(12, size=(20, 4)) / 12
    truth[0] = True
    gates = kernel.choose_gates(truth, probabilities, recall)
    for present, probability, gate in zip(truth.T, probabilities.T, gates):
        assert (probability[present] >= gate).mean() >= recall
        assert (probability[present] > gate).mean() < recall


def test_a_single_validation_image_cannot_be_halved(kernel):
    maps, masks = draw_maps(0, count=1)
    with pytest.raises(ValueError, match="a single validation image"):
        kernel.cross_validate(*count_all(kernel, maps, masks), np.ones((1, 4)), 0.94, seed=0)


def test_band_is_found_and_dark_sea_is_not(kernel):
    random = np.random.default_rng(0)
    image = random.integers(8, 40, size=(700, 1050, 3), dtype=np.uint8)
    image[:, 300:380] = random.integers(2, size=(700, 80, 3))  # JPEG leaves traces
    image[random.random((700, 1050)) < 0.01] = 0  # black pixels in the sea
    expected = np.zeros((350, 525), bool)
    expected[:, 150:190] = True
    np.testing.assert_array_equal(kernel.find_band(image), expected)


def test_masks_of_the_sample_leave_out_the_band(kernel, labels, paths):
    for path, rles in zip(paths, labels.to_numpy()):
        band = kernel.find_band(kernel.read_image(path, (700, 1050)))
        assert 0.02 < band.mean() < 0.15
        masked = kernel.read_plane(rles, kernel.SUBMISSION_SIZE) > 0
        assert (band & masked).sum() <= 0.005 * masked.sum()


@pytest.mark.parametrize(("activation", "channels"), [("sigmoid", 4), ("softmax", 5)])
def test_maps_of_every_image_are_bytes_at_the_submission_s_size(
    kernel, tiny, paths, activation, channels
):
    """A network whose probability of class c is the red channel / (c + 1)."""
    images = tf.keras.layers.Input((64, 96, 3), dtype=tf.uint8)
    red = tf.cast(images, tf.float32)[..., :1] / 255
    classes = [red / (index + 1) for index in range(4)]
    background = [tf.ones_like(red)] * (channels - 4)
    model = tf.keras.Model(images, tf.concat([*background, *classes], axis=-1))
    config = kernel.replace(tiny, activation=activation, batch_size=5)
    predict = kernel.compile_function(config, functools.partial(kernel.find_maps, model))
    found = list(kernel.predict_maps(config, predict, paths))
    assert len(found) == len(paths) == 12  # 5 + 5 + 2
    for path, maps in zip(paths, found):
        image = kernel.read_image(path, (64, 96))
        band = kernel.find_band(image)
        expected = tf.image.resize(image[..., :1], (350, 525)).numpy()[..., 0]
        assert maps.shape == (350, 525, 4) and maps.dtype == np.uint8
        assert band.any() and not maps[band].any()
        for index in range(4):
            error = maps[~band][..., index] - expected[~band] / (index + 1)
            assert np.abs(error).max() <= 0.51


def test_masks_below_the_minimum_area_are_dropped(kernel):
    maps = np.zeros((10, 10, 4), np.uint8)
    maps[:2] = 200
    rules = np.array([[128, 20], [128, 21], [200, 0], [201, 0]])
    masks = kernel.make_masks(maps, np.ones(4), rules, np.zeros(4))
    assert masks.sum(axis=(0, 1)).tolist() == [20, 0, 20, 0]


def test_masks_of_absent_classes_are_dropped(kernel):
    maps = np.full((10, 10, 4), 200, np.uint8)
    presence, gates = np.array([0.2, 0.3, 0.4, 0.0]), np.array([0.3, 0.3, 0.3, 0.0])
    masks = kernel.make_masks(maps, presence, kernel.PLAIN_RULES, gates)
    assert masks.any(axis=(0, 1)).tolist() == [False, True, True, True]


def test_maps_of_several_networks_are_averaged_image_by_image(kernel, tiny, paths):
    """Networks that return a constant: 10, 20 and 31 of 255, seen through different sizes."""
    predictors = []
    for value, size in ((10, (32, 64)), (20, (64, 96)), (31, (64, 96))):
        config = kernel.replace(tiny, image_size=size)
        constant = np.full((1, 350, 525, 4), value, np.uint8)
        function = functools.partial(lambda maps, images: tf.repeat(maps, len(images), 0), constant)
        predictors.append((config, function))
    together = [kernel.average_maps(maps) for maps in kernel.predict_together(predictors, paths)]
    assert len(together) == 12
    for path, maps in zip(paths, together):
        band = kernel.find_band(kernel.read_image(path, (32, 64)))
        band |= kernel.find_band(kernel.read_image(path, (64, 96)))
        assert maps.dtype == np.uint8 and set(maps[~band].ravel()) == {20}  # 61 / 3, rounded


def test_validation_counts_each_network_and_their_mean(kernel, tiny, labels, paths, monkeypatch):
    maps, _ = draw_maps(2, count=4, size=(350, 525))
    monkeypatch.setattr(kernel, "predict_together", lambda *_: ((m, m // 2) for m in maps))
    counts = kernel.count_validation([None, None], paths[:4], labels[:4])
    assert counts.shape == (3, 2, 4, 4, 256)
    for image, rles in enumerate(labels[:4].to_numpy()):
        masks = kernel.split_plane(kernel.read_plane(rles, kernel.SUBMISSION_SIZE))
        mean = kernel.average_maps([maps[image], maps[image] // 2])
        for index, values in enumerate((maps[image], maps[image] // 2, mean)):
            expected = kernel.count_pixels(values, masks)
            np.testing.assert_array_equal(counts[index, :, image], expected)
