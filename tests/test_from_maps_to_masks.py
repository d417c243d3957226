"""From maps to masks averages the maps of networks and decides on masks.

The counts, the ways to decide and the maps are compared with brute force.
"""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

# Maps


def build_red(size, channels):
    """A network whose probability of class c is the red channel / (c + 1)."""
    images = tf.keras.layers.Input((*size, 3), dtype=tf.uint8)
    red = tf.cast(images, tf.float32)[..., :1] / 255
    classes = [red / (index + 1) for index in range(4)]
    background = [tf.ones_like(red)] * (channels - 4)
    return tf.keras.Model(images, tf.concat([*background, *classes], axis=-1))


def make_unet(kernel, size, batch_size, model):
    """A U-Net that is only predicted with."""
    parts = kernel.build_efficient_unet, kernel.unet_loss, kernel.dice_at_half
    network = kernel.Network("U-Net", "efficientnetb0", 0, kernel.UNetConfig, size, 1, *parts)
    return kernel.replace(network, batch_size=batch_size, model=model)


@pytest.mark.parametrize(("size", "channels"), [((64, 96), 4), ((64, 96), 5), ((704, 1056), 4)])
def test_maps_of_every_picture_are_bytes_at_the_submission_s_size(kernel, pictures, size, channels):
    model = kernel.build_predictor(build_red(size, channels), False)
    predictor = make_unet(kernel, size, 5, model)
    found = list(kernel.predict_maps([predictor], pictures, chunk=7))
    assert len(found) == len(pictures) == 12  # 5 + 2, and 5
    for path, (maps, mean) in zip(pictures["path"], found):
        red = kernel.read_image(path, size)[..., :1].astype(np.float32)
        if size == (704, 1056):  # every pixel counts, where resizing alone would leave some out
            red = red.reshape(352, 2, 528, 2, 1).mean(axis=(1, 3))
        expected = tf.image.resize(red, (350, 525)).numpy()[..., 0]
        assert maps.shape == (350, 525, 4) and maps.dtype == np.uint8
        np.testing.assert_array_equal(maps, mean)
        for index in range(4):
            np.testing.assert_allclose(maps[..., index], expected / (index + 1), atol=0.51)


def test_flips_are_turned_back_and_averaged(kernel):
    """A network whose probability is the brightness, times how far right and how far down it is."""
    images = np.zeros((2, 350, 525, 3), np.uint8)
    images[0, 20:80, 30:90] = images[1, 200:300, 400:500] = 255
    down, right = np.linspace(0, 1, 350)[:, None], np.linspace(0, 1, 525)[None]
    inputs = tf.keras.layers.Input((350, 525, 3), dtype=tf.uint8)
    bright = tf.cast(inputs[..., 0], tf.float32) / 255
    parts = [bright, bright * right, bright * down, bright]
    unet = tf.keras.Model(inputs, tf.stack(parts, axis=-1))
    bright = images[..., 0] / 255
    plain = kernel.build_predictor(unet, False)(images).numpy()
    np.testing.assert_allclose(plain[..., 1], 255 * bright * right, atol=0.51)
    flipped = kernel.build_predictor(unet, True)(images).numpy()
    np.testing.assert_allclose(flipped[..., 0], 255 * bright, atol=0.51)
    for index in (1, 2):  # each place is as often on one side as on the other
        np.testing.assert_allclose(flipped[..., index], 127.5 * bright, atol=0.51)


def build_constant(value, size):
    """A predictor that returns a value, whatever it sees."""
    images = tf.keras.layers.Input((*size, 3), dtype=tf.uint8)
    nothing = tf.cast(tf.image.resize(images[..., :1], (350, 525)), tf.float32) * 0
    return tf.keras.Model(images, tf.cast(tf.tile(nothing, [1, 1, 1, 4]) + value, tf.uint8))


def test_maps_of_several_networks_are_averaged_picture_by_picture(kernel, pictures):
    """Of networks that return 10, 20 and 31 of 255, seen through different sizes."""
    values = (10, (32, 64)), (20, (64, 96)), (31, (64, 96))
    constants = [make_unet(kernel, size, 2, build_constant(v, size)) for v, size in values]
    found = list(kernel.predict_maps(constants, pictures, chunk=5))
    assert len(found) == 12
    for several in found:
        assert several.dtype == np.uint8
        values = [set(maps.ravel()) for maps in several]
        assert values == [{10}, {20}, {31}, {20}]  # 61 / 3, rounded


# Counts


def draw_maps(seed, count=6, size=(9, 11)):
    """Random maps, uint8 (count, *size, 4), and masks that follow them; some masks are empty."""
    random = np.random.default_rng(seed)
    masks = random.integers(2, size=(count, *size, 4)) * random.integers(2, size=(count, 1, 1, 4))
    maps = np.clip(random.normal(90 + 60 * masks, 60), 0, 255).astype(np.uint8)
    return maps, masks


def count_all(kernel, maps, masks):
    """The areas and overlaps (pictures, classes, 256) of a stack."""
    areas = np.stack([kernel.count_pixels(part) for part in maps])
    return areas, np.stack([kernel.count_pixels(*pair) for pair in zip(maps, masks)])


def test_counts_are_the_areas_and_overlaps_of_every_threshold(kernel):
    (maps,), (masks,) = draw_maps(0, count=1)
    areas, overlaps = kernel.count_pixels(maps), kernel.count_pixels(maps, masks)
    for index, threshold in itertools.product(range(4), range(256)):
        mask = maps[..., index] >= threshold
        assert areas[index, threshold] == mask.sum()
        assert overlaps[index, threshold] == (mask & (masks[..., index] > 0)).sum()


def build_colors(divisor):
    """A predictor whose maps are a picture's colors, and red again, less a divisor of them."""
    images = tf.keras.layers.Input((350, 525, 3), dtype=tf.uint8)
    maps = tf.concat([images, images[..., :1]], axis=-1)
    return tf.keras.Model(images, maps - maps // divisor)


def test_validation_counts_each_network_and_their_mean(kernel, pictures):
    size, part = kernel.SUBMISSION_SIZE, pictures[:4]
    predictors = [make_unet(kernel, size, 3, build_colors(divisor)) for divisor in (2, 3)]
    counts = kernel.count_validation(predictors, part)
    assert counts.shape == (3, 2, 4, 4, 256)
    for image, (path, rles) in enumerate(zip(part["path"], part[kernel.CLASSES].to_numpy())):
        maps = kernel.read_image(path, size)[..., [0, 1, 2, 0]]
        first, second = maps - maps // 2, maps - maps // 3
        mean = np.rint((first.astype(float) + second) / 2).astype(np.uint8)
        masks = kernel.split_planes(kernel.read_plane(rles, size)).numpy()
        for index, expected in enumerate([first, second, mean]):
            area, overlap = kernel.count_pixels(expected), kernel.count_pixels(expected, masks)
            np.testing.assert_array_equal(counts[index, 0, image], area)
            np.testing.assert_array_equal(counts[index, 1, image], overlap)


def score_slowly(maps, masks, decisions):
    """The Dice of each picture and class under decisions, mask by mask."""
    scores = np.empty((len(maps), 4))
    for image, index in np.ndindex(*scores.shape):
        truth, mask = masks[image, ..., index], maps[image, ..., index] >= decisions[image, index]
        total = truth.sum() + mask.sum()
        scores[image, index] = 2 * (truth * mask).sum() / total if total else 1
    return scores


@given(seed=st.integers(0, 1000), count=st.integers(1, 8))
def test_decisions_score_as_by_brute_force(kernel, seed, count):
    maps, masks = draw_maps(seed, count)
    random = np.random.default_rng(seed)
    decisions = random.integers(256, size=(count, 4))
    decisions[random.random((count, 4)) < 0.2] = kernel.EMPTY
    decisions[0] = [0, 255, kernel.EMPTY, 1]
    found = kernel.score_decisions(*count_all(kernel, maps, masks), decisions)
    np.testing.assert_allclose(found, score_slowly(maps, masks, decisions))


# The ways to decide


@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_tuned_threshold_and_area_are_the_optimum_of_all(kernel, seed, count):
    maps, masks = draw_maps(seed, count)
    areas, overlaps = count_all(kernel, maps, masks)
    decide = kernel.use_area(kernel.SAMPLE, areas, overlaps, None)
    found = score_slowly(maps, masks, decide(areas, None)).mean(axis=0)
    assert decide(np.full_like(areas, 10**6), None).min() >= 1
    minima = [round(share / 200 * 9 * 11) for share in range(60)]  # up to .295 of a map
    minima, best = np.unique(minima)[:, None, None], np.zeros(4)
    empty = kernel.score_decisions(areas, overlaps, np.full((count, 4), kernel.EMPTY))
    for threshold in range(1, 256):
        decided = kernel.score_decisions(areas, overlaps, np.full((count, 4), threshold))
        scores = np.where(areas[:, :, threshold] >= minima, decided, empty)
        best = np.maximum(best, scores.mean(axis=1).max(axis=0))
    np.testing.assert_allclose(found, best)


def test_among_equal_rules_the_one_nearest_to_one_half_wins(kernel):
    maps = np.full((1, 350, 525, 4), 0, np.uint8)
    maps[:, :100] = 250
    masks = (maps > 0).astype(int)
    masks[..., 3] = 0  # absent, so that every rule which predicts nothing scores 1
    decide = kernel.use_area(kernel.SAMPLE, *count_all(kernel, maps, masks), None)
    for area, expected in ((0, [128] * 3), (100 * 525, [128] * 3), (350 * 525, [128] * 4)):
        decisions = decide(np.full((1, 4, 256), area), None)[0].tolist()
        assert decisions == expected + [kernel.EMPTY] * (4 - len(expected))


@given(seed=st.integers(0, 1000), recall=st.floats(0.05, 1))
def test_gates_let_enough_pictures_through_and_no_more(kernel, seed, recall):
    """With a way below it that predicts every mask."""
    random = np.random.default_rng(seed)
    truth, probabilities = random.random((20, 4)) < 0.5, random.integers(12, size=(20, 4)) / 12
    truth[0] = True
    areas = np.full((20, 4, 256), 50)
    config = kernel.replace(kernel.SAMPLE, gate_recall=recall)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "use_area", kernel.use_half)
        decide = kernel.use_gate(config, areas, areas * truth[..., None], probabilities)
    let_through = decide(areas, probabilities) < kernel.EMPTY
    for present, probability, passed in zip(truth.T, probabilities.T, let_through.T):
        assert passed[present].mean() >= recall
        assert (probability[present] > probability[passed].min()).mean() < recall


def draw_calibrated(kernel, seed, count=300, size=(30, 40)):
    """Counts and probabilities of presence in which the calibration is known.

    A present class has a bright block whose pixels of value v are true with probability v / 255; an
    absent one has a darker block.
    """
    random = np.random.default_rng(seed)
    truth = random.random((count, 4)) < 0.5
    truth[:, 0] |= ~truth.any(axis=1)
    maps = random.integers(0, 60, size=(count, *size, 4), dtype=np.uint8)
    bright = random.integers(60, 256, size=(count, 15, 20, 4))
    maps[:, :15, :20] = np.where(truth[:, None, None], bright, bright // 2)
    masks = (random.random(maps.shape) < maps / 255) & truth[:, None, None]
    presence = np.clip(random.normal(0.35 + 0.3 * truth, 0.2), 0.01, 0.99)
    return *count_all(kernel, maps, masks.astype(int)), presence, truth


def test_a_gate_empties_what_threshold_and_area_would_predict(kernel):
    areas, overlaps, presence, _ = draw_calibrated(kernel, 3, count=40)
    plain = kernel.use_area(kernel.SAMPLE, areas, overlaps, presence)(areas, presence)
    gated = kernel.use_gate(kernel.SAMPLE, areas, overlaps, presence)(areas, presence)
    assert ((gated == plain) | (gated == kernel.EMPTY)).all() and (gated != plain).any()


def test_calibration_finds_the_probabilities_that_were_drawn(kernel):
    areas, overlaps, presence, truth = draw_calibrated(kernel, 0)
    judge, pixels = kernel.calibrate(areas[:, 0], overlaps[:, 0], presence[:, 0])
    # About 230 pixels of each value, so that a share deviates by .033 or less.
    np.testing.assert_allclose(pixels, np.arange(256) / 255, atol=0.06)
    assert (np.diff(pixels) >= 0).all()
    there = judge.predict_proba(kernel.describe_maps(areas[:, 0], presence[:, 0]))[:, 1]
    assert there.mean() == pytest.approx(truth[:, 0].mean(), abs=0.02)
    assert there[truth[:, 0]].min() > there[~truth[:, 0]].max()


class Judge:
    """A judge of presence that is sure."""

    def predict_proba(self, features):
        """Absent never, present always."""
        return np.tile([0.0, 1.0], (len(features), 1))


def test_the_expected_dice_is_the_mean_over_drawn_truths(kernel, monkeypatch):
    """The mask that is chosen has the highest mean Dice over truths drawn pixel by pixel.

    For independent pixels the Dice's numerator and denominator fluctuate by about the root of their
    size, so that the ratio of the means differs from the mean of the ratio by about 1 / area; 1e-3
    for these 5,000 pixels, besides the error of the mean over 300 draws.
    """
    random = np.random.default_rng(3)
    probabilities = (np.arange(256) / 300) ** 2
    monkeypatch.setattr(kernel, "calibrate", lambda *column: (Judge(), probabilities))
    values = random.integers(256, size=(1, 50, 100, 4), dtype=np.uint8)
    areas, presence = count_all(kernel, values, values)[0], np.ones((1, 4))
    decide = kernel.use_expectation(kernel.SAMPLE, areas, areas, presence)
    (decisions,) = decide(areas, presence)
    for index, decision in enumerate(decisions):
        pixels = values[0, ..., index].ravel()
        truths = random.random((300, 5000)) < probabilities[pixels]
        means, errors = [], []
        for threshold in range(1, 256):
            mask = pixels >= threshold
            total = truths.sum(axis=1) + mask.sum()
            scores = kernel.dice((truths & mask).sum(axis=1), total)
            means.append(scores.mean())
            errors.append(scores.std() / np.sqrt(300))
        assert means[decision - 1] >= max(means) - 1e-3 - 4 * max(errors)


def test_expectation_predicts_at_least_one_class(kernel):
    areas, overlaps, presence, _ = draw_calibrated(kernel, 1)
    decide = kernel.use_expectation(kernel.SAMPLE, areas, overlaps, presence)
    hopeless = np.zeros_like(areas)
    hopeless[..., 0] = areas[..., 0]  # maps of zeros
    decisions = decide(hopeless, np.full(presence.shape, 0.01))
    assert ((decisions < kernel.EMPTY).sum(axis=1) == 1).all()
    assert (decide(areas, presence) < kernel.EMPTY).any(axis=1).all()


def decide_all(kernel, areas, overlaps, presence):
    """The decisions of each way, by rules that learned on other pictures."""
    counts = areas, overlaps, presence
    ways = kernel.WAYS.items()
    return {name: kernel.cross_decide(way, kernel.SAMPLE, *counts) for name, way in ways}


@pytest.mark.parametrize("seed", range(3))
def test_expectation_beats_threshold_and_area_where_it_is_calibrated(kernel, seed):
    areas, overlaps, presence, _ = draw_calibrated(kernel, seed)
    decisions = decide_all(kernel, areas, overlaps, presence)
    scores = {way: kernel.score_decisions(areas, overlaps, x) for way, x in decisions.items()}
    assert scores["expected"].mean() >= scores["threshold and area"].mean()
    assert scores["threshold and area"].mean() >= scores["half"].mean()


@pytest.mark.parametrize(
    "kind", ["zeros", "constant", "absent class", "present class", "two pictures"]
)
def test_every_way_works_on_degenerate_maps(kernel, kind):
    maps, masks = draw_maps(5, count=2 if kind == "two pictures" else 6)
    if kind in ("zeros", "constant"):
        maps[:] = 0 if kind == "zeros" else 128
    elif kind != "two pictures":
        masks[..., 0] = kind == "present class"
    presence = np.random.default_rng(6).random((len(maps), 4))
    areas, overlaps = count_all(kernel, maps, masks)
    decisions = decide_all(kernel, areas, overlaps, presence)
    assert len(decisions) == 4
    for decided in decisions.values():
        assert decided.shape == presence.shape and decided.dtype.kind == "i"
        assert ((decided >= 1) & (decided <= 255) | (decided == kernel.EMPTY)).all()
        assert np.isfinite(kernel.score_decisions(areas, overlaps, decided)).all()


@pytest.mark.parametrize("way", ["gated", "expected"])
def test_rules_do_not_depend_on_the_order_of_the_pictures(kernel, way):
    areas, overlaps, presence, _ = draw_calibrated(kernel, 2, count=40)
    order = np.random.default_rng(0).permutation(40)
    first = kernel.WAYS[way](kernel.SAMPLE, areas, overlaps, presence)
    second = kernel.WAYS[way](kernel.SAMPLE, areas[order], overlaps[order], presence[order])
    np.testing.assert_array_equal(first(areas, presence), second(areas, presence))


def test_decisions_come_from_rules_that_learned_on_other_pictures(kernel):
    """A way that remembers what it saw: every picture is decided once, by what has not seen it."""
    presence = np.tile(np.arange(23.0)[:, None], (1, 4))
    areas = np.zeros((23, 4, 256), int)

    def remember(config, areas, overlaps, seen):
        return lambda areas, presence: np.where(np.isin(presence, seen), 1, 2)

    decisions = kernel.cross_decide(remember, kernel.SAMPLE, areas, areas, presence)
    assert (decisions == 2).all()
