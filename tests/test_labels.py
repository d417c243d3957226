"""The table of labels and the folds."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st


def test_one_row_per_image_and_one_column_per_class(kernel, labels, sample):
    table = pd.read_csv(sample / "train.csv", keep_default_na=False)
    assert labels.shape == (12, 4) and list(labels.columns) == list(kernel.CLASSES)
    for label, rle in table.itertuples(index=False):
        image, name = label.split("_")
        assert labels.loc[image, name] == rle


HEADER = "Image_Label,EncodedPixels"
ROWS = [f"a.jpg_{name}," for name in ("Fish", "Flower", "Gravel", "Sugar")]


LINES = [*ROWS, "b.jpg_Fish,1 2 5 9", "b.jpg_Flower,", "b.jpg_Gravel,7 1", "b.jpg_Sugar,"]
PIECES = st.sampled_from([b"\n", b"\r\n", b",", b'"', b" ", b"_", b"../", b"\0", b"\xff", b"1 2"])
EDITS = st.lists(
    st.tuples(st.integers(0, 160), st.integers(0, 30), PIECES | st.binary(max_size=5)), max_size=2
)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The path of a damaged table."""
    return tmp_path_factory.mktemp("damaged") / "train.csv"


@given(order=st.permutations(LINES), end=st.sampled_from(["\n", "\r\n", "\n\n"]), edits=EDITS)
@settings(max_examples=4000)
def test_a_damaged_table_is_read_right_or_refused_by_name(kernel, damaged, order, end, edits):
    """Its rows are in any order, and pieces of it are replaced by others, or by nothing."""
    text = (end.join([HEADER, *order]) + end).encode()
    for place, length, piece in edits:
        text = text[:place] + piece + text[place + length * (length < 25) :]
    damaged.write_bytes(text)
    try:
        table = kernel.read_labels(damaged)
    except ValueError as error:
        event("refused")
        assert str(error).startswith(str(damaged))
        return
    event("read")
    assert list(table.columns) == list(kernel.CLASSES) and len(table) > 0
    for image, rles in table.iterrows():
        assert image not in ("", ".", "..") and not set(image) & set("/\\\0")
        for name, rle in rles.items():
            kernel.decode_rle(rle, kernel.ORIGINAL_SIZE)
            assert f"{image}_{name}".encode() in text.replace(b'"', b"") and rle.encode() in text


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
