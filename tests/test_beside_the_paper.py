"""Beside the paper merges the results of all sessions and sets them beside the paper's."""

import json

import pandas as pd
import pytest


def write_results(folder, encoder, size, fold, pictures, **measures):
    """Leave a member's results."""
    folder.mkdir(parents=True)
    about = {"encoder": encoder, "image size": size, "fold": fold, "pictures": pictures}
    (folder / "results.json").write_text(json.dumps(about | measures))


def test_sessions_merge_into_one_table_beside_the_paper(kernel, tmp_path):
    b0, pair = "efficientnetb0", "efficientnet-1.0-1.2"
    write_results(tmp_path / "b0-0", b0, "1312 x 2080", 0, 10, gated=0.5)
    write_results(tmp_path / "b0-1", b0, "1312 x 2080", 1, 11, gated=0.7)
    write_results(tmp_path / "b0-1-other", b0, "1312 x 2080", 1, 11, gated=0.9)  # by other settings
    write_results(tmp_path / "b0-small", b0, "64 x 96", 1, 11, gated=0.1)
    write_results(tmp_path / "pair-4", pair, "1312 x 2080", 4, 9, gated=0.2)
    (tmp_path / "b0-classifier").mkdir()  # has no results
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 6
    results = kernel.read_results(folders)
    assert len(results) == 4 and results["gated"].tolist() == [0.5, 0.7, 0.1, 0.2]
    results = kernel.read_results([tmp_path / "b0-1-other", *folders])
    assert len(results) == 4 and results["gated"].tolist() == [0.9, 0.5, 0.1, 0.2]
    table = kernel.make_table(kernel.read_results(folders), ["gated"], "II")
    assert table.loc[b0, "image size"].tolist() == ["1312 x 2080", "64 x 96"]
    assert table.loc[b0, "gated"].tolist() == [pytest.approx(0.6), 0.1]
    assert table.loc[b0, "folds"].tolist() == ["0, 1", "1"]
    assert table.loc[b0, "pictures"].tolist() == [21, 11]
    assert table.loc[b0, "paper, private"].tolist() == [0.64595] * 2
    assert table.loc["efficientnetb5", ["gated", "paper, private"]].tolist() == ["", 0.64059]
    assert table.loc[pair, ["gated", "paper, private"]].tolist() == [0.2, ""]


def test_results_that_are_missing_are_passed_over(kernel, tmp_path):
    write_results(tmp_path / "there", "efficientnetb0", "64 x 96", 0, 10, gated=0.5)
    (tmp_path / "without").mkdir()
    folders = [tmp_path / name for name in ("no folder", "without", "there")]
    assert kernel.read_results(folders)["gated"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("number", "column", "encoder", "value"),
    [
        ("I", "baseline", "efficientnetb0", 0.670),
        ("I", "fine-tuned", "efficientnetb5", 0.732),
        ("II", "cross-validation", "efficientnetb1", 0.6423),
        ("II", "private", "efficientnetb3", 0.64585),
        ("III", "private", "efficientnetb0", 0.6611),
        ("III", "cross-validation", "efficientnetb2", 0.6589),
    ],
)
def test_the_paper_s_tables_are_as_they_are_printed(kernel, number, column, encoder, value):
    results = {"encoder": ["x"], "image size": ["y"], "fold": [0], "pictures": [1], "z": [0.5]}
    table = kernel.make_table(pd.DataFrame(results), ["z"], number)
    assert table.loc[encoder, f"paper, {column}"] == value
