"""Images, augmentation, epochs and batches."""

import itertools
from collections import Counter

import cv2
import numpy as np
import pytest
from hypothesis import given
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


@given(draw=st.integers(0, 2**31 - 1))
def test_image_and_masks_move_together(kernel, draw):
    """Two markers painted into the image are found at their places in the plane."""
    image = np.zeros((96, 160, 3), np.uint8)
    plane = np.zeros((96, 160), np.uint8)
    for bit, (rows, columns) in enumerate(
        [(slice(20, 50), slice(30, 70)), (slice(55, 80), slice(90, 130))]
    ):
        image[rows, columns, bit] = 255
        plane[rows, columns] |= 1 << bit
    moved = kernel.make_augmentation(kernel.SAMPLE, draw)(image=image, mask=plane)
    assert set(np.unique(moved["mask"])) <= {0, 1, 2}
    for bit in range(2):
        marker, mask = moved["image"][..., bit] > 127, moved["mask"] >> bit & 1
        assert kernel.dice(mask, marker) > 0.93  # the image is interpolated, the plane is not


def test_each_augmentation_happens_by_itself_with_its_probability(kernel, monkeypatch):
    """All 16 combinations of the four transforms are equally frequent at a probability of 1/2."""
    image, happening, combinations = np.zeros((16, 24, 3), np.uint8), set(), Counter()

    def recorded(name, apply):
        def record(*arguments, **parameters):
            happening.add(name)
            return apply(*arguments, **parameters)

        return record

    for transform in kernel.make_augmentation(kernel.SAMPLE, 0).transforms:
        kind = type(transform)
        monkeypatch.setattr(kind, "apply", recorded(kind.__name__, kind.apply))
    for draw in range(3200):
        happening.clear()
        kernel.make_augmentation(kernel.SAMPLE, draw)(image=image, mask=image[..., 0])
        combinations[frozenset(happening)] += 1
    names = {"HorizontalFlip", "VerticalFlip", "Rotate", "GridDistortion"}
    assert frozenset().union(*combinations) == names and len(combinations) == 16
    assert all(150 <= count <= 250 for count in combinations.values())  # 200 +- 3.7 deviations


def test_rotation_is_limited_and_probability_is_obeyed(kernel):
    image = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    augmentation = kernel.make_augmentation(kernel.SAMPLE, 0)
    assert augmentation.transforms[2].limit == (-20, 20)
    never = kernel.replace(kernel.SAMPLE, augmentation_probability=0.0)
    for draw in range(5):
        unchanged = kernel.make_augmentation(never, draw)(image=image, mask=image[..., 0])
        np.testing.assert_array_equal(unchanged["image"], image)


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
    """The first examples of a dataset, as arrays of images and of masks."""
    taken = [tuple(part.numpy() for part in batch) for batch in itertools.islice(dataset, batches)]
    return [np.concatenate(parts) for parts in zip(*taken)]


def test_training_batches_are_full_and_epochs_follow_the_plan(kernel, tiny, labels, paths):
    config = kernel.replace(tiny, batch_size=5)
    images, masks = collect(kernel.make_dataset(config, paths, labels, training=True), 10)
    assert images.shape == (50, 64, 96, 3) and masks.shape == (50, 64, 96, 4)
    assert images.dtype == masks.dtype == np.uint8
    plan = np.concatenate([kernel.plan_epoch(12, epoch, config.seed) for epoch in (0, 1, 2)])
    for (index, draw), image, mask in zip(plan, images, masks):
        expected = kernel.load_example(config, paths[index], labels.iloc[index], draw)
        np.testing.assert_array_equal(image, expected[0])
        np.testing.assert_array_equal(mask, expected[1])


def test_threads_do_not_change_the_examples(kernel, tiny, labels, paths):
    first, second = (
        collect(
            kernel.make_dataset(
                kernel.replace(tiny, threads=threads), paths, labels, training=True
            ),
            8,
        )
        for threads in (1, 4)
    )
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_last_partial_batch_is_kept_for_prediction(kernel, tiny, labels, paths):
    config = kernel.replace(tiny, batch_size=5)
    sizes = [len(images) for (images,) in kernel.make_dataset(config, paths)]
    assert sizes == [5, 5, 2]
    pairs = list(kernel.make_dataset(config, paths, labels))
    assert [len(images) for images, _ in pairs] == sizes
    for index, (image, mask) in enumerate(zip(*collect(pairs, 3))):
        np.testing.assert_array_equal(image, kernel.read_image(paths[index], config.image_size))
        plane = kernel.read_plane(labels.iloc[index], config.image_size)
        np.testing.assert_array_equal(mask, kernel.split_plane(plane))
