"""Run-length encoding, against a worked example, brute force and every kind of fault."""

import numpy as np
import pytest
from hypothesis import event, given, settings
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


def test_worked_example(kernel):
    mask = np.array([[0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]])
    assert kernel.encode_rle(mask) == "5 4 12 1"
    decoded = kernel.decode_rle("5 4 12 1", (3, 4))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, mask)


def test_empty_and_full_mask(kernel):
    assert kernel.encode_rle(np.zeros((3, 4))) == ""
    assert not kernel.decode_rle("", (3, 4)).any()
    assert kernel.encode_rle(np.ones((3, 4))) == "1 12"
    assert kernel.decode_rle("1 12", (3, 4)).all()


@given(mask=MASKS)
@settings(max_examples=2000)
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
@settings(max_examples=4000)
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


def test_plane_holds_the_masks_at_the_pixels_centres(kernel, labels):
    rles = labels.iloc[0]
    plane = kernel.read_plane(rles, kernel.ORIGINAL_SIZE)
    masks = kernel.split_plane(plane)
    for index, rle in enumerate(rles):
        expected = kernel.decode_rle(rle, kernel.ORIGINAL_SIZE)
        np.testing.assert_array_equal(masks[..., index], expected)
    small = kernel.split_plane(kernel.read_plane(rles, kernel.SUBMISSION_SIZE))
    assert small.shape == (350, 525, 4) and small.max() == 1
    shares = masks.reshape(350, 4, 525, 4, 4).mean(axis=(1, 3))
    decided = abs(shares - 0.5) > 0.49  # blocks of 4 x 4 pixels that the mask covers or leaves out
    np.testing.assert_array_equal(small[decided], shares[decided] > 0.5)
