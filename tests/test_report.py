"""Report merges the results of all sessions and sets them beside the paper's."""

import json

import pandas as pd
import pytest


def write_results(folder, encoder, size, fold, images, **measures):
    """Leave a member's results."""
    folder.mkdir(parents=True)
    about = {"encoder": encoder, "image size": size, "fold": fold, "images": images}
    (folder / "results.json").write_text(json.dumps(about | measures))


def test_sessions_merge_into_one_table_beside_the_paper(kernel, tmp_path):
    b0, pair = "efficientnetb0", "efficientnet-1.0-1.2"
    places = [tmp_path / name / "members" for name in "abc"]
    write_results(places[0] / "b0-0", b0, "1312 x 2080", 0, 10, gated=0.5)
    write_results(places[0] / "b0-1", b0, "1312 x 2080", 1, 11, gated=0.7)
    write_results(places[1] / "b0-1", b0, "1312 x 2080", 1, 11, gated=0.9)  # where it came from
    write_results(places[1] / "b0-small", b0, "64 x 96", 1, 11, gated=0.1)
    write_results(places[2] / "pair-4", pair, "1312 x 2080", 4, 9, gated=0.2)
    results = kernel.read_results([], [place.parent for place in places])
    assert len(results) == 4 and results["gated"].tolist() == [0.5, 0.7, 0.1, 0.2]
    own = kernel.Training("", "unet", b0, 1, (), 0, 0, places[1] / "b0-1")
    results = kernel.read_results([own], [place.parent for place in places])
    assert len(results) == 4 and results["gated"].tolist() == [0.9, 0.5, 0.1, 0.2]
    results = kernel.read_results([], [place.parent for place in places])
    table = kernel.make_table(results, ["gated"], "II")
    assert table.loc[b0, "image size"].tolist() == ["1312 x 2080", "64 x 96"]
    assert table.loc[b0, "gated"].tolist() == [pytest.approx(0.6), 0.1]
    assert table.loc[b0, "folds"].tolist() == ["0, 1", "1"]
    assert table.loc[b0, "images"].tolist() == [21, 11]
    assert table.loc[b0, "paper, private"].tolist() == [0.64595] * 2
    assert table.loc["efficientnetb5", ["gated", "paper, private"]].tolist() == ["", 0.64059]
    assert table.loc[pair, ["gated", "paper, private"]].tolist() == [0.2, ""]


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
    results = {"encoder": ["x"], "image size": ["y"], "fold": [0], "images": [1], "z": [0.5]}
    table = kernel.make_table(pd.DataFrame(results), ["z"], number)
    assert table.loc[encoder, f"paper, {column}"] == value
