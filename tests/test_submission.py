"""The submission's file."""

import numpy as np
import pytest

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


def test_a_row_without_a_mask_gets_the_empty_one(kernel, tmp_path, sample_path):
    path = tmp_path / "submission.csv"
    kernel.write_submission({}, sample_path, path)
    assert (kernel.check_submission(path, sample_path)["EncodedPixels"] == "").all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "line 9: None, where .* has a.jpg_Sugar"),
        (lambda rows: [*rows, ("c.jpg_Fish", "")], "line 10: c.jpg_Fish, where .* has None"),
        (lambda rows: rows[::-1], "line 2: a.jpg_Sugar, where .* has b.jpg_Fish"),
        (lambda rows: [*rows[:-1], rows[0]], "line 9, b.jpg_Fish: the label is there twice"),
        (lambda rows: [(ROWS[0], "183750 2"), *rows[1:]], "line 2, b.jpg_Fish: the run '183750 2'"),
        (lambda rows: [(ROWS[0], "5 2 1 2"), *rows[1:]], "line 2, b.jpg_Fish: the run '1 2'"),
        (lambda rows: [(ROWS[0], "5 2.0"), *rows[1:]], "line 2, b.jpg_Fish: '2.0' is not"),
        (lambda rows: [(ROWS[0], "nan"), *rows[1:]], "line 2, b.jpg_Fish: 'nan' is not"),
    ],
)
def test_faults_are_refused_with_file_and_row(kernel, tmp_path, sample_path, change, message):
    path = write(tmp_path / "submission.csv", change([(row, "") for row in ROWS]))
    with pytest.raises(ValueError, match=f"{path}, {message}"):
        kernel.check_submission(path, sample_path)


def test_predictions_are_encoded_under_their_names(kernel, session, tiny, sample, monkeypatch):
    """Maps that are 255 in a box of each class, in place of a network's."""
    paths = sorted((sample / "test_images").iterdir())
    maps = np.zeros((len(paths), 350, 525, 4), np.uint8)
    for image, index in np.ndindex(len(paths), 4):
        maps[image, 10 * image : 10 * image + 50, 20 * index : 20 * index + 60, index] = 255
    monkeypatch.setattr(kernel, "predict_maps", lambda config, predict, paths: iter(maps))
    presence = np.ones((len(paths), 4))
    decide = kernel.use_half(tiny, None, None, None)
    rles = kernel.predict_rles([(tiny, None)], paths, presence, decide, session.clock)
    assert len(rles) == 4 * len(paths)
    for image, path in enumerate(paths):
        for index, name in enumerate(kernel.CLASSES):
            mask = kernel.decode_rle(rles[f"{path.name}_{name}"], kernel.SUBMISSION_SIZE)
            np.testing.assert_array_equal(mask, maps[image, ..., index] > 0)
