"""From probability maps to masks: the counts, the rules and the black band, against brute force."""

import functools
import itertools

import cv2
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


def score_slowly(kernel, maps, masks, decisions):
    """The Dice of each image and class under decisions, mask by mask."""
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
    np.testing.assert_allclose(found, score_slowly(kernel, maps, masks, decisions))


def test_every_threshold_and_area_scores_as_by_brute_force(kernel, small_areas):
    maps, masks = draw_maps(1)
    areas, overlaps = count_all(kernel, maps, masks)
    for index in range(4):
        scores = kernel.score_rules(areas[:, index], overlaps[:, index])
        assert scores.shape == (4, 256)
        for row, threshold in itertools.product(range(4), range(0, 256, 5)):
            large = areas[:, :, threshold] >= small_areas[row]
            decisions = np.where(large, threshold, kernel.EMPTY)
            expected = score_slowly(kernel, maps, masks, decisions)[:, index].mean()
            assert scores[row, threshold] == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 1000), count=st.integers(1, 8))
def test_tuned_threshold_and_area_are_the_optimum_and_score_what_they_say(kernel, seed, count):
    maps, masks = draw_maps(seed, count)
    areas, overlaps = count_all(kernel, maps, masks)
    decide = kernel.use_area(kernel.SAMPLE, areas, overlaps, None)
    found = score_slowly(kernel, maps, masks, decide(areas, None))
    assert kernel.tune_rules(areas, overlaps)[:, 0].min() >= 1
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


def test_quadruple_is_the_optimum_of_brute_force(kernel, monkeypatch):
    """Two hundred maps, each combination of the grid scored image by image."""
    monkeypatch.setattr(kernel, "MINIMUM_AREAS", np.arange(0, 60, 6))
    monkeypatch.setattr(kernel, "HIGH_THRESHOLDS", np.array([40, 120, 180]))
    maps, masks = draw_maps(7, count=200)
    areas, overlaps = (counts[:, 0] for counts in count_all(kernel, maps, masks))
    truth = overlaps[:, 0] > 0
    presence = np.clip(np.random.default_rng(0).normal(0.4 + 0.2 * truth, 0.2), 0, 1)
    high, least, low, gate, score = kernel.tune_quadruple(areas, overlaps, presence)
    gates = [0, *np.quantile(presence, np.arange(1, 20) / 20)]
    predicted = kernel.divide_dice(overlaps, areas + overlaps[:, :1])
    best = -1
    for high_, least_, gate_ in itertools.product([40, 120, 180], range(0, 60, 18), gates):
        passes = (areas[:, high_] >= least_) & (presence >= gate_)
        scores = np.where(passes[:, None], predicted[:, 1:], ~truth[:, None]).mean(axis=0)
        best = max(best, scores.max())
    assert score == pytest.approx(best, abs=1e-12)
    passes = (areas[:, high] >= least) & (presence >= gate)
    found = np.where(passes, predicted[:, low], ~truth).mean()
    assert found == pytest.approx(score, abs=1e-12)


def test_expected_dice_is_the_mean_over_drawn_truths(kernel):
    """Pixels are true independently with the probability of their value.

    For independent pixels the Dice's numerator and denominator fluctuate by about the root of their
    size, so that the ratio of the means differs from the mean of the ratio by about 1 / area; 1e-3
    for these 5,000 pixels, besides the error of the mean over 300 draws.
    """
    random = np.random.default_rng(3)
    values = random.integers(256, size=5000)
    probabilities = (np.arange(256) / 300) ** 2
    areas = kernel.count_reaching(values.astype(np.uint8))[None]
    expected = kernel.expect_dice(areas, probabilities)[0]
    truths = random.random((300, 5000)) < probabilities[values]
    for threshold in (1, 60, 128, 200, 250):
        mask = values >= threshold
        scores = kernel.dice(truths[:, None], np.broadcast_to(mask, (300, 1, 5000)))
        error = scores.std() / np.sqrt(300)
        assert abs(scores.mean() - expected[threshold]) <= 1e-3 + 4 * error


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
    return *count_all(kernel, maps, masks), presence, truth


def test_calibration_finds_the_probabilities_that_were_drawn(kernel):
    areas, overlaps, presence, truth = draw_calibrated(kernel, 0)
    judge, (pixels,) = kernel.calibrate(areas[:, 0], overlaps[:, 0], presence[:, 0])
    # About 230 pixels of each value, so that a share deviates by .033 or less.
    np.testing.assert_allclose(pixels, np.arange(256) / 255, atol=0.06)
    assert (np.diff(pixels) >= 0).all()
    there = judge.predict_proba(kernel.describe_maps(areas[:, 0], presence[:, 0]))[:, 1]
    assert there.mean() == pytest.approx(truth[:, 0].mean(), abs=0.02)
    assert there[truth[:, 0]].min() > there[~truth[:, 0]].max()


@pytest.mark.parametrize("seed", range(3))
def test_expectation_beats_threshold_and_area_where_it_is_calibrated(kernel, seed):
    areas, overlaps, presence, _ = draw_calibrated(kernel, seed)
    ways = ["threshold and area", "expected Dice"]
    decisions = kernel.cross_validate(kernel.SAMPLE, ways, areas, overlaps, presence)
    scores = {way: kernel.score_decisions(areas, overlaps, x) for way, x in decisions.items()}
    assert scores["expected Dice"].mean() >= scores["threshold and area"].mean()


def test_expectation_predicts_at_least_one_class(kernel):
    areas, overlaps, presence, _ = draw_calibrated(kernel, 1)
    decide = kernel.use_expectation(kernel.SAMPLE, areas, overlaps, presence)
    hopeless = np.zeros_like(areas)
    hopeless[..., 0] = areas[..., 0]  # maps of zeros
    decisions = decide(hopeless, np.full(presence.shape, 0.01))
    assert ((decisions < kernel.EMPTY).sum(axis=1) == 1).all()
    assert (decide(areas, presence) < kernel.EMPTY).any(axis=1).all()


@pytest.mark.parametrize(
    "kind", ["zeros", "constant", "absent class", "present class", "two images"]
)
def test_every_way_works_on_degenerate_maps(kernel, kind):
    maps, masks = draw_maps(5, count=2 if kind == "two images" else 6)
    if kind in ("zeros", "constant"):
        maps[:] = 0 if kind == "zeros" else 128
    elif kind != "two images":
        masks[..., 0] = kind == "present class"
    presence = np.random.default_rng(6).random((len(maps), 4))
    areas, overlaps = count_all(kernel, maps, masks)
    decisions = kernel.cross_validate(kernel.SAMPLE, kernel.WAYS, areas, overlaps, presence)
    for decided in decisions.values():
        assert decided.shape == presence.shape and decided.dtype.kind == "i"
        assert ((decided >= 1) & (decided <= 255) | (decided == kernel.EMPTY)).all()
        assert np.isfinite(kernel.score_decisions(areas, overlaps, decided)).all()


@pytest.mark.parametrize("way", ["threshold and area, gated", "expected Dice"])
def test_rules_do_not_depend_on_the_order_of_the_images(kernel, way):
    areas, overlaps, presence, _ = draw_calibrated(kernel, 2, count=40)
    order = np.random.default_rng(0).permutation(40)
    first = kernel.WAYS[way](kernel.SAMPLE, areas, overlaps, presence)
    second = kernel.WAYS[way](kernel.SAMPLE, areas[order], overlaps[order], presence[order])
    np.testing.assert_array_equal(first(areas, presence), second(areas, presence))


def test_decisions_come_from_rules_that_learned_on_other_images(kernel, monkeypatch):
    """A way that remembers what it saw: every image is decided once, by what has not seen it."""
    presence = np.tile(np.arange(23.0)[:, None], (1, 4))
    areas = np.zeros((23, 4, 256), int)

    def remember(config, areas, overlaps, seen):
        return lambda areas, presence: np.where(np.isin(presence, seen), 1, 2)

    monkeypatch.setitem(kernel.WAYS, "remember", remember)
    decisions = kernel.cross_validate(kernel.SAMPLE, ["remember"], areas, areas, presence)
    assert (decisions["remember"] == 2).all()


@given(seed=st.integers(0, 1000), recall=st.floats(0.05, 1))
def test_gates_let_enough_images_through_and_no_more(kernel, seed, recall):
    random = np.random.default_rng(seed)
    truth, probabilities = random.random((20, 4)) < 0.5, random.integers(12, size=(20, 4)) / 12
    truth[0] = True
    gates = kernel.choose_gates(truth, probabilities, recall)
    for present, probability, gate in zip(truth.T, probabilities.T, gates):
        assert (probability[present] >= gate).mean() >= recall
        assert (probability[present] > gate).mean() < recall


def test_a_gate_empties_what_threshold_and_area_would_predict(kernel):
    areas, overlaps, presence, _ = draw_calibrated(kernel, 3, count=40)
    plain = kernel.use_area(kernel.SAMPLE, areas, overlaps, presence)(areas, presence)
    gated = kernel.use_gate(kernel.SAMPLE, areas, overlaps, presence)(areas, presence)
    gates = kernel.choose_gates(overlaps[..., 0] > 0, presence, kernel.SAMPLE.gate_recall)
    np.testing.assert_array_equal(gated, np.where(presence >= gates, plain, kernel.EMPTY))
    assert (gated != plain).any()


def test_way_is_the_configured_one_or_surely_the_best(kernel):
    random = np.random.default_rng(0)
    scores = {way: random.random((50, 4)) * 0.1 for way in kernel.WAYS}
    scores["threshold and area"] += 0.5
    assert kernel.choose_way(kernel.BEST, scores) == "threshold and area"
    few = {way: score[:10] for way, score in scores.items()}
    assert kernel.choose_way(kernel.BEST, few) == "expected Dice"
    scores["expected Dice"] = scores["threshold and area"] + random.normal(0, 0.3, (50, 4))
    assert kernel.choose_way(kernel.BEST, scores) == "expected Dice"
    assert kernel.choose_way(kernel.PAPER, scores) == "threshold and area"


def test_gains_come_with_an_interval(kernel):
    random = np.random.default_rng(1)
    base = random.random((400, 4))
    noise = random.normal(0.1, 0.2, (400, 1))
    table = kernel.compare_ways({"a": base, "b": base + noise}, seed=0)
    assert np.isnan(table.loc["a", "gain"])
    assert table.loc["b", "gain"] == pytest.approx(noise.mean())
    error = 1.96 * noise.std() / 20
    assert table.loc["b", "from"] == pytest.approx(noise.mean() - error, abs=0.003)
    assert table.loc["b", "to"] == pytest.approx(noise.mean() + error, abs=0.003)
    assert table.loc["b", "mean"] == pytest.approx(base.mean() + noise.mean())


def test_a_single_validation_image_teaches_nothing(kernel):
    maps, masks = draw_maps(0, count=1)
    counts = count_all(kernel, maps, masks)
    with pytest.raises(ValueError, match="a single validation image"):
        kernel.cross_validate(kernel.SAMPLE, kernel.WAYS, *counts, np.ones((1, 4)))


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
    predict = kernel.distribute(
        tf.distribute.get_strategy(), functools.partial(kernel.find_maps, model, False)
    )
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


def draw_parts():
    """A map with an L of 200 around a spot of 150, a diagonal, a speck, and a band of zeros."""
    values = np.full((70, 105), 10, np.uint8)
    values[10:50, 10:20] = values[40:50, 10:45] = 200
    values[12:15, 40:43] = 150  # in the L's box and hull or not, but no part of it
    cv2.line(values, (60, 10), (95, 60), 100, 6)
    values[65, 5] = 255
    values[:, 50:54] = 0
    return values


def test_shapes_are_boxes_and_hulls_of_the_parts(kernel):
    values = draw_parts()
    plane = kernel.draw_shapes(values)
    names = [(cut, kind) for cut in kernel.CUTS for kind in ("box", "hull")]
    shapes = {name: plane >> bit & 1 > 0 for bit, name in enumerate(names)}
    box = np.zeros(values.shape, bool)
    box[10:50, 10:45] = True
    np.testing.assert_array_equal(shapes[128, "box"], box)
    assert not shapes[128, "box"][65, 5]  # a speck has no shape
    corners = np.array([[10, 10], [19, 10], [44, 40], [44, 49], [10, 49]])  # of the L, by hand
    hull = cv2.fillConvexPoly(np.zeros(values.shape, np.uint8), corners, 1)
    np.testing.assert_array_equal(shapes[128, "hull"], hull > 0)
    diagonal = values == 100
    rows, columns = np.nonzero(diagonal)
    box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    np.testing.assert_array_equal(shapes[64, "box"], box)
    assert (shapes[64, "hull"] & ~shapes[64, "box"]).sum() == 0
    assert (diagonal & ~shapes[64, "hull"]).sum() == 0
    assert not shapes[192, "box"][rows, columns].any()
    everywhere = kernel.draw_shapes(np.where(values > 0, 255, 0).astype(np.uint8))
    np.testing.assert_array_equal(everywhere & 1 > 0, values > 0)  # the band stays out


def test_shapes_are_counted_decided_and_drawn_alike(kernel):
    """Every decision's mask has the area and the overlap that were counted for it."""
    maps = np.repeat(draw_parts()[..., None], 4, axis=-1)
    masks = np.random.default_rng(0).integers(2, size=maps.shape)
    areas, overlaps = kernel.count_pixels(maps, masks, shapes=True)
    assert areas.shape == overlaps.shape == (4, kernel.EMPTY)
    decisions = np.random.default_rng(1).integers(kernel.EMPTY, size=(60, 4))
    for decision in decisions:
        predicted = kernel.make_masks(maps, np.ones(4), lambda *_, d=decision: d[None])
        chosen = areas[np.arange(4), decision], overlaps[np.arange(4), decision]
        np.testing.assert_array_equal(predicted.sum(axis=(0, 1)), chosen[0])
        np.testing.assert_array_equal((predicted & (masks > 0)).sum(axis=(0, 1)), chosen[1])
        scores = kernel.score_decisions(areas[None], overlaps[None], decision[None])[0]
        expected = kernel.dice(np.moveaxis(masks, -1, 0), np.moveaxis(predicted, -1, 0))
        np.testing.assert_allclose(scores, expected)


def test_shapes_are_chosen_where_the_truth_is_a_box_and_not_where_it_is_the_map(kernel):
    random = np.random.default_rng(0)
    counts = {"box": [], "map": []}
    for _ in range(30):
        maps = np.zeros((70, 105, 4), np.uint8)
        masks = {kind: np.zeros(maps.shape, np.uint8) for kind in counts}
        for index in range(4):
            top, left = random.integers(5, 25, 2)
            box = slice(top, top + 35), slice(left, left + 60)
            cv2.ellipse(
                (blob := np.zeros((70, 105), np.uint8)),
                (left + 30, top + 17),
                (30, 17),
                0,
                0,
                360,
                1,
                -1,
            )
            maps[..., index] = random.integers(1, 40, (70, 105)) + 170 * blob
            masks["box"][(*box, index)] = 1
            masks["map"][..., index] = blob
        for kind, mask in masks.items():
            counts[kind].append(kernel.count_pixels(maps, mask, shapes=True))
    for kind, gain in (("box", 0.1), ("map", 0.0)):
        areas, overlaps = np.stack(counts[kind], axis=1)
        decisions = kernel.cross_validate(
            kernel.SAMPLE,
            ["expected Dice", "expected Dice, with shapes"],
            areas,
            overlaps,
            np.full((30, 4), 0.9),
        )
        plain, shaped = (
            kernel.score_decisions(areas, overlaps, x).mean() for x in decisions.values()
        )
        assert shaped >= plain + gain - 1e-3, kind


def test_flips_are_turned_back_and_averaged(kernel):
    """A network whose probability is the brightness, times how far right and how far down it is."""
    images = np.zeros((2, 350, 525, 3), np.uint8)
    images[0, 20:80, 30:90] = images[1, 200:300, 400:500] = 255
    down, right = np.linspace(0, 1, 350)[:, None], np.linspace(0, 1, 525)[None]

    def unet(images, training):
        brightness = tf.cast(images[..., 0], tf.float32) / 255
        return tf.stack([brightness, brightness * right, brightness * down, brightness], axis=-1)

    bright = images[..., 0] / 255
    plain = kernel.find_maps(unet, False, tf.constant(images)).numpy()
    np.testing.assert_allclose(plain[..., 1], 255 * bright * right, atol=0.51)
    flipped = kernel.find_maps(unet, True, tf.constant(images)).numpy()
    np.testing.assert_allclose(flipped[..., 0], 255 * bright, atol=0.51)
    for index in (1, 2):  # each place is as often on one side as on the other
        np.testing.assert_allclose(flipped[..., index], 127.5 * bright, atol=0.51)


def test_masks_are_those_of_the_decided_thresholds(kernel):
    maps = np.random.default_rng(0).integers(256, size=(30, 40, 4), dtype=np.uint8)
    presence = np.arange(4) / 4

    def decide(areas, presence):
        assert presence.tolist() == [[0, 0.25, 0.5, 0.75]]
        assert areas.shape == (1, 4, kernel.EMPTY)
        np.testing.assert_array_equal(areas[0, :, :256], kernel.count_pixels(maps, maps)[0])
        return np.array([[10, 255, kernel.EMPTY, 0]])

    masks = kernel.make_masks(maps, presence, decide)
    assert masks.dtype == bool and masks[..., 3].all() and not masks[..., 2].any()
    np.testing.assert_array_equal(masks[..., 0], maps[..., 0] >= 10)
    np.testing.assert_array_equal(masks[..., 1], maps[..., 1] == 255)


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
    counts, mean_counts = kernel.count_validation([None, None], paths[:4], labels[:4])
    assert counts.shape == (2, 2, 4, 4, 256) and mean_counts.shape == (2, 4, 4, kernel.EMPTY)
    for image, rles in enumerate(labels[:4].to_numpy()):
        masks = kernel.split_plane(kernel.read_plane(rles, kernel.SUBMISSION_SIZE))
        for index, values in enumerate((maps[image], maps[image] // 2)):
            expected = kernel.count_pixels(values, masks)
            np.testing.assert_array_equal(counts[index, :, image], expected)
        mean = kernel.average_maps([maps[image], maps[image] // 2])
        expected = kernel.count_pixels(mean, masks, shapes=True)
        np.testing.assert_array_equal(mean_counts[:, image], expected)
