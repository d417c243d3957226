"""The pictures and their labels are read right, or refused by their names, and shown.

Most faults are made in a copy of the drawn pictures, on which the notebook's cells are then run up
to the training, as a user runs them.
"""

import gzip
import os
import re
import shutil
import zipfile

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import CELLS, FIRST, IMAGE, ROOT, add_mark, change, turn_line_ends
from hypothesis import event, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

# Encodings

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


# Tables

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


def leave_line_blank(source):
    """A blank line at the end."""
    path = source / "train.csv"
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("harmless", [add_mark, turn_line_ends, leave_line_blank])
def test_other_ways_to_write_a_table_are_read(kernel, labels, source, begin, harmless):
    harmless(source)
    assert begin()["labels"].equals(labels)


# The folder


def make_input(folder):
    """An empty folder in the layout of the competition's data."""
    for part in ("train_images", "test_images"):
        (folder / part).mkdir(parents=True)
    for part in ("train.csv", "sample_submission.csv"):
        (folder / part).touch()
    return folder


def test_input_is_found_at_each_mount_point_newest_first(kernel, tmp_path):
    mount = tmp_path / "mount"
    behind = make_input(tmp_path / "elsewhere" / "clouds").parent
    mount.mkdir()
    (mount / "link").symlink_to(behind)
    assert kernel.find_input(None, mount, True) == mount / "link" / "clouds"
    deep = make_input(mount / "datasets" / "someone" / "clouds")
    assert kernel.find_input(None, mount, True) == deep
    make_input(mount / "understanding_cloud_organization")
    present = make_input(mount / "competitions" / "understanding_cloud_organization")
    for on_kaggle in (True, False):
        assert kernel.find_input(None, mount, on_kaggle) == present
        assert kernel.find_input(str(deep), mount, on_kaggle) == deep


def test_missing_input_names_all_places_and_how_to_attach_it(kernel, tmp_path):
    ways = "Add Input' and accept the rules; else unzip it and set input_folder"
    with pytest.raises(FileNotFoundError, match=ways) as error:
        kernel.find_input(None, tmp_path, True)
    assert f"{tmp_path} has no train.csv, train_images, sample_sub" in str(error.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.csv").touch()
    with pytest.raises(FileNotFoundError, match=ways) as error:
        kernel.find_input(None, tmp_path, True)
    assert f"{tmp_path / 'other'} has no train_images, sample_submission" in str(error.value)
    assert "tests/sample" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="elsewhere has no train.csv, train_images, sample"):
        kernel.find_input(str(tmp_path / "elsewhere"), tmp_path, False)


def test_without_competition_data_the_sample_is_read(kernel, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert kernel.find_input(None, tmp_path, False).resolve() == ROOT / "tests" / "sample"


def rewrite(path, function):
    """Write a function of a file's bytes in their place."""
    path.write_bytes(function(path.read_bytes()))


def zip_table(path):
    """Put a file into an archive that takes its name."""
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.name, content)


def set_first(row):
    """A fault: another first row of train.csv."""

    def fault(source):
        path = source / "train.csv"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], row, *lines[2:]]) + "\n")

    return fault


REFUSED = {
    "no data": (
        lambda source: shutil.rmtree(source),
        FileNotFoundError,
        "The competition's data was not found: SOURCE has no train.csv, train_images, "
        "sample_submission.csv, test_images; on Kaggle, choose 'Add Input' and accept the rules",
    ),
    "train.csv missing": (
        lambda source: (source / "train.csv").unlink(),
        FileNotFoundError,
        "The competition's data was not found: SOURCE has no train.csv; on Kaggle, choose",
    ),
    "train_images missing": (
        lambda source: shutil.rmtree(source / "train_images"),
        FileNotFoundError,
        "The competition's data was not found: SOURCE has no train_images; on Kaggle, choose",
    ),
    "images not unzipped": (
        lambda source: (source / "train_images").rename(source / "train_images.zip"),
        FileNotFoundError,
        "The competition's data was not found: SOURCE has no train_images; unzip "
        "SOURCE/train_images.zip; on Kaggle, choose",
    ),
    "nothing unzipped": (
        lambda source: (shutil.rmtree(source), source.mkdir(), (source / "clouds.zip").touch()),
        FileNotFoundError,
        "The competition's data was not found: SOURCE has no train.csv, train_images, "
        "sample_submission.csv, test_images; unzip SOURCE/clouds.zip; on Kaggle, choose",
    ),
    "train.csv zipped": (
        lambda source: zip_table(source / "train.csv"),
        ValueError,
        "SOURCE/train.csv is not CSV in UTF-8, or is packed ('utf-8' codec can't decode byte",
    ),
    "train.csv gzipped": (
        lambda source: rewrite(source / "train.csv", gzip.compress),
        ValueError,
        "SOURCE/train.csv is not CSV in UTF-8, or is packed ('utf-8' codec can't decode byte",
    ),
    "train.csv in UTF-16": (
        lambda source: rewrite(source / "train.csv", lambda text: text.decode().encode("utf-16")),
        ValueError,
        "SOURCE/train.csv is not CSV in UTF-8, or is packed ('utf-8' codec can't decode byte",
    ),
    "images named otherwise": (
        lambda source: (source / "train_images" / IMAGE).rename(
            source / "train_images" / IMAGE.replace(".jpg", ".JPG")
        ),
        FileNotFoundError,
        f"SOURCE/train_images: 1 of 12 images are missing or empty (there is {IMAGE[:-4]}.JPG): "
        f"{IMAGE}",
    ),
    "train.csv empty": (
        lambda source: (source / "train.csv").write_text(""),
        ValueError,
        "SOURCE/train.csv is empty, or cut off: no line break follows its last line.",
    ),
    "no rows": (
        lambda source: (source / "train.csv").write_text("Image_Label,EncodedPixels\n"),
        ValueError,
        "SOURCE/train.csv has the columns ['Image_Label', 'EncodedPixels']; expected: "
        "['Image_Label', 'EncodedPixels'], with rows below.",
    ),
    "cut off": (
        lambda source: os.truncate(source / "train.csv", 5000),
        ValueError,
        "SOURCE/train.csv is empty, or cut off: no line break follows its last line.",
    ),
    "other columns": (
        lambda source: change(source / "train.csv", b"EncodedPixels", b"rle"),
        ValueError,
        "SOURCE/train.csv has the columns ['Image_Label', 'rle']; expected: ['Image_Label', 'Enc",
    ),
    "more columns": (
        lambda source: change(source / "train.csv", b"Pixels\n", b"Pixels,c,d,e\n"),
        ValueError,
        "SOURCE/train.csv has the columns ['Image_Label', 'EncodedPixels', 'c', 'd', 'e']; exp",
    ),
    "more cells": (
        set_first(f"{FIRST},1 2,3"),
        ValueError,
        f"SOURCE/train.csv, line 2, {FIRST}: there are not two cells.",
    ),
    "a cell that a spreadsheet cut": (
        set_first(f"{FIRST},{' '.join(f'{n} 1' for n in range(1, 99999, 2))[:32767]}"),
        ValueError,
        f"SOURCE/train.csv, line 2, {FIRST}: the encoding was cut by a spreadsheet.",
    ),
    "not text": (
        lambda source: change(source / "train.csv", b"_Fish", b"_\xff"),
        ValueError,
        "SOURCE/train.csv is not CSV in UTF-8, or is packed ('utf-8' codec can't decode byte 0xff",
    ),
    "open quote": (
        lambda source: change(source / "train.csv", FIRST.encode(), b'"' + FIRST.encode()),
        ValueError,
        "SOURCE/train.csv is not CSV in UTF-8, or is packed (unexpected end of data).",
    ),
    "three cells": (
        set_first(f"{FIRST},1,2"),
        ValueError,
        f"SOURCE/train.csv, line 2, {FIRST}: there are not two cells.",
    ),
    "one cell": (
        set_first(FIRST),
        ValueError,
        f"SOURCE/train.csv, line 2, {FIRST}: there are not two cells.",
    ),
    "label twice": (
        lambda source: change(source / "train.csv", b"_Flower", b"_Fish"),
        ValueError,
        f"SOURCE/train.csv, line 3, {FIRST}: the label is there twice.",
    ),
    "class lacks": (
        lambda source: set_first("")(source),
        ValueError,
        f"SOURCE/train.csv: there is no row {FIRST}.",
    ),
    "unknown class": (
        set_first(f"{IMAGE}_Salt,"),
        ValueError,
        f"SOURCE/train.csv, line 2, {IMAGE}_Salt: the class is not one of Fish, Flower, Gravel, Su",
    ),
    "no class": (
        set_first(f"{IMAGE},"),
        ValueError,
        f"SOURCE/train.csv, line 2, {IMAGE}: the class is not one of Fish, Flower, Gravel, Sugar.",
    ),
    "image without file": (
        lambda source: change(source / "train.csv", IMAGE.encode(), b"other.jpg", 4),
        FileNotFoundError,
        "SOURCE/train_images: 1 of 12 images are missing or empty: other.jpg",
    ),
    "image in another folder": (
        set_first("../../secret.jpg_Fish,"),
        ValueError,
        "SOURCE/train.csv, line 2, ../../secret.jpg_Fish: the image is not the name of a file.",
    ),
    "image in an absolute folder": (
        set_first("/etc/passwd_Fish,"),
        ValueError,
        "SOURCE/train.csv, line 2, /etc/passwd_Fish: the image is not the name of a file.",
    ),
    "the folder itself": (
        set_first(".._Fish,"),
        ValueError,
        "SOURCE/train.csv, line 2, .._Fish: the image is not the name of a file.",
    ),
    "training image missing": (
        lambda source: (source / "train_images" / IMAGE).unlink(),
        FileNotFoundError,
        f"SOURCE/train_images: 1 of 12 images are missing or empty: {IMAGE}",
    ),
    "training image empty": (
        lambda source: (source / "train_images" / IMAGE).write_bytes(b""),
        FileNotFoundError,
        f"SOURCE/train_images: 1 of 12 images are missing or empty: {IMAGE}",
    ),
    "test image empty": (
        lambda source: next((source / "test_images").iterdir()).write_bytes(b""),
        FileNotFoundError,
        "SOURCE/test_images: 1 of 4 images are missing or empty:",
    ),
    "sample_submission.csv missing": (
        lambda source: (source / "sample_submission.csv").unlink(),
        FileNotFoundError,
        "The competition's data was not found: SOURCE has no sample_submission.csv; on Kaggle",
    ),
    "sample_submission.csv empty": (
        lambda source: (source / "sample_submission.csv").write_text(""),
        ValueError,
        "SOURCE/sample_submission.csv is empty, or cut off: no line break follows",
    ),
    "test images without files": (
        lambda source: [path.unlink() for path in (source / "test_images").iterdir()],
        FileNotFoundError,
        "SOURCE/test_images: 4 of 4 images are missing or empty:",
    ),
    "too many broken": (
        lambda source: (source / "train_images" / IMAGE).write_text("text"),
        ValueError,
        "More than broken_share: SOURCE/train_images/"
        f"{IMAGE} cannot be read (cannot identify image file 'SOURCE/train_images/{IMAGE}').",
    ),
    "no test image left": (
        lambda source: [path.write_text("text") for path in (source / "test_images").iterdir()],
        ValueError,
        "Too few pictures: 12 for 3 folds, 0 to test.",
    ),
}
RUNS = {
    "1 2 3": "the run '3' has no length",
    "1 two": "'two' is not a whole number",
    "1 2.0": "'2.0' is not a whole number",
    "1e3 2": "'1e3' is not a whole number",
    "-1 2": "'-1' is not a whole number",
    "01 2": "'01' is not a whole number",
    "1  2": "'' is not a whole number",
    "nan": "'nan' is not a whole number",
    "0 2": "the run '0 2' is not behind the last, or leaves the image",
    "5 0": "the run '5 0' is not",
    "2940000 2": "the run '2940000 2' is not",
    "5 9 7 9": "the run '7 9' is not",
    "1 2 3 4": "the run '3 4' is not",
    "9 2 1 2": "the run '1 2' is not",
}
for rle, text in RUNS.items():
    message = f"SOURCE/train.csv, line 2, {FIRST}: {text}"
    REFUSED[f"mask {rle}"] = set_first(f"{FIRST},{rle}"), ValueError, message


@pytest.mark.parametrize("name", REFUSED)
def test_what_shows_without_training_is_refused_and_nothing_is_lost(name, source, begin):
    fault, kind, message = REFUSED[name]
    fault(source)
    with pytest.raises(kind) as error:
        begin()
    shown = str(error.value).replace(str(source), "SOURCE")
    print(f"{name}: {kind.__name__}: {shown}")
    assert shown.startswith(message)


def test_other_files_are_not_used(source, begin, warnings):
    for folder in ("train_images", "test_images"):
        shutil.copy(source / "train_images" / IMAGE, source / folder / "other.jpg")
    (source / "test_images" / "Thumbs.db").write_text("text")
    found = begin()
    assert (len(found["pictures"]), len(found["test_pictures"])) == (12, 4) and not warnings


# Images


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
    with pytest.raises(ValueError, match=f"{path} cannot be read"):
        kernel.read_image(path, (64, 96))
    gone = tmp_path / "gone.jpg"
    with pytest.raises(ValueError, match=f"{gone} cannot be read .*No such file"):
        kernel.read_image(gone, (64, 96))


def save(path, image, kind="JPEG", **options):
    """Write an image in place of another."""
    image.save(path, kind, **options)


def rotated(image):
    """An image's EXIF data that ask for it to be shown rotated."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"exif": exif}


BROKEN = {
    "cut off": (lambda path, image: os.truncate(path, path.stat().st_size // 2), "is cut off"),
    "end cut off": (lambda path, image: os.truncate(path, path.stat().st_size - 2), "is cut off"),
    "text": (lambda path, image: path.write_text("text"), "cannot identify image file"),
    "square": (
        lambda path, image: save(path, image.resize((700, 700))),
        r"is no copy of \(1400, 2100\): it has \(700, 700\)",
    ),
    "upright": (
        lambda path, image: save(path, image.transpose(Image.Transpose.ROTATE_90)),
        r"is no copy of \(1400, 2100\): it has \(2100, 1400\)",
    ),
    "too large to decode": (
        lambda path, image: change(
            path, (1400).to_bytes(2, "big") + (2100).to_bytes(2, "big"), b"\xff\xf0\xff\xf0"
        ),
        "cannot be read .*decompression bomb",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_are_left_out_and_told(kernel, source, begin, warnings, name):
    damage, message = BROKEN[name]
    test_image = sorted((source / "test_images").iterdir())[1]
    for path in (source / "train_images" / IMAGE, test_image):
        with Image.open(path) as image:
            image.load()
        damage(path, image)
    found = begin(broken_share=0.1)
    pictures, tested = found["pictures"], found["test_pictures"]
    assert IMAGE not in pictures.index and len(pictures) == pictures["fold"].count() == 11
    assert test_image.name not in tested.index and len(tested) == 3
    assert sorted(found["test_names"]) == sorted([*tested.index, test_image.name])
    first, second = warnings.values()
    print(first)
    assert re.match(f"1 of 12 images are left out: .*{IMAGE} .*{message}", first), first
    assert re.match(f"1 of 4 images are left out: .*{test_image.name} .*{message}", second)


UNUSUAL = {
    "PNG": lambda path, image: save(path, image, "PNG"),
    "grey": lambda path, image: save(path, image.convert("L"), quality=95),
    "CMYK": lambda path, image: save(path, image.convert("CMYK"), quality=95),
    "rotated by EXIF": lambda path, image: save(path, image, quality=95, **rotated(image)),
    "progressive": lambda path, image: save(path, image, quality=95, progressive=True),
    "with more behind it": lambda path, image: path.write_bytes(path.read_bytes() + b"\0" * 99),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_read_as_they_are_stored(kernel, source, begin, warnings, name):
    """The masks count the pixels as they are stored, whatever EXIF says of their display."""
    path = source / "train_images" / IMAGE
    with Image.open(path) as image:
        image.load()
    UNUSUAL[name](path, image)
    found = begin()
    assert len(found["pictures"]) == 12 and not warnings
    expected = np.asarray(image.convert("L").convert("RGB") if name == "grey" else image, int)
    small = cv2.resize(expected.astype(np.uint8), (525, 350), interpolation=cv2.INTER_AREA)
    for size, reference in (((1400, 2100), expected), ((350, 525), small.astype(int))):
        assert np.abs(kernel.read_image(path, size) - reference).mean() < 5


def shrink(paths, size):
    """Write copies of another size in place of images."""
    for path in paths:
        with Image.open(path) as image:
            image.load()
        save(path, image.resize(size[::-1], Image.Resampling.BOX), quality=95)


@pytest.mark.parametrize("size", [(256, 384), (175, 262), (1399, 2099), (2800, 4200)])
def test_copies_of_another_size_are_used_and_told(
    kernel, source, begin, warnings, capsys, pictures, size
):
    """Their masks stay those of train.csv, at the size of the original."""
    before = kernel.load_example(kernel.SAMPLE, pictures.loc[IMAGE], (175, 262))
    shrink(source.glob("*_images/*.jpg"), size)
    found = begin()
    assert len(found["pictures"]) == 12 and len(found["test_pictures"]) == 4 and not warnings
    after = kernel.load_example(kernel.SAMPLE, found["pictures"].loc[IMAGE], (175, 262))
    assert np.abs(before[0].astype(int) - after[0]).mean() < 6
    np.testing.assert_array_equal(before[1], after[1])
    lines = capsys.readouterr().out.splitlines()
    for folder in (source / "train_images", source / "test_images"):
        assert f"{folder} has images of {size}" in lines


def test_copies_of_several_sizes_are_used_and_warned_of(source, begin, warnings):
    shrink([source / "train_images" / IMAGE], (256, 384))
    assert len(begin()["pictures"]) == 12
    sizes = "has images of (256, 384), (1400, 2100), used as they are."
    assert list(warnings.values()) == [f"{source / 'train_images'} {sizes}"]


# Figures


@pytest.fixture
def draw(monkeypatch):
    """A function that draws the figures of this section with the variables of a run."""
    monkeypatch.setattr(plt, "show", lambda: None)

    def run(variables):
        start = CELLS.index("# ## The pictures and their labels\n")
        for cell in CELLS[start : CELLS.index("\n# ## ", start)].split("\n# %%"):
            if "show(" in cell:
                exec(compile(cell.partition("\n")[2], "kernel.py", "exec"), variables)
        figures = [plt.figure(number) for number in plt.get_fignums()]
        for figure in figures:
            figure.canvas.draw()
        plt.close("all")
        return figures

    return run


def test_the_first_figure_shows_a_picture_of_each_class_dimmed_outside_of_its_mask(
    kernel, begin, draw
):
    first, _ = draw(begin(until="Choose"))
    assert [panel.get_title() for panel in first.axes] == kernel.CLASSES
    assert all(len(panel.images) == 1 for panel in first.axes)


def test_a_class_without_a_picture_is_warned_of_and_the_figures_are_drawn(
    source, begin, draw, warnings
):
    table = source / "train.csv"
    table.write_text(re.sub("_Fish,.*", "_Fish,", table.read_text()))
    first, _ = draw(begin(until="Choose"))
    assert [len(panel.images) for panel in first.axes] == [0, 1, 1, 1]
    assert len(begin()["pictures"]) == 12
    assert list(warnings.values()) == ["No picture is labelled with Fish."]


@pytest.mark.parametrize(
    ("share", "message"),
    [(0.5, "More than broken_share: "), (1.0, "Too few pictures: 0 for 3 folds, 4 to test")],
)
def test_if_all_training_pictures_are_broken_the_run_says_so(
    source, begin, draw, warnings, share, message
):
    """It comes so far that the figures are drawn, without pictures."""
    broken = sorted((source / "train_images").iterdir())
    for path in broken:
        path.write_text("text")
    first, _ = draw(begin(until="Choose"))
    assert [len(panel.images) for panel in first.axes] == [0] * 4
    with pytest.raises(ValueError, match=f"^{message}") as error:
        begin(broken_share=share)
    told = warnings[f"images in {source / 'train_images'}"]
    assert told.startswith("12 of 12 images are left out: ")
    for text in [told, str(error.value)][: 2 if share < 1 else 1]:
        named = [f"{path} cannot be read" in text for path in broken]
        assert named == [True] * 5 + [False] * 7
