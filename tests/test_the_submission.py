"""The submission gives a file that Kaggle would score as the notebook does."""

import contextlib
import csv
import math

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

ROWS = [
    f"{image}.jpg_{name}" for image in ("b", "a") for name in ("Fish", "Flower", "Gravel", "Sugar")
]


def write(path, rows):
    """A submission file from pairs of a label and an encoding."""
    path.write_text("Image_Label,EncodedPixels\n" + "".join(f"{row},{rle}\n" for row, rle in rows))
    return path


@pytest.fixture
def sample_path(tmp_path):
    """A sample_submission.csv whose images are not in alphabetical order."""
    return write(tmp_path / "sample_submission.csv", [(row, "1 1") for row in ROWS])


def test_submission_has_the_sample_s_order(kernel, tmp_path, sample_path):
    rles = {row: f"{number} 2" for number, row in enumerate(sorted(ROWS), start=1)}
    rles["a.jpg_Sugar"] = ""
    path = tmp_path / "submission.csv"
    kernel.write_submission(rles, sample_path, path)
    expected = write(tmp_path / "expected.csv", [(row, rles[row]) for row in ROWS])
    assert path.read_text() == expected.read_text()
    table = kernel.check_submission(path, sample_path)
    assert table["EncodedPixels"].tolist() == [rles[row] for row in ROWS]


def test_the_submission_follows_the_order_of_the_sample(kernel, source, begin, tmp_path):
    path = source / "sample_submission.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[::-1]]) + "\n")
    names = begin()["test_names"]
    rles = {f"{name}_Fish": "1 5" for name in names}
    kernel.write_submission(rles, path, tmp_path / "written.csv")
    written = kernel.check_submission(tmp_path / "written.csv", path)
    assert written["Image_Label"].tolist() == [row.split(",")[0] for row in rows[::-1]]
    assert (written["EncodedPixels"] == "1 5").tolist() == (written["class"] == "Fish").tolist()


def test_a_row_without_a_mask_gets_the_empty_one(kernel, tmp_path, sample_path):
    path = tmp_path / "submission.csv"
    kernel.write_submission({}, sample_path, path)
    assert (kernel.check_submission(path, sample_path)["EncodedPixels"] == "").all()


def test_line_ends_are_line_feeds_and_the_text_is_utf_8(kernel, tmp_path, sample_path):
    """Whatever line ends the sample has, and whatever letters its names."""
    content = sample_path.read_text().replace("b.jpg", "wölke.jpg").replace("\n", "\r\n")
    sample_path.write_bytes(content.encode())
    path, rows = tmp_path / "submission.csv", [row.replace("b.jpg", "wölke.jpg") for row in ROWS]
    kernel.write_submission({rows[0]: "1 350 701 5"}, sample_path, path)
    lines = ["Image_Label,EncodedPixels", f"{rows[0]},1 350 701 5", *(f"{r}," for r in rows[1:])]
    assert path.read_bytes() == "".join(f"{line}\n" for line in lines).encode("utf-8")
    assert kernel.check_submission(path, sample_path)["image"][2] == "wölke.jpg"


def list_pixels(rle):
    """The pixels of an encoding, as often as it names them. Raises ValueError as Kaggle would."""
    numbers = [int(word) for word in rle.split()]
    starts, lengths = numbers[::2], numbers[1::2]
    if len(starts) != len(lengths) or starts != sorted(starts) or min([*starts, *lengths, 1]) < 1:
        raise ValueError("pairs of a start and a length, positive and sorted")
    return [
        pixel for start, length in zip(starts, lengths) for pixel in range(start, start + length)
    ]


def score(submission, truth):
    """The mean Dice of a submission by the competition's definition, row by row.

    The truth is a list of pairs of a label and the set of its pixels, counted from 1 down the first
    column of 350, then down the second. Raises ValueError if Kaggle would refuse the submission.
    """
    with open(submission, newline="") as file:
        (*columns,), *rows = csv.reader(file)
    if columns != ["Image_Label", "EncodedPixels"]:
        raise ValueError("columns")
    if sorted(label for label, _ in rows) != sorted(label for label, _ in truth):
        raise ValueError("rows")
    scores = []
    for (_, rle), (_, pixels) in zip(rows, truth):
        predicted = list_pixels(rle)
        total = len(predicted) + len(pixels)
        scores.append(2 * len(pixels & set(predicted)) / total if total else 1)
    return float(np.mean(scores))


def draw_truth(seed=0):
    """Random boxes as masks of the ROWS, of which every fourth is empty: (rows, 350, 525)."""
    random = np.random.default_rng(seed)
    masks = np.zeros((len(ROWS), 350, 525), bool)
    for index in range(len(ROWS)):
        top, left = random.integers(0, 200, size=2)
        height, width = random.integers(40, 150, size=2)
        masks[index, top : top + height, left : left + width] = index % 4 != 3
    return masks


def number_pixels(mask):
    """The numbers of a mask's pixels (height, width), by the definition."""
    return {column * len(mask) + row + 1 for row, column in np.argwhere(mask).tolist()}


def replace_first(rle):
    """A fault: another encoding in the first row, made from the right one."""
    return lambda rows: [(rows[0][0], rle(rows[0][1])), *rows[1:]]


def split_run(rle, overlap):
    """An encoding whose first run is written as two, which overlap by a number of pixels."""
    start, length, *others = map(int, rle.split())
    half = length // 2
    runs = [start, half, start + half - overlap, length - half + overlap, *others]
    return " ".join(map(str, runs))


FAULTS = {
    "row missing": (lambda rows: rows[:-1], "line 9: None, where .* has a.jpg_Sugar"),
    "row too many": (
        lambda rows: [*rows, ("c.jpg_Fish", "")],
        "line 10: c.jpg_Fish, where .* has None",
    ),
    "other order": (lambda rows: rows[::-1], "line 2: a.jpg_Sugar, where .* has b.jpg_Fish"),
    "two rows exchanged": (
        lambda rows: [rows[1], rows[0], *rows[2:]],
        "line 2: b.jpg_Flower, where .* has b.jpg_Fish",
    ),
    "row twice": (
        lambda rows: [*rows[:-1], rows[0]],
        "line 9, b.jpg_Fish: the label is there twice",
    ),
    "class in small letters": (
        lambda rows: [("b.jpg_fish", rows[0][1]), *rows[1:]],
        "line 2, b.jpg_fish: the class is not one of",
    ),
    "past the image": (
        replace_first(lambda rle: f"{rle} 183750 2"),
        "line 2, b.jpg_Fish: the run '183750 2'",
    ),
    "behind the image": (
        replace_first(lambda rle: f"{rle} 183751 1"),
        "line 2, b.jpg_Fish: the run '183751 1'",
    ),
    "overlap": (replace_first(lambda rle: split_run(rle, 5)), "line 2, b.jpg_Fish: the run '"),
    "unsorted": (replace_first(lambda rle: f"{rle} 1 1"), "line 2, b.jpg_Fish: the run '1 1'"),
    "no length": (replace_first(lambda rle: f"{rle} 183750 0"), "b.jpg_Fish: the run '183750 0'"),
    "number zero": (replace_first(lambda rle: f"0 1 {rle}"), "b.jpg_Fish: the run '0 1'"),
    "counted from 0": (
        lambda rows: [(rows[0][0], "0 350"), *rows[1:]],
        "line 2, b.jpg_Fish: the run '0 350'",
    ),
    "odd count": (replace_first(lambda rle: f"{rle} 183750"), "the run '183750' has no length"),
    "float notation": (replace_first(lambda rle: rle.replace(" ", ".0 ")), "is not a whole number"),
    "exponent": (replace_first(lambda rle: f"{rle} 1e5 1"), "'1e5' is not a whole number"),
    "nan": (replace_first(lambda rle: "nan"), "line 2, b.jpg_Fish: 'nan' is not"),
    "minus one for empty": (replace_first(lambda rle: "-1"), "line 2, b.jpg_Fish: '-1' is not"),
}


@pytest.fixture
def right(kernel, tmp_path, sample_path):
    """Rows of a submission that are right, the truth that they are scored by, and where it is."""
    masks = draw_truth()
    rows = [(row, kernel.encode_rle(mask)) for row, mask in zip(ROWS, masks)]
    truth = [(row, number_pixels(mask)) for row, mask in zip(ROWS, masks)]
    path = tmp_path / "submission.csv"
    kernel.write_submission(dict(rows), sample_path, path)
    return rows, truth, path


def test_a_right_submission_scores_1_and_passes(kernel, right, sample_path):
    _, truth, path = right
    assert score(path, truth) == 1.0
    kernel.check_submission(path, sample_path)


@pytest.mark.parametrize("name", FAULTS)
def test_what_kaggle_would_refuse_or_score_wrongly_is_refused(kernel, right, sample_path, name):
    rows, truth, path = right
    change, message = FAULTS[name]
    write(path, change(rows))
    with contextlib.suppress(ValueError):  # refused by Kaggle
        assert score(path, truth) < 1.0
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        kernel.check_submission(path, sample_path)


RUN_LISTS = st.lists(st.tuples(st.integers(1, 20000), st.integers(1, 2500)), max_size=8)


@given(first=RUN_LISTS, second=RUN_LISTS)
def test_the_notebook_s_dice_is_the_scorer_s(kernel, tmp_path_factory, first, second):
    masks = []
    for runs in (first, second):
        pixels, place = np.zeros(350 * 525, bool), 0
        for gap, length in runs:
            place += gap
            pixels[place : place + length] = True
            place += length
        masks.append(pixels.reshape(525, 350).T)
    path = tmp_path_factory.getbasetemp() / "scored.csv"
    write(path, [("a.jpg_Fish", kernel.encode_rle(masks[0]))])
    truth = [("a.jpg_Fish", number_pixels(masks[1]))]
    overlap, total = (masks[0] & masks[1]).sum(), masks[0].sum() + masks[1].sum()
    assert kernel.dice(overlap, total) == pytest.approx(score(path, truth))


@pytest.fixture
def colors(kernel, sample):
    """A network whose maps are a picture's colors, and red again; test pictures; their maps."""
    size = kernel.SUBMISSION_SIZE
    images = tf.keras.layers.Input((*size, 3), dtype=tf.uint8)
    model = tf.keras.Model(images, tf.concat([images, images[..., :1]], axis=-1))
    parts = kernel.build_efficient_unet, kernel.unet_loss, kernel.dice_at_half
    unet = kernel.Network("U-Net", "efficientnetb0", 0, kernel.UNetConfig, size, 1, *parts)
    paths = sorted((sample / "test_images").iterdir())
    pictures = pd.DataFrame({"path": paths}, [path.name for path in paths])
    maps = [kernel.read_image(path, size)[..., [0, 1, 2, 0]] for path in paths]
    return [kernel.replace(unet, batch_size=3, model=model)], pictures, maps


def test_masks_are_those_of_the_decided_thresholds_under_their_names(kernel, colors, warnings):
    predictors, pictures, maps = colors
    presence, asked = np.random.default_rng(0).random((len(pictures), 4)), []

    def decide(areas, found):
        asked.append((areas, found))
        return np.array([[60, 140 + len(asked), kernel.EMPTY, 0]])

    rles = kernel.predict_rles(predictors, pictures, presence, decide, math.inf)
    assert len(asked) == 4 and len(rles) == 4 * 4 and not warnings
    for number, (name, map_, (areas, found)) in enumerate(zip(pictures.index, maps, asked)):
        np.testing.assert_array_equal(areas, [kernel.count_pixels(map_)])
        np.testing.assert_array_equal(found, presence[[number]])
        expected = map_[..., 0] >= 60, map_[..., 1] >= 141 + number
        assert all(0 < mask.mean() < 1 for mask in expected)
        for label, mask in zip(kernel.CLASSES, expected):
            decoded = kernel.decode_rle(rles[f"{name}_{label}"], kernel.SUBMISSION_SIZE)
            np.testing.assert_array_equal(decoded, mask)
        assert rles[f"{name}_Gravel"] == "" and rles[f"{name}_Sugar"] == f"1 {350 * 525}"


def test_prediction_ends_before_the_clock_does(kernel, tiny, colors, warnings):
    predictors, pictures, _ = colors
    decide, presence = kernel.use_half(tiny, None, None, None), np.ones((len(pictures), 4))
    rles = kernel.predict_rles(predictors, pictures, presence, decide, 0)
    assert list(rles) == [f"{pictures.index[0]}_{name}" for name in kernel.CLASSES]
    expected = f"The time is over: {len(pictures) - 1} test pictures are predicted to be empty."
    assert list(warnings.values()) == [expected]
    rles = kernel.predict_rles(predictors, pictures, presence, decide, math.inf)
    assert len(rles) == 4 * len(pictures) and not warnings  # run again, with time


@pytest.mark.parametrize("name", ["results.json", "submission.csv"])
def test_a_file_is_written_whole_or_not_at_all(kernel, tmp_path, sample_path, monkeypatch, name):
    path = tmp_path / name
    path.write_text("old")

    def fail(*arguments):
        raise OSError("killed before the rename")

    monkeypatch.setattr(kernel.os, "replace", fail)
    with pytest.raises(OSError, match="killed"):
        if name == "results.json":
            kernel.write_whole(path, "new")
        else:
            kernel.write_submission({}, sample_path, path)
    assert path.read_text() == "old"
