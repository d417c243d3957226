"""Split, augment, batch deals the pictures into folds that are alike, and refuses too few of them.

It moves a picture and its masks alike, and feeds each picture in full batches; in an epoch each is
there as it is and once augmented.
"""

import itertools
import threading
import time
from collections import Counter

import albumentations
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st

SIZE = (96, 160)
BOX = st.tuples(st.integers(10, 60), st.integers(10, 120), st.integers(5, 25), st.integers(5, 30))
DRAW = st.integers(0, 2**31 - 1)

# Split


@given(
    combinations=st.lists(st.integers(0, 15), min_size=1, max_size=80),
    folds=st.integers(2, 6),
    seed=st.integers(0, 3),
)
def test_every_combination_is_spread_evenly_over_the_folds(kernel, combinations, folds, seed):
    present = np.array([[c >> bit & 1 for bit in range(4)] for c in combinations])
    labels = pd.DataFrame(np.where(present, "1 1", ""), columns=kernel.CLASSES)
    assigned = kernel.assign_folds(labels, folds, seed)
    assert assigned.index.equals(labels.index) and assigned.between(0, folds - 1).all()
    for members in [assigned, *(group for _, group in assigned.groupby(combinations))]:
        sizes = np.bincount(members, minlength=folds)
        assert sizes.max() - sizes.min() <= 1


def test_folds_depend_on_the_seed_alone(kernel, labels):
    many = pd.concat([labels] * 20, ignore_index=True)
    first, again, other = (kernel.assign_folds(many, 5, seed) for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)


def test_a_first_try_takes_a_few_pictures_and_says_so(begin, warnings):
    found = begin(image_limit=3, folds=2, held_out=[0])
    assert len(found["pictures"]) == found["pictures"]["fold"].count() == 3
    assert len(found["test_pictures"]) == 3 and len(found["test_names"]) == 4
    text = "Only a part of the pictures is used: 3 for 2 folds, 3 to test."
    assert list(warnings.values()) == [text]


def test_too_few_pictures_for_the_folds_are_refused(begin):
    assert begin(folds=11, held_out=[0])["pictures"]["fold"].nunique() == 11
    with pytest.raises(ValueError, match="Too few pictures: 12 for 11 folds, 4 to test"):
        begin(folds=11, held_out=[0, 1])


def test_the_table_holds_each_picture_with_its_file_its_fold_and_its_labels(
    kernel, begin, source, labels
):
    found = begin()
    pictures, tested = found["pictures"], found["test_pictures"]
    assert pictures[kernel.CLASSES].equals(labels)
    assert list(pictures["path"]) == [source / "train_images" / name for name in labels.index]
    config = found["config"]
    assert pictures["fold"].equals(kernel.assign_folds(labels, config.folds, config.seed))
    assert list(tested) == ["path"] and set(tested["path"]) == {*source.glob("test_images/*")}
    assert [path.name for path in tested["path"]] == list(tested.index) == list(found["test_names"])


def test_before_any_training_there_is_a_submission_of_empty_masks(kernel, begin, source, tmp_path):
    begin(output_folder=tmp_path / "new")  # one that is there stays, as begin itself asserts
    expected = (source / "sample_submission.csv").read_text().replace(",1 1\n", ",\n")
    assert (tmp_path / "new" / "submission.csv").read_text() == expected


# Augment


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
def test_transforms_may_be_added_removed_and_reordered(kernel, tiny, pictures, monkeypatch, change):
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
        image, plane = kernel.load_example(tiny, pictures.iloc[0], (64, 96), draw)
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


def test_an_augmented_example_is_augmented(kernel, tiny, pictures):
    plain = kernel.load_example(tiny, pictures.iloc[0], (64, 96))
    for draw in (1, 2):
        config = kernel.replace(tiny, augmentation_probability=1.0)
        image, plane = kernel.load_example(config, pictures.iloc[0], (64, 96), draw)
        expected = augment(kernel, config, *plain, draw)
        np.testing.assert_array_equal(image, expected[0])
        np.testing.assert_array_equal(plane, expected[1])
        assert (image != plain[0]).any()


# Batch


def test_an_epoch_holds_every_picture_as_it_is_and_once_augmented(kernel):
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
def test_training_batches_are_full_and_epochs_follow_the_plan(kernel, tiny, pictures, done):
    asked = []
    dataset = kernel.training_batches(tiny, pictures, (64, 96), 5, lambda: asked.append(1) or done)
    assert not asked  # only when the epochs begin, after a state was restored
    assert {part.shape[0] for part in dataset.element_spec} == {5}  # static, as a TPU needs
    images, planes = collect(dataset, 8)
    assert asked == [1]
    assert images.shape == (40, 64, 96, 3) and planes.shape == (40, 64, 96)
    assert images.dtype == planes.dtype == np.uint8
    plan = np.concatenate([kernel.plan_epoch(12, epoch, tiny.seed) for epoch in range(3)])
    for (index, draw), image, plane in zip(plan[done:], images, planes):
        expected = kernel.load_example(tiny, pictures.iloc[index], (64, 96), draw)
        np.testing.assert_array_equal(image, expected[0])
        np.testing.assert_array_equal(plane, expected[1])


def test_the_last_picture_fills_up_its_batch_and_weighs_nothing(kernel, tiny, pictures):
    dataset = kernel.ordered_batches(pictures, (64, 96), 5, with_planes=True)
    assert {part.shape[0] for part in dataset.element_spec} == {5}  # static, as a TPU needs
    images, planes, weights = collect(dataset)
    assert len(images) == len(planes) == 15 and weights.dtype == np.float32
    np.testing.assert_allclose(weights, [15 / 12] * 12 + [0] * 3)
    for index in range(15):
        expected = kernel.load_example(tiny, pictures.iloc[min(index, 11)], (64, 96))
        np.testing.assert_array_equal(images[index], expected[0])
        np.testing.assert_array_equal(planes[index], expected[1])


def test_without_planes_the_images_come_alone_and_need_no_labels(kernel, pictures):
    batches = kernel.ordered_batches(pictures[["path"]], (64, 96), 5)
    assert batches.element_spec == (tf.TensorSpec((5, 64, 96, 3), tf.uint8),)
    (images,) = collect(batches)
    assert len(images) == 15
    for index, image in enumerate(images):
        path = pictures["path"].iloc[min(index, 11)]
        np.testing.assert_array_equal(image, kernel.read_image(path, (64, 96)))


@pytest.mark.parametrize("processors", [1, 2])
def test_no_more_examples_are_read_at_once_than_there_are_processors(
    kernel, monkeypatch, processors
):
    """By joblib's count, which knows the limits of containers and the affinity."""
    lock, running, most = threading.Lock(), set(), []

    def load(index, draw):
        with lock:
            running.add(threading.get_ident())
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.discard(threading.get_ident())
        return np.full((8, 12, 3), index, np.uint8), np.zeros((8, 12), np.uint8)

    monkeypatch.setattr(kernel.joblib, "cpu_count", lambda: processors)
    examples = [(index, kernel.AS_IS) for index in range(12)]
    batches = kernel.make_dataset(
        load, lambda: examples, 4, [((8, 12, 3), "uint8"), ((8, 12), "uint8")]
    )
    images, _ = collect(batches)
    assert images[:, 0, 0, 0].tolist() == list(range(12)) and len(most) == 12
    assert max(most) <= processors


@pytest.mark.parametrize(
    ("transform", "given"),
    [
        (albumentations.Transpose(p=1), [(160, 96, 3, "uint8"), (160, 96, "uint8")]),
        (albumentations.RandomCrop(64, 96, p=1), [(64, 96, 3, "uint8"), (64, 96, "uint8")]),
        (albumentations.Normalize(p=1), [(96, 160, 3, "float32"), (96, 160, "uint8")]),
    ],
)
def test_an_augmentation_that_changes_shape_or_type_is_refused_in_a_line(
    kernel, tiny, pictures, monkeypatch, transform, given
):
    both = albumentations.Compose([albumentations.HorizontalFlip(), transform])
    monkeypatch.setattr(kernel, "make_augmentation", lambda config, draw: both)
    needed = [(96, 160, 3, "uint8"), (96, 160, "uint8")]
    with pytest.raises(ValueError) as error:
        kernel.load_example(tiny, pictures.iloc[0], SIZE, 1)
    names = f"HorizontalFlip, {type(transform).__name__}"
    assert str(error.value) == f"One of {names} turns image and mask of {needed} into {given}."
