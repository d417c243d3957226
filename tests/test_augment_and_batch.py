"""Augment and batch moves an image and its masks alike, and feeds each image in full batches.

In an epoch every image is there as it is and once augmented.
"""

import itertools
import threading
import time
from collections import Counter

import albumentations
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st

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


def augment(kernel, config, image, plane, draw):
    """An image and its plane as the notebook's transforms return them."""
    augmented = kernel.make_augmentation(config, draw)(image=image, mask=plane)
    return augmented["image"], augmented["mask"]


@given(box=BOX, draw=DRAW)
def test_a_marker_is_where_the_image_s_pixels_went(kernel, box, draw):
    """The colours of the augmented image say where each of its pixels comes from."""
    top, left, height, width = box
    config = kernel.replace(kernel.SAMPLE, augmentation_probability=0.7)
    image, plane = augment(kernel, config, *paint(box), draw)
    assert image.dtype == plane.dtype == np.uint8 and image.shape == (*SIZE, 3)
    assert plane.shape == SIZE and set(np.unique(plane)) <= {0, 4}
    rows, columns, seen = np.moveaxis(image.astype(int), -1, 0)
    seen = seen > 250  # not what turned in from outside
    inside, near = (  # of the box, two pixels from its edge, and within it and two pixels around
        (rows - top >= margin)
        & (rows - top < height - margin)
        & (columns - left >= margin)
        & (columns - left < width - margin)
        for margin in (2, -3)
    )
    assert (plane[seen & inside] == 4).all() and (plane[seen & ~near] == 0).all()


@pytest.mark.parametrize("which", range(4))
@given(box=BOX, draw=DRAW)
def test_each_transform_brings_a_marker_where_it_should_be(kernel, which, box, draw):
    compose = kernel.make_augmentation(kernel.SAMPLE, draw)
    for index, transform in enumerate(compose.transforms):
        transform.p = float(index == which)
    image, plane = paint(box)
    moved = compose(image=image, mask=plane)["mask"]
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
    assume(moved.any() and not border.any())  # no part has left the image
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


def test_each_augmentation_happens_by_itself_with_its_probability(kernel):
    """All 16 combinations of the four transforms are equally frequent at a probability of 1/2."""
    image = np.random.default_rng(0).integers(256, size=(16, 24, 3), dtype=np.uint8)
    happened = Counter()
    for draw in range(1600):
        compose = kernel.make_augmentation(kernel.SAMPLE, draw)
        compose(image=image)
        happened[frozenset(type(t).__name__ for t in compose.transforms if t.params)] += 1
    names = {"HorizontalFlip", "VerticalFlip", "Rotate", "GridDistortion"}
    assert frozenset().union(*happened) == names and len(happened) == 16
    assert all(60 <= count <= 140 for count in happened.values())  # 100 +- 4 deviations


def test_rotation_is_limited_and_probability_is_obeyed(kernel):
    image = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    assert kernel.make_augmentation(kernel.SAMPLE, 0).transforms[2].limit == (-20, 20)
    never = kernel.replace(kernel.SAMPLE, augmentation_probability=0.0)
    for draw in range(5):
        for found, given_ in zip(
            augment(kernel, never, image, image[..., 0], draw), (image, image[..., 0])
        ):
            np.testing.assert_array_equal(found, given_)


EXTRA = [
    albumentations.RandomBrightnessContrast(p=1.0),  # of pixels only
    albumentations.ShiftScaleRotate(p=1.0),
    albumentations.CoarseDropout(p=1.0),
]


@pytest.mark.parametrize("change", ["added", "added first", "removed", "reordered"])
def test_transforms_may_be_added_removed_and_reordered(
    kernel, tiny, labels, paths, monkeypatch, change
):
    compose = albumentations.Compose

    def make(transforms):
        transforms = {
            "added": [*transforms, *EXTRA],
            "added first": [*EXTRA, *transforms],
            "removed": transforms[:1],
            "reordered": transforms[::-1],
        }[change]
        return compose(transforms)

    monkeypatch.setattr(kernel.albumentations, "Compose", make)
    for draw in range(20):
        image, plane = kernel.load_example(tiny, (64, 96), paths[0], labels.iloc[0], draw)
        assert image.shape == (64, 96, 3) and plane.shape == (64, 96) and plane.max() < 16
        assert image.dtype == plane.dtype == np.uint8


@pytest.mark.parametrize(
    "size",
    [(1400, 2100), (1312, 2080), (2080, 2096), (320, 480), (350, 525), (33, 777), (777, 33)],
)
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


def test_planes_are_split_into_masks(kernel):
    planes = np.random.default_rng(0).integers(16, size=(3, 5, 7), dtype=np.uint8)
    found = kernel.split_planes(tf.constant(planes))
    assert found.dtype == tf.uint8
    np.testing.assert_array_equal(found, planes[..., None] >> np.arange(4) & 1)


def test_an_augmented_example_is_augmented(kernel, tiny, labels, paths):
    plain = kernel.load_example(tiny, (64, 96), paths[0], labels.iloc[0])
    for draw in (1, 2):
        config = kernel.replace(tiny, augmentation_probability=1.0)
        image, plane = kernel.load_example(config, (64, 96), paths[0], labels.iloc[0], draw)
        expected = augment(kernel, config, *plain, draw)
        np.testing.assert_array_equal(image, expected[0])
        np.testing.assert_array_equal(plane, expected[1])
        assert (image != plain[0]).any()


def test_an_epoch_holds_every_image_as_it_is_and_once_augmented(kernel):
    plans = [kernel.plan_epoch(50, epoch, seed) for epoch, seed in ((0, 1), (0, 1), (1, 1), (0, 2))]
    for plan in plans:
        as_is = plan[:, 1] == kernel.AS_IS
        assert sorted(plan[as_is, 0]) == sorted(plan[~as_is, 0]) == list(range(50))
    np.testing.assert_array_equal(plans[0], plans[1])
    for other in plans[2:]:  # another order, and other draws
        assert (plans[0][:, 0] != other[:, 0]).any()
        assert len(set(plans[0][:, 1]) & set(other[:, 1])) == 1


def collect(dataset, batches=None):
    """The first examples of a dataset, as arrays of images, planes and weights."""
    taken = [tuple(part.numpy() for part in batch) for batch in itertools.islice(dataset, batches)]
    return [np.concatenate(parts) for parts in zip(*taken)]


@pytest.mark.parametrize("done", [0, 17, 24, 31])
def test_training_batches_are_full_and_epochs_follow_the_plan(kernel, tiny, labels, paths, done):
    asked = []
    dataset = kernel.make_dataset(tiny, (64, 96), 5, paths, labels, lambda: asked.append(1) or done)
    assert not asked  # only when the epochs begin, after a state was restored
    images, planes, weights = collect(dataset, 8)
    assert asked == [1] and (weights == 1).all()
    assert images.shape == (40, 64, 96, 3) and planes.shape == (40, 64, 96)
    assert images.dtype == planes.dtype == np.uint8
    plan = np.concatenate([kernel.plan_epoch(12, epoch, tiny.seed) for epoch in range(3)])
    for (index, draw), image, plane in zip(plan[done:], images, planes):
        expected = kernel.load_example(tiny, (64, 96), paths[index], labels.iloc[index], draw)
        np.testing.assert_array_equal(image, expected[0])
        np.testing.assert_array_equal(plane, expected[1])


def test_the_last_image_fills_up_its_batch_and_weighs_nothing(kernel, tiny, labels, paths):
    dataset = kernel.make_dataset(tiny, (64, 96), 5, paths, labels)
    assert {part.shape[0] for part in dataset.element_spec} == {5}  # static, as a TPU needs
    images, planes, weights = collect(dataset)
    assert len(images) == len(planes) == 15
    np.testing.assert_allclose(weights, [15 / 12] * 12 + [0] * 3)
    for index in range(15):
        expected = kernel.load_example(
            tiny, (64, 96), *(p[min(index, 11)] for p in (paths, labels.to_numpy()))
        )
        np.testing.assert_array_equal(images[index], expected[0])
        np.testing.assert_array_equal(planes[index], expected[1])


@pytest.mark.parametrize("processors", [1, 2])
def test_no_more_images_are_read_at_once_than_there_are_processors(
    kernel, tiny, labels, paths, monkeypatch, processors
):
    """By joblib's count, which knows the limits of containers and the affinity."""
    lock, running, most = threading.Lock(), set(), []

    def load(config, size, path, rles, draw):
        with lock:
            running.add(threading.get_ident())
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.discard(threading.get_ident())
        return np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)

    monkeypatch.setattr(kernel.joblib, "cpu_count", lambda: processors)
    monkeypatch.setattr(kernel, "load_example", load)
    batches = kernel.make_dataset(tiny, (64, 96), 4, paths, labels)
    assert len(list(batches)) == 3 and max(most) <= processors
