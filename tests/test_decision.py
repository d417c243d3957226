"""From probability maps to masks: the counts, the rules and the black band, against brute force."""

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
    predicted = np.stack([kernel.make_masks(image, np.asarray(rules)) for image in maps])
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


def test_tuning_is_scored_on_the_other_half(kernel):
    maps, masks = draw_maps(3, count=7)
    areas, overlaps = count_all(kernel, maps, masks)
    found = kernel.score_tuning(areas, overlaps, seed=5)
    order = np.random.default_rng(5).permutation(7)
    for tuned, scored in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        rules = kernel.tune_rules(areas[tuned], overlaps[tuned])
        expected = score_slowly(kernel, maps[scored], masks[scored], rules)
        np.testing.assert_allclose(found[scored], expected)


def test_a_single_validation_image_cannot_be_halved(kernel):
    maps, masks = draw_maps(0, count=1)
    with pytest.raises(ValueError, match="single image"):
        kernel.score_tuning(*count_all(kernel, maps, masks), seed=0)


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
    found = list(kernel.predict_maps(config, kernel.make_predictor(config, model), paths))
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
    masks = kernel.make_masks(maps, rules)
    assert masks.sum(axis=(0, 1)).tolist() == [20, 0, 20, 0]
