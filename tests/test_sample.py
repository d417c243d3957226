"""The drawn sample is what its generator draws, and resembles the competition's data."""

import cv2
import make_sample
import numpy as np


def test_sample_is_drawn_again_to_the_letter(sample, tmp_path):
    make_sample.draw_sample(tmp_path, train=2, test=1, seed=0)
    committed = (sample / "train.csv").read_text().splitlines()
    drawn = (tmp_path / "train.csv").read_text().splitlines()
    assert drawn == committed[: len(drawn)] and len(drawn) == 9
    for path in tmp_path.glob("*_images/*.jpg"):
        first, second = (
            cv2.imread(str(folder / path.parent.name / path.name)) for folder in (sample, tmp_path)
        )
        assert np.abs(first.astype(int) - second).mean() < 1  # JPEG encoders differ a little


def test_sample_has_the_competition_s_layout(sample, kernel):
    assert len(list((sample / "train_images").iterdir())) == 12
    assert len(list((sample / "test_images").iterdir())) == 4
    submission = kernel.read_rows(sample / "sample_submission.csv", kernel.SUBMISSION_SIZE)
    truth = kernel.read_rows(sample / "test_truth.csv", kernel.ORIGINAL_SIZE)
    assert (submission["EncodedPixels"] == "1 1").all()
    assert submission["Image_Label"].tolist() == truth["Image_Label"].tolist()
    assert sum(path.stat().st_size for path in sample.rglob("*") if path.is_file()) <= 8e6


def test_masks_resemble_the_competition_s(labels, kernel):
    assert ((labels != "").any(axis=1)).all()
    rles = [rle for rle in labels.to_numpy().ravel() if rle]
    assert 0.4 < len(rles) / labels.size < 0.8
    fillings, areas = [], []
    for rle in rles:
        mask = kernel.decode_rle(rle, kernel.ORIGINAL_SIZE)
        count, _, boxes, _ = cv2.connectedComponentsWithStats(np.ascontiguousarray(mask))
        fillings.append(boxes[1:, 4].sum() / (boxes[1:, 2] * boxes[1:, 3]).sum())
        areas.append(mask.mean())
    assert min(areas) > 0.05 and 0.1 < np.median(areas) < 0.5 and max(areas) < 0.9
    assert np.median(fillings) > 0.8
