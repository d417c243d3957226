"""Read the labels: run-length encodings and tables, against brute force and every kind of fault."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

MASKS = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda size: arrays(bool, size))


def decode_slowly(rle, size):
    """The definition, pixel by pixel."""
    height, width = size
    mask = np.zeros(size, np.uint8)
    numbers = [int(word) for word in rle.split()]
    for start, length in zip(numbers[::2], numbers[1::2]):
        for pixel in range(start, start + length):
            mask[(pixel - 1) % height, (pixel - 1) // height] = 1
    return mask


def test_a_worked_example_is_encoded_and_decoded(kernel):
    mask = np.array([[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]])
    assert kernel.encode_rle(mask) == "5 4 12 1"
    decoded = kernel.decode_rle("5 4 12 1", (3, 4))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, mask)


def test_the_empty_and_the_full_mask_have_encodings(kernel):
    assert kernel.encode_rle(np.zeros((3, 4))) == ""
    assert not kernel.decode_rle("", (3, 4)).any()
    assert kernel.encode_rle(np.ones((3, 4))) == "1 12"
    assert kernel.decode_rle("1 12", (3, 4)).all()


@given(mask=MASKS)
def test_any_mask_survives_the_round_trip(kernel, mask):
    rle = kernel.encode_rle(mask)
    np.testing.assert_array_equal(kernel.decode_rle(rle, mask.shape), mask)
    np.testing.assert_array_equal(decode_slowly(rle, mask.shape), mask)


@pytest.mark.parametrize(
    ("rle", "quoted"),
    [
        ("01 2", "'01' is not a whole number"),
        ("1 2\n", r"'2\\n' is not a whole number"),
        ("1 \u0662", "'\u0662' is not a whole number"),
        ("1 2 3 4", "the run '3 4'"),
        ("1 2 3", "the run '3' has no length"),
        ("1 x", "'x' is not a whole number"),
        ("1 2.0", "'2.0' is not a whole number"),
        ("-1 2", "'-1' is not a whole number"),
        ("1  2", "'' is not a whole number"),
        (" 1 2", "'' is not a whole number"),
        ("1\t2", r"'1\\t2' is not a whole number"),
        ("nan", "'nan' is not a whole number"),
        ("0 2", "the run '0 2'"),
        ("1 0", "the run '1 0'"),
        ("12 2", "the run '12 2'"),
        ("13 1", "the run '13 1'"),
        ("1 3 3 2", "the run '3 2'"),
        ("5 2 1 2", "the run '1 2'"),
        ("5 2 5 2", "the run '5 2'"),
        ("1 " + "9" * 18, "the run '1 9+'"),
        ("1 " + "9" * 30, "'9+' is not a whole number"),
    ],
)
def test_invalid_encodings_are_refused_with_the_run(kernel, rle, quoted):
    with pytest.raises(ValueError, match=quoted):
        kernel.decode_rle(rle, (3, 4))


NUMBERS = st.integers(-1, 14).map(str) | st.sampled_from(["", "x", "1.0", "01", "+1", "1e1"])
STRINGS = (
    st.text(max_size=20)
    | st.text("0123456789 .-+\t\n", max_size=30)
    | st.lists(NUMBERS, max_size=8).map(" ".join)
    | st.lists(st.integers(1, 3), max_size=9).map(
        lambda steps: " ".join(
            str(sum(steps[: index + 1]) if index % 2 == 0 else steps[index])
            for index in range(len(steps))
        )
    )
)


@given(rle=STRINGS)
def test_any_string_is_a_mask_s_encoding_or_a_value_error(kernel, rle):
    try:
        mask = kernel.decode_rle(rle, (3, 5))
    except ValueError as error:
        event("refused")
        assert str(error)
    else:
        event("accepted")
        assert kernel.encode_rle(mask) == rle
        np.testing.assert_array_equal(decode_slowly(rle, (3, 5)), mask)


HEADER = "Image_Label,EncodedPixels"
LINES = [f"a.jpg_{name}," for name in ("Fish", "Flower", "Gravel", "Sugar")]
LINES += ["b.jpg_Fish,1 2 5 9", "b.jpg_Flower,", "b.jpg_Gravel,7 1", "b.jpg_Sugar,"]
PIECES = st.sampled_from([b"\n", b"\r\n", b",", b'"', b" ", b"_", b"../", b"\0", b"\xff", b"1 2"])
EDITS = st.lists(
    st.tuples(st.integers(0, 160), st.integers(0, 30), PIECES | st.binary(max_size=5)), max_size=2
)


def test_a_row_for_each_image_and_a_column_for_each_class(kernel, labels, sample):
    table = pd.read_csv(sample / "train.csv", keep_default_na=False)
    assert labels.shape == (12, 4) and list(labels.columns) == list(kernel.CLASSES)
    for label, rle in table.itertuples(index=False):
        image, name = label.split("_")
        assert labels.loc[image, name] == rle


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The path of a damaged table."""
    return tmp_path_factory.mktemp("damaged") / "train.csv"


@given(order=st.permutations(LINES), end=st.sampled_from(["\n", "\r\n", "\n\n"]), edits=EDITS)
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


def test_a_mask_of_specks_is_not_too_long_to_be_read(kernel, tmp_path):
    """Its encoding is longer than Python's csv module reads by itself."""
    rle = " ".join(f"{start} 1" for start in range(1, 350 * 525, 2))
    rows = [f"a.jpg_{name},{rle}" for name in kernel.CLASSES]
    (tmp_path / "a.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    table = kernel.read_labels(tmp_path / "a.csv", kernel.SUBMISSION_SIZE)
    assert len(rle) > 500_000 and (table == rle).all(axis=None)


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
