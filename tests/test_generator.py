"""Images, augmentation, epochs and batches."""

import itertools
from collections import Counter
from unittest import mock

import cv2
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("size", [(1400, 2100), (1312, 2080), (700, 1050), (350, 525), (128, 192)])
def test_image_is_the_resized_jpeg_in_rgb(kernel, paths, size):
    image = kernel.read_image(paths[0], size)
    reference = cv2.imread(str(paths[0]))[..., ::-1]
    reference = cv2.resize(reference, size[::-1], interpolation=cv2.INTER_AREA)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    tolerance = 0 if size == (1400, 2100) else 4  # of 255: another filter on the way down
    assert np.abs(image.astype(int) - reference).mean() <= tolerance


def test_undecodable_image_is_named(kernel, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"not a jpeg")
    with pytest.raises(ValueError, match=f"{path} is not an image"):
        kernel.read_image(path, (64, 96))
    gone = tmp_path / "gone.jpg"
    with pytest.raises(ValueError, match=f"{gone} cannot be read .*No such file"):
        kernel.read_image(gone, (64, 96))


SIZE = (96, 160)
BOX = st.tuples(st.integers(10, 60), st.integers(10, 120), st.integers(5, 25), st.integers(5, 30))
DRAW = st.integers(0, 2**31 - 1)


def paint(box):
    """An image whose colours are the row, the column and 255, and the plane of a box of class 2."""
    top, left, height, width = box
    image = np.dstack([*np.indices(SIZE), np.full(SIZE, 255)]).astype(np.uint8)
    plane = np.zeros(SIZE, np.uint8)
    plane[top : top + height, left : left + width] = 4
    return image, plane


@given(box=BOX, draw=DRAW)
@settings(max_examples=2000)
def test_a_marker_is_where_the_image_s_pixels_went(kernel, box, draw):
    """The colours of the augmented image say where each of its pixels comes from."""
    top, left, height, width = box
    config = kernel.replace(kernel.SAMPLE, image_size=SIZE, augmentation_probability=0.7)
    image, plane = kernel.augment(config, *paint(box), draw)
    assert image.dtype == plane.dtype == np.uint8 and image.shape == (*SIZE, 3)
    assert plane.shape == SIZE and set(np.unique(plane)) <= {0, 4}
    rows, columns, seen = np.moveaxis(image.astype(int), -1, 0)
    seen = seen > 250  # not what turned in from outside
    inside, near = (  # of the box, a pixel from its edge, and within it and two pixels around
        (rows - top >= margin)
        & (rows - top < height - margin)
        & (columns - left >= margin)
        & (columns - left < width - margin)
        for margin in (1, -2)
    )
    assert (plane[seen & inside] == 4).all() and (plane[seen & ~near] == 0).all()


@pytest.mark.parametrize("which", range(4))
@given(box=BOX, draw=DRAW)
@settings(max_examples=500)
def test_each_transform_brings_a_marker_where_it_should_be(kernel, which, box, draw):
    def make_only_one(config, draw):
        transforms = make_augmentation(config, draw)
        for index, transform in enumerate(transforms):
            transform.p = float(index == which)
        return transforms

    make_augmentation = kernel.make_augmentation
    config = kernel.replace(kernel.SAMPLE, image_size=SIZE)
    image, plane = paint(box)
    with mock.patch.object(kernel, "make_augmentation", make_only_one):
        _, moved = kernel.augment(config, image, plane, draw)
    top, left, height, width = box
    if which < 2:  # flips
        expected = np.zeros(SIZE, np.uint8)
        if which == 0:
            left = SIZE[1] - left - width
        else:
            top = SIZE[0] - top - height
        expected[top : top + height, left : left + width] = 4
        np.testing.assert_array_equal(moved, expected)
        return
    border = np.concatenate([moved[[0, -1]].ravel(), moved[:, [0, -1]].ravel()])
    if border.any() or not moved.any():
        return  # a part has left the image
    centre = np.array([top + (height - 1) / 2, left + (width - 1) / 2])
    found = np.argwhere(moved).mean(axis=0)
    middle = (np.array(SIZE) - 1) / 2
    if which == 2:  # a rotation keeps the distance to the middle, and the area
        radii = [np.hypot(*(place - middle)) for place in (centre, found)]
        assert abs(radii[0] - radii[1]) < 1
        angles = [np.arctan2(*(place - middle)) for place in (centre, found)]
        turn = np.rad2deg((angles[1] - angles[0] + np.pi) % (2 * np.pi) - np.pi)
        assert abs(turn) < 20 + np.rad2deg(1 / max(radii[0], 1))
        assert abs((moved > 0).sum() - height * width) < 0.1 * height * width + 2 * (height + width)
    else:  # a distortion of the grid keeps boxes upright boxes, at most a cell away
        rows, columns = (np.flatnonzero((moved > 0).any(axis=axis)) for axis in (1, 0))
        assert (moved[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 4).all()
        assert (abs(found - centre) < np.array(SIZE) / 5).all()


def apply_one_by_one(kernel, config, image, plane, draw):
    """What albumentations makes of an example, and the names of its transforms that happened."""
    happened = []
    for transform in kernel.make_augmentation(config, draw):
        moved = transform(image=image, mask=plane)
        if not np.array_equal(moved["image"], image):
            happened.append(type(transform).__name__)
        image, plane = moved["image"], moved["mask"]
    return image, plane, happened


def test_one_warp_is_what_the_library_does_in_two(kernel, labels, paths):
    config, combinations = kernel.replace(kernel.SAMPLE, image_size=(256, 384)), set()
    for draw in range(120):
        index = draw % len(paths)
        example = kernel.load_example(config, paths[index], labels.iloc[index])
        image, plane, happened = apply_one_by_one(kernel, config, *example, draw)
        found_image, found_plane = kernel.augment(config, *example, draw)
        combinations.add(tuple(happened))
        if {"Rotate", "GridDistortion"} <= set(happened):  # one interpolation instead of two
            assert np.abs(found_image - image.astype(float)).mean() < 4
            assert (found_plane != plane).mean() < 0.02
        elif "Rotate" in happened:
            assert np.abs(found_image - image.astype(float)).mean() < 0.2
            assert (found_plane != plane).mean() < 0.001
        else:
            np.testing.assert_array_equal(found_image, image)
            np.testing.assert_array_equal(found_plane, plane)
    assert len(combinations) == 16


@pytest.mark.parametrize("size", [(1400, 2100), (1312, 2080), (320, 480), (350, 525), (33, 777)])
def test_plane_takes_the_value_at_each_pixel_s_centre(kernel, labels, size):
    rows, columns = (
        [(2 * index + 1) * long // (2 * short) for index in range(short)]
        for long, short in zip(kernel.ORIGINAL_SIZE, size)
    )
    for rles in labels.to_numpy()[:4]:
        plane = kernel.read_plane(rles, size)
        assert plane.shape == size and plane.dtype == np.uint8
        for bit, rle in enumerate(rles):
            mask = kernel.decode_rle(rle, kernel.ORIGINAL_SIZE)[rows][:, columns]
            np.testing.assert_array_equal(plane >> bit & 1, mask)


def test_the_device_splits_planes_as_numpy_does(kernel):
    planes = np.random.default_rng(0).integers(16, size=(3, 5, 7), dtype=np.uint8)
    found = kernel.split_planes(tf.constant(planes))
    assert found.dtype == tf.uint8
    np.testing.assert_array_equal(found, np.stack([kernel.split_plane(p) for p in planes]))


def test_each_augmentation_happens_by_itself_with_its_probability(kernel):
    """All 16 combinations of the four transforms are equally frequent at a probability of 1/2."""
    image = np.random.default_rng(0).integers(256, size=(16, 24, 3), dtype=np.uint8)
    config = kernel.replace(kernel.SAMPLE, image_size=(16, 24))
    combinations = Counter(
        frozenset(apply_one_by_one(kernel, config, image, image[..., 0], draw)[2])
        for draw in range(3200)
    )
    names = {"HorizontalFlip", "VerticalFlip", "Rotate", "GridDistortion"}
    assert frozenset().union(*combinations) == names and len(combinations) == 16
    assert all(150 <= count <= 250 for count in combinations.values())  # 200 +- 3.7 deviations


def test_rotation_is_limited_and_probability_is_obeyed(kernel):
    image = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    config = kernel.replace(kernel.SAMPLE, image_size=(64, 96))
    assert kernel.make_augmentation(config, 0)[2].limit == (-20, 20)
    never = kernel.replace(config, augmentation_probability=0.0)
    for draw in (kernel.AS_IS, *range(5)):
        unchanged, plane = kernel.augment(never, image, image[..., 0], draw)
        np.testing.assert_array_equal(unchanged, image)
        np.testing.assert_array_equal(plane, image[..., 0])


def test_an_epoch_holds_every_image_as_it_is_and_once_augmented(kernel):
    plans = [kernel.plan_epoch(50, epoch, seed) for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2))]
    for plan in plans:
        as_is = plan[:, 1] == kernel.AS_IS
        assert sorted(plan[as_is, 0]) == sorted(plan[~as_is, 0]) == list(range(50))
    np.testing.assert_array_equal(plans[0], plans[1])
    for other in plans[2:]:  # another order, and other draws
        assert (plans[0][:, 0] != other[:, 0]).any()
        assert len(set(plans[0][:, 1]) & set(other[:, 1])) == 1


def collect(dataset, batches):
    """The first examples of a dataset, as arrays of images and of planes."""
    taken = [tuple(part.numpy() for part in batch) for batch in itertools.islice(dataset, batches)]
    return [np.concatenate(parts) for parts in zip(*taken)]


@pytest.mark.parametrize("first", [0, 17, 24, 31])
@pytest.mark.parametrize("cache", [None, {}])
def test_training_batches_are_full_and_epochs_follow_the_plan(
    kernel, tiny, labels, paths, first, cache
):
    config = kernel.replace(tiny, batch_size=5)
    images, planes = collect(kernel.make_dataset(config, paths, labels, first, cache), 8)
    assert images.shape == (40, 64, 96, 3) and planes.shape == (40, 64, 96)
    assert images.dtype == planes.dtype == np.uint8
    plan = np.concatenate([kernel.plan_epoch(12, epoch, config.seed) for epoch in range(3)])
    for (index, draw), image, plane in zip(plan[first:], images, planes):
        example = kernel.load_example(config, paths[index], labels.iloc[index])
        expected = kernel.augment(config, *example, draw)
        np.testing.assert_array_equal(image, expected[0])
        np.testing.assert_array_equal(plane, expected[1])


def test_images_are_decoded_once_if_there_is_memory_for_all(
    kernel, tiny, labels, paths, monkeypatch
):
    decoded, read_image = [], kernel.read_image
    monkeypatch.setattr(
        kernel, "read_image", lambda path, size: decoded.append(path) or read_image(path, size)
    )
    pixels = 4 * 64 * 96 * len(paths)
    for free, times in ((1.01 * pixels, 1), (0.99 * pixels, 3)):
        monkeypatch.setattr(kernel, "free_memory", lambda free=free: free / kernel.CACHE_SHARE)
        decoded.clear()
        cache = kernel.make_cache(tiny, len(paths))
        dataset = kernel.make_dataset(tiny, paths, labels, cache=cache)
        for _ in range(3):
            collect(dataset, None)
        assert len(decoded) == times * len(paths)


def test_threads_do_not_change_the_examples(kernel, tiny, labels, paths):
    first, second = (
        collect(
            kernel.make_dataset(kernel.replace(tiny, threads=threads), paths, labels, first=0), 8
        )
        for threads in (1, 4)
    )
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_the_last_image_fills_up_its_batch(kernel, tiny, labels, paths):
    config = kernel.replace(tiny, batch_size=5)
    for dataset in (
        kernel.make_dataset(config, paths),
        kernel.make_dataset(config, paths, labels),
    ):
        assert {part.shape[0] for part in dataset.element_spec} == {5}  # static, as a TPU needs
        images = collect(dataset, None)[0]
        assert len(images) == 15
        for index in range(15):
            expected = kernel.read_image(paths[min(index, 11)], config.image_size)
            np.testing.assert_array_equal(images[index], expected)
