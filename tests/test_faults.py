"""What can be wrong with the input, and with the folder that is written to.

The faults are made in a copy of the sample, on which the notebook's cells are then run up to the
training, as a user runs them.
"""

import ast
import copy
import gzip
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import cv2
import jupytext
import nbclient
import numpy as np
import pytest
from conftest import ROOT, is_definition
from PIL import Image

CELLS = (ROOT / "kernel.py").read_text()


def run_cells(kernel, until):
    """Run the notebook's cells before a heading, without definitions and figures; its variables."""
    variables = dict(vars(kernel))
    for cell in CELLS[: CELLS.index(f"# ## {until}\n")].split("\n# %%")[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" not in head and "plt.show()" not in body:
            nodes = [node for node in ast.parse(body).body if not is_definition(node)]
            exec(compile(ast.Module(nodes, []), "kernel.py", "exec"), variables)
    return variables


@pytest.fixture
def source(sample, tmp_path):
    """A copy of the sample, to be damaged."""
    return Path(shutil.copytree(sample, tmp_path / "input"))


@pytest.fixture
def begin(kernel, source, tmp_path, monkeypatch):
    """A function that runs the notebook's first cells, with an output folder of earlier files."""
    output = tmp_path / "output"
    output.mkdir()
    earlier = [output / name for name in ("submission.csv", "results.json", "weights.h5")]
    for path in earlier:
        path.write_text("earlier")
    variables = {"CLOUDS_INPUT": source, "CLOUDS_OUTPUT": output}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))

    def run(until="Augment and batch", **overrides):
        monkeypatch.setenv("CLOUDS_OVERRIDES", json.dumps(overrides))
        times = [path.stat().st_mtime_ns for path in earlier]
        try:
            return run_cells(kernel, until)
        finally:
            assert [path.stat().st_mtime_ns for path in earlier] == times
            assert [path.read_text() for path in earlier] == ["earlier"] * 3

    return run


def change(path, old, new, count=1):
    """Replace bytes of a file."""
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new, count))


def rewrite(path, function):
    """Write a function of a file's bytes in their place."""
    path.write_bytes(function(path.read_bytes()))


def zip_table(path):
    """Put a file into an archive that takes its name."""
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.name, content)


FIRST = (ROOT / "tests" / "sample" / "train.csv").read_text().splitlines()[1].partition(",")[0]
IMAGE = FIRST.rpartition("_")[0]


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
        "sample_submission.csv, test_images; on Kaggle, choose 'Add Input', search for the",
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
        "SOURCE/train.csv is a zip, not CSV in UTF-8. Unpack it, or save it as that.",
    ),
    "train.csv gzipped": (
        lambda source: rewrite(source / "train.csv", gzip.compress),
        ValueError,
        "SOURCE/train.csv is a gzip, not CSV in UTF-8. Unpack it, or save it as that.",
    ),
    "train.csv in UTF-16": (
        lambda source: rewrite(source / "train.csv", lambda text: text.decode().encode("utf-16")),
        ValueError,
        "SOURCE/train.csv is UTF-16, not CSV in UTF-8. Unpack it, or save it as that.",
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
    "not text": (
        lambda source: change(source / "train.csv", b"_Fish", b"_\xff"),
        ValueError,
        "SOURCE/train.csv cannot be read as CSV in UTF-8: 'utf-8' codec can't decode byte 0xff in",
    ),
    "open quote": (
        lambda source: change(source / "train.csv", FIRST.encode(), b'"' + FIRST.encode()),
        ValueError,
        "SOURCE/train.csv cannot be read as CSV in UTF-8: unexpected end of data.",
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
        "More than broken_share: 1 of 12 images are left out: SOURCE/train_images/"
        f"{IMAGE} cannot be read (cannot identify image file 'SOURCE/train_images/{IMAGE}').",
    ),
    "no test image left": (
        lambda source: [path.write_text("text") for path in (source / "test_images").iterdir()],
        ValueError,
        "12 images in 5 folds, 0 to predict.",
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


def test_without_data_on_kaggle_all_places_are_named(kernel, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.csv").touch()
    competition = "understanding_cloud_organization"
    with pytest.raises(FileNotFoundError) as error:
        kernel.find_input(None, {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, tmp_path)
    for place in (f"competitions/{competition}", competition):
        assert f"{tmp_path / place} has no train.csv, train_images, sample_sub" in str(error.value)
    assert f"{tmp_path / 'other'} has no train_images, sample_submission" in str(error.value)


def add_mark(source):
    """A byte-order mark, as some editors write it."""
    change(source / "train.csv", b"Image_Label", b"\xef\xbb\xbfImage_Label")


def turn_line_ends(source):
    """Windows line ends."""
    change(source / "train.csv", b"\n", b"\r\n", -1)


def leave_line_blank(source):
    """A blank line at the end."""
    path = source / "train.csv"
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("harmless", [add_mark, turn_line_ends, leave_line_blank])
def test_other_ways_to_write_a_table_are_read(kernel, labels, source, begin, harmless):
    harmless(source)
    assert begin()["labels"].equals(labels)


def test_other_files_are_not_used_but_told(source, begin, warnings):
    for folder in ("train_images", "test_images"):
        shutil.copy(source / "train_images" / IMAGE, source / folder / "other.jpg")
    (source / "test_images" / "Thumbs.db").write_text("text")
    begin()
    assert list(warnings.values()) == [
        f"{source}/train_images has 1 more files, which no row names.",
        f"{source}/test_images has 2 more files, which no row names.",
    ]


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


# Images


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
    assert IMAGE not in found["labels"].index and len(found["folds"]) == len(found["labels"]) == 11
    paths, rows = found["test_images"]
    assert test_image not in paths and len(paths) == len(rows) == 3 and (rows == "").all(axis=None)
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
    assert len(found["labels"]) == 12 and not warnings
    expected = np.asarray(image.convert("L").convert("RGB") if name == "grey" else image, int)
    small = cv2.resize(expected.astype(np.uint8), (525, 350), interpolation=cv2.INTER_AREA)
    for size, reference in (((1400, 2100), expected), ((350, 525), small.astype(int))):
        assert np.abs(kernel.read_image(path, size) - reference).mean() < 5


@pytest.mark.parametrize("size", [(256, 384), (175, 262), (1399, 2099), (2800, 4200)])
def test_copies_of_another_size_are_used_and_told(kernel, source, begin, warnings, size):
    """Their masks stay those of train.csv, at the size of the original."""
    original = source / "train_images" / IMAGE
    before = kernel.load_example(kernel.SAMPLE, (128, 192), original, ["1 1400", "", "", ""])
    for path in source.glob("*_images/*.jpg"):
        with Image.open(path) as image:
            image.load()
        save(path, image.resize(size[::-1], Image.Resampling.BOX), quality=95)
    found = begin()
    assert len(found["labels"]) == 12 and len(found["test_names"]) == 4
    after = kernel.load_example(kernel.SAMPLE, (128, 192), original, ["1 1400", "", "", ""])
    assert np.abs(before[0].astype(int) - after[0]).mean() < 6
    np.testing.assert_array_equal(before[1], after[1])
    assert list(warnings.values()) == [
        f"{folder} has images of [{size}], not (1400, 2100). They are used as is."
        for folder in (source / "train_images", source / "test_images")
    ]


def test_a_first_try_takes_a_few_images_and_says_so(source, begin, warnings):
    found = begin(image_limit=3, folds=2, held_out=[0])
    assert len(found["labels"]) == len(found["present"]) == len(found["folds"]) == 3
    assert len(found["test_images"][0]) == 3
    assert list(warnings.values()) == ["Only 3 training images and 3 test images are used."]


def test_too_few_images_for_the_folds_are_refused(begin):
    assert len(begin(folds=11, held_out=[0])["folds"]) == 12
    with pytest.raises(ValueError, match="12 images in 11 folds, 4 to predict"):
        begin(folds=11, held_out=[0, 1])


def test_an_output_that_cannot_be_written_is_refused_by_its_name(begin, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "file", Path("/proc/output")):
        monkeypatch.setenv("CLOUDS_OUTPUT", str(folder))
        with pytest.raises(OSError, match=str(folder)):
            begin()
    assert (tmp_path / "file").read_text() == "text"


def test_initial_weights_of_another_encoder_are_refused_before_training(kernel, tiny, tmp_path):
    path = tmp_path / "encoder.h5"
    same = kernel.build_classifier(tiny, (0.5, 0.3), (64, 96)).get_layer(index=2)
    same.save_weights(path)
    config = kernel.replace(tiny, encoder_weights=str(path))
    loaded = kernel.build_classifier(config, (0.5, 0.3), (64, 96)).get_layer(index=2)
    for first, second in zip(same.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(first, second)
    half = tmp_path / "half.h5"
    half.write_bytes(path.read_bytes()[:9999])
    cases = (path, (0.5, 0.6)), (half, (0.5, 0.3)), (tmp_path / "no.h5", (0.5, 0.3))
    for weights, encoder in (*cases, ("imagenet", (1.0, 1.2))):
        config = kernel.replace(tiny, encoder_weights=str(weights))
        for build in (kernel.build_classifier, kernel.build_efficient_unet):
            with pytest.raises(ValueError, match=f"cannot be built with encoder_weights {weights}"):
                build(config, encoder, (64, 96))


def test_nothing_is_unpickled():
    """A pickle may run code; the notebook names no module or function that reads one."""
    tree = ast.parse(CELLS)
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names} | {getattr(node, "module", "")}
    assert len(names) > 300
    readers = {"pickle", "dill", "shelve", "marshal", "read_pickle", "eval", "exec"}
    assert not names & readers
    assert not names & {"load_model", "allow_pickle", "frompickle", "Unpickler"}
    loads = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    loads = {name for name in loads if name.rpartition(".")[2] in ("load", "loads")}
    assert loads == {"json.loads"}


def shown(cell):
    """What a cell shows: its tables, and what it prints unless that depends on the machine."""
    data = [output.data for output in cell.outputs if "data" in output]
    outputs = [part["text/plain"] for part in data]
    if "nbval-ignore-output" not in cell.metadata.get("tags", []):
        outputs += [(output.get("text"), output.get("data")) for output in cell.outputs]
    return outputs


def test_a_run_with_many_faults_whose_cells_all_run_twice(kernel, source, tmp_path, monkeypatch):
    """Ends with a submission, tells of each fault, and finds the same again in each cell."""
    turn_line_ends(source)
    add_mark(source)
    os.truncate(source / "train_images" / IMAGE, 9999)
    broken = sorted((source / "test_images").iterdir())[0]
    broken.write_text("text")
    shutil.copy(source / "train_images" / IMAGE, source / "test_images" / "other.jpg")
    sizes = {"image_size": [64, 96], "classifier_size": [64, 96], "held_out": [0], "flips": False}
    overrides = {**sizes, "epochs": 1, "classifier_epochs": [1, 1], "broken_share": 0.1}
    variables = {"CLOUDS_INPUT": source, "CLOUDS_OUTPUT": tmp_path / "output"}
    variables |= {"CLOUDS_OVERRIDES": json.dumps(overrides), "CLOUDS_PRESET": "SAMPLE"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    notebook = jupytext.reads(CELLS, fmt="py:percent")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells = [copy.deepcopy(cell) for cell in cells for _ in range(2)]
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    for first, second in zip(notebook.cells[::2], notebook.cells[1::2]):
        assert shown(first) == shown(second), first.source
    assert len([cell for cell in notebook.cells if any(shown(cell))]) > 40
    submission = tmp_path / "output" / "submission.csv"
    table = kernel.check_submission(submission, source / "sample_submission.csv")
    assert (table.loc[table["image"] == broken.name, "EncodedPixels"] == "").all()
    assert (table["EncodedPixels"] != "").any()
    warnings = json.loads((tmp_path / "output" / "results.json").read_text())["warnings"]
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.outputs)
    assert f"warnings: {warnings}\n" in printed and len(warnings) == 3
    for part in ("1 more files", IMAGE, broken.name):
        (warning,) = (warning for warning in warnings if part in warning)
        assert f"Warning: {warning}\n" in printed
