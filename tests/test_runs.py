"""Runs of several encoders and folds: their list, what they leave, and the tables of all."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest


def make_results(kernel, folder, config, dice, weights=False):
    """Leave what a session leaves, the networks' weights as empty files; returns its runs."""
    folder.mkdir(parents=True)
    runs = kernel.list_runs(config, folder)
    for number, run in enumerate(runs):
        values = [3, *np.array([0.5, 0.75, 0.7, dice, dice + 0.1]) + number / 100]
        run.results.update(zip(kernel.MEASURES, map(float, values)))
        run.results["images"] = 3
        for network in ("baseline", *kernel.NETWORKS) if weights else ():
            run.files(network).weights.touch()
            state = run.files(network).state
            state.mkdir()
            settings = {**run.describe(network), "labels": [1, 2]}
            (state / "training.json").write_text(json.dumps({"settings": settings}))
    entries = [{"config": dataclasses.asdict(run.config), "results": run.results} for run in runs]
    text = json.dumps({"notebook": kernel.TITLE, "runs": entries})
    (folder / "results.json").write_text(text)
    return runs


def test_a_run_for_each_encoder_and_fold(kernel, tmp_path):
    config = kernel.replace(
        kernel.PAPER, encoders=("efficientnetb1", (1.0, 1.2)), folds_to_run=(2, 4)
    )
    runs = kernel.list_runs(config, tmp_path)
    assert [run.name for run in runs] == [
        "efficientnetb1-fold2",
        "efficientnetb1-fold4",
        "efficientnet-1.0-1.2-fold2",
        "efficientnet-1.0-1.2-fold4",
    ]
    assert runs[3].config == kernel.replace(kernel.PAPER, encoder=(1.0, 1.2), fold=4)
    assert len({run.files(network) for run in runs for network in kernel.NETWORKS}) == 8
    assert [run.name for run in kernel.list_runs(kernel.PAPER, tmp_path)] == [
        "efficientnetb0-fold0"
    ]


def test_runs_come_back_from_their_results(kernel, tmp_path):
    config = kernel.replace(kernel.SAMPLE, encoders=("efficientnetb0", (0.5, 0.3)))
    runs = make_results(kernel, tmp_path / "a", config, 0.6)
    assert kernel.read_results(tmp_path / "a" / "results.json") == runs


def test_earlier_runs_are_found_where_kaggle_mounts_them_or_where_it_is_said(kernel, tmp_path):
    attached = tmp_path / "notebooks" / "someone" / "clouds-b1"
    first = make_results(kernel, attached, kernel.SAMPLE, 0.6)
    second = make_results(kernel, tmp_path / "my-dataset", kernel.BEST, 0.5)

    def find_runs(chosen, environment):
        paths = kernel.find_earlier(chosen, environment, tmp_path)
        return [run for path in paths for run in kernel.read_results(path)]

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"accuracy": 1}')
    assert find_runs(None, {}) == [*second, *first]
    assert find_runs([str(attached)], {}) == find_runs(str(attached), {}) == first
    listed = {"CLOUDS_EARLIER": f"{attached}{kernel.os.pathsep}{tmp_path / 'my-dataset'}"}
    assert find_runs(["elsewhere"], listed) == [*first, *second]
    assert kernel.find_earlier(None, {}, tmp_path / "none") == []
    with pytest.raises(FileNotFoundError, match="no elsewhere/results.json"):
        kernel.find_earlier(["elsewhere"], {}, tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: run["config"].pop("seed"), "seed"),
        (lambda run: run["config"].update(colour=1), "colour"),
        (lambda run: run["results"].pop("Dice"), "'Dice'"),
        (lambda run: run["results"].update(Dice="0.5"), "Dice is '0.5'"),
        (lambda run: run["results"].update(Dice=None), "Dice is None"),
        (lambda run: run["results"].update(Dice=1.5), "Dice is 1.5"),
        (lambda run: run["results"].update(Dice=True), "Dice is True"),
        (lambda run: run["results"].update(Dice=math.inf), "Dice is inf"),
        (lambda run: run["results"].update(images=0), "images is 0"),
        (lambda run: run["results"].update(images=2.5), "images is 2.5"),
        (lambda run: run["config"].update(encoder="../../b0"), "encoder is '../../b0'"),
        (lambda run: run["config"].update(image_size=[1, 2]), "image_size is"),
        (lambda run: run["config"].update(fold=9), "fold is 9"),
        (lambda run: run.update(config=[]), "mapping"),
        (lambda run: run.update(results="high"), "indices"),
    ],
)
def test_results_of_another_version_are_named(kernel, tmp_path, break_it, message):
    make_results(kernel, tmp_path / "a", kernel.SAMPLE, 0.6)
    path = tmp_path / "a" / "results.json"
    results = json.loads(path.read_text())
    break_it(results["runs"][0])
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"{path} is not as this version .*{message}"):
        kernel.read_results(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"notebook": 1}',
        "[]",
        "\udc80",
        '{"notebook": "another", "runs": 1}',
    ],
)
def test_other_files_of_that_name_tell_of_no_runs(kernel, tmp_path, text):
    (tmp_path / "results.json").write_text(text, errors="surrogateescape")
    assert kernel.read_results(tmp_path / "results.json") == []


@pytest.mark.parametrize("runs", [None, 1, {}, [1], [[]], [{}], [{"config": {}}], "ab"])
def test_results_without_runs_are_named(kernel, tmp_path, runs):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"notebook": kernel.TITLE, "runs": runs}))
    if runs == {}:
        assert kernel.read_results(path) == []
    else:
        with pytest.raises(ValueError, match=f"{path} is not as this version"):
            kernel.read_results(path)


def test_weights_of_another_run_in_the_same_folder_are_not_taken_for_those_of_the_first(
    kernel, tmp_path
):
    """A second run that was killed before its results leaves the first run's results.json."""
    base = kernel.replace(kernel.SAMPLE, folds_to_run=())
    (run,) = make_results(kernel, tmp_path / "both", base, 0.6, weights=True)
    networks = ("baseline", *kernel.NETWORKS)
    assert run.has_weights(networks)
    second = kernel.replace(run, config=kernel.replace(run.config, epochs=3))
    state = second.files("unet").state
    settings = {**second.describe("unet"), "labels": [1, 2]}
    (state / "training.json").write_text(json.dumps({"settings": settings}))
    assert not run.has_weights(networks) and run.has_weights(networks[:2])
    assert second.has_weights(networks)  # the classifier does not depend on the U-Net's epochs
    folds = pd.Series(np.arange(15) % 5)
    earlier = kernel.read_results(tmp_path / "both" / "results.json")
    assert kernel.choose_members([second], earlier, folds) == [second]
    with pytest.raises(FileNotFoundError, match="no weights of"):
        kernel.list_runs(kernel.replace(base, train=False), tmp_path, earlier)
    (state / "training.json").write_text("{")
    assert not run.has_weights(("unet",))


def test_networks_predict_together_only_on_the_same_split_and_with_weights(kernel, tmp_path):
    base = kernel.replace(kernel.SAMPLE, folds_to_run=(), encoder="efficientnetb0", fold=0)
    own = make_results(kernel, tmp_path / "own", base, 0.6)
    other_fold = kernel.replace(base, fold=1)
    earlier = [
        *make_results(kernel, tmp_path / "same", base, 0.6, weights=True),
        *make_results(kernel, tmp_path / "fits", other_fold, 0.6, weights=True),
        *make_results(
            kernel, tmp_path / "seed", kernel.replace(other_fold, seed=1), 0.6, weights=True
        ),
        *make_results(
            kernel, tmp_path / "folds", kernel.replace(other_fold, folds=4), 0.6, weights=True
        ),
        *make_results(kernel, tmp_path / "bare", kernel.replace(base, fold=2), 0.6),
        *make_results(
            kernel, tmp_path / "size", kernel.replace(base, image_size=(64, 96)), 0.6, weights=True
        ),
    ]
    folds = pd.Series(np.arange(15) % 5)  # three images in each
    members = kernel.choose_members(own, earlier, folds)
    assert [run.folder.name for run in members] == ["own", "fits", "size"]
    other_images = pd.Series(np.arange(20) % 5)
    members = kernel.choose_members(own, earlier, other_images)
    assert [run.folder.name for run in members] == ["own"]


def test_of_repeated_runs_the_first_stays_in_its_place(kernel, tmp_path):
    base = kernel.replace(kernel.SAMPLE, folds_to_run=())
    sizes = [(64, 96), (128, 192), (64, 96), (32, 64), (128, 192)]
    runs = [
        kernel.list_runs(kernel.replace(base, image_size=size), tmp_path / str(place))[0]
        for place, size in enumerate(sizes)
    ]
    assert [run.folder.name for run in kernel.without_repeats(runs)] == ["0", "1", "3"]


def test_sessions_merge_into_one_table_beside_the_paper(kernel, tmp_path):
    base = kernel.replace(kernel.SAMPLE, folds_to_run=(0, 1), encoder="efficientnetb0")
    runs = make_results(kernel, tmp_path / "b0", base, 0.6)
    runs += make_results(kernel, tmp_path / "b0-later", base, 0.9)  # the same runs again
    third = kernel.replace(base, folds_to_run=(2,))
    runs += make_results(kernel, tmp_path / "b0-third", third, 0.7)
    runs += make_results(
        kernel, tmp_path / "b7", kernel.replace(base, encoder="efficientnetb7"), 0.4
    )
    runs = kernel.without_repeats(runs)
    scores = {("efficientnetb0", "128 x 192"): (0.65, 0.66)}
    table = kernel.make_table(runs, "Dice", scores, kernel.PAPER_DICE)
    assert len(table) == 7
    ours = table.loc["efficientnetb0"]
    assert ours["validated on"] == "fold 0, 1, 2: 9 images"
    assert ours["Dice"] == round((0.6 + 0.61 + 0.7) / 3, 4)
    assert (ours["ours, private"], ours["ours, public"]) == (0.65, 0.66)
    assert ours["paper, private"] == 0.6602
    assert table.loc["efficientnetb7", "Dice"] == pytest.approx(0.405)
    assert table.loc["efficientnetb7", "paper, private"] == ""
    assert (table.loc["efficientnetb5", ["validated on", "Dice", "ours, private"]] == "").all()
    without_scores = kernel.make_table(runs, "gated Dice", {})
    assert (without_scores["ours, private"] == "").all()
    assert without_scores.loc["efficientnetb7", "gated Dice"] == pytest.approx(0.505)


def test_probabilities_of_a_fold_s_classifiers_are_told_apart(
    kernel, labels, sample, tmp_path, monkeypatch
):
    """Each run predicts the images that it held out, and only these."""
    config = kernel.replace(kernel.SAMPLE, folds_to_run=(0, 1))
    runs = kernel.list_runs(config, tmp_path)
    folds = kernel.assign_folds(labels, config.folds, config.seed)
    answers = {run.name: np.full(4, index / 10) for index, run in enumerate(runs)}

    def predict(run, network, paths, strategy):
        return np.tile(answers[run.name], (len(paths), 1))

    monkeypatch.setattr(kernel, "predict_presence", predict)
    tables = kernel.predict_held_out(runs, "classifier", labels, folds, sample / "train_images")
    for fold, table in enumerate(tables):
        assert list(table.index) == list(labels.index[folds == fold])
        assert list(table.columns) == list(kernel.CLASSES)
        assert (table == fold / 10).all().all()
    assert isinstance(tables[0], pd.DataFrame)


def test_with_training_switched_off_the_runs_are_those_of_an_earlier_session(kernel, tmp_path):
    base = kernel.replace(kernel.SAMPLE, folds_to_run=(0, 1), encoder_weights="imagenet")
    make_results(kernel, tmp_path / "bare", base, 0.5)
    trained = make_results(kernel, tmp_path / "trained", base, 0.6, weights=True)
    paths = kernel.find_earlier([tmp_path / "bare", tmp_path / "trained"], {}, tmp_path)
    earlier = [run for path in paths for run in kernel.read_results(path)]
    off = kernel.replace(kernel.SAMPLE, folds_to_run=(1,), train=False)
    (found,) = kernel.list_runs(off, tmp_path, earlier)
    assert found.folder == tmp_path / "trained" and found.results == {}
    assert found.config == kernel.replace(trained[1].config, train=False, encoder_weights=None)
    lacking = "no weights of efficientnet-0.5-0.3-fold1 for these folds. Attach"
    with pytest.raises(FileNotFoundError, match=lacking):
        kernel.list_runs(kernel.replace(off, seed=1), tmp_path, earlier)
    trained[1].files("unet").weights.unlink()
    with pytest.raises(FileNotFoundError, match=lacking):
        kernel.list_runs(off, tmp_path, earlier)
