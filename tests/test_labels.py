"""The table of labels and the folds."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st


def test_one_row_per_image_and_one_column_per_class(kernel, labels, sample):
    table = pd.read_csv(sample / "train.csv", keep_default_na=False)
    assert labels.shape == (12, 4) and list(labels.columns) == list(kernel.CLASSES)
    for label, rle in table.itertuples(index=False):
        image, name = label.split("_")
        assert labels.loc[image, name] == rle


HEADER = "Image_Label,EncodedPixels"
ROWS = [f"a.jpg_{name}," for name in ("Fish", "Flower", "Gravel", "Sugar")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["image,rle", *ROWS], "the columns are image, rle, not Image_Label, EncodedPixels"),
        ([HEADER, *ROWS[:3]], "there is no row a.jpg_Sugar"),
        ([HEADER, *ROWS, ROWS[2]], "line 6, a.jpg_Gravel: the label is there twice"),
        (
            [HEADER, *ROWS, "a.jpg_Salt,"],
            "line 6, a.jpg_Salt: the class is 'Salt', not one of Fish",
        ),
        ([HEADER, *ROWS, "a.jpg,"], "line 6, a.jpg: the class is 'a.jpg'"),
        ([HEADER, "a.jpg_Fish,5 0", *ROWS[1:]], "line 2, a.jpg_Fish: the run '5 0'"),
        ([HEADER, ROWS[0], "a.jpg_Flower,2940000 2"], "line 3, a.jpg_Flower: the run '2940000 2'"),
    ],
)
def test_faults_name_the_file_and_the_row(kernel, tmp_path, rows, message):
    path = tmp_path / "train.csv"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        kernel.read_labels(path)


def test_missing_and_empty_images_are_found_before_training(kernel, sample, labels, tmp_path):
    kernel.check_images(sample / "train_images", labels.index)
    (tmp_path / "there.jpg").write_text("x")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(FileNotFoundError, match="2 of 3 images are missing or empty: empty.jpg"):
        kernel.check_images(tmp_path, ["there.jpg", "empty.jpg", "missing.jpg"])


@given(
    combinations=st.lists(st.integers(0, 15), min_size=1, max_size=80),
    folds=st.integers(2, 6),
    seed=st.integers(0, 3),
)
def test_every_combination_is_spread_evenly_over_the_folds(kernel, combinations, folds, seed):
    present = np.array([[c >> bit & 1 for bit in range(4)] for c in combinations])
    labels = pd.DataFrame(np.where(present, "1 1", ""), columns=kernel.CLASSES)
    assigned = kernel.assign_folds(labels, folds, seed)
    assert assigned.between(0, folds - 1).all()
    for members in [assigned, *(group for _, group in assigned.groupby(combinations))]:
        sizes = np.bincount(members, minlength=folds)
        assert sizes.max() - sizes.min() <= 1


def test_folds_depend_on_the_seed_alone(kernel, labels):
    many = pd.concat([labels] * 20, ignore_index=True)
    first, again, other = (kernel.assign_folds(many, 5, seed) for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)
