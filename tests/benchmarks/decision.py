"""Compare the ways to decide on a network's counts, or on a simulated network over real masks.

    PYTHONPATH=tests python tests/benchmarks/decision.py COUNTS.npz ...
    PYTHONPATH=tests python tests/benchmarks/decision.py TRAIN_CSV [IMAGES]

COUNTS.npz holds `areas` and `overlaps`, int (images, classes, 256), as count_pixels counts them, of
maps of any size, and `presence`, float (images, classes), a measure of presence from 0 to 1.

Else no network is trained: its maps are made from the true masks, shifted, zoomed, blurred and
mixed with smooth noise, and where a class is absent from another image's mask of it. How sure a map
is follows the same evidence as the classifier's probability of presence, which has a chosen area
under the curve and is miscalibrated in a known way. So the scores say how the ways compare on such
maps, and nothing about a leaderboard.

Prints each way's Dice on images that its rules did not learn on, with the 95 % interval of the gain
over "threshold and area"; and what each takes, beside the loops of public kernels: thresholds times
minimum sizes, with connected components for each.
"""

import itertools
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from conftest import KERNEL
from scipy.special import expit, logit
from scipy.stats import bootstrap, norm

SMALL = (70, 105)  # the size that maps are made at
SETTINGS = {  # area under the presence's curve, shift, blur, noise and contrast of the maps
    "weak": {"curve": 0.80, "shift": 0.06, "blur": 3.0, "noise": 0.8, "contrast": 3.6},
    "middle": {"curve": 0.88, "shift": 0.04, "blur": 3.0, "noise": 0.7, "contrast": 4.0},
    "strong": {"curve": 0.92, "shift": 0.03, "blur": 2.5, "noise": 0.6, "contrast": 4.5},
}


def draw_field(random, cell=6):
    """Smooth noise with deviation 1: float32 (*SMALL, 4)."""
    rows, columns = (side // cell + 2 for side in SMALL)
    coarse = random.standard_normal((rows, columns, 4)).astype(np.float32)
    field = cv2.resize(coarse, SMALL[::-1], interpolation=cv2.INTER_CUBIC)
    return field / field.std()


def move(random, shape, shift, blur):
    """One class's shape (*SMALL) shifted, zoomed and blurred."""
    zoom = np.exp(random.normal(0, shift))
    down, right = random.normal(0, shift, 2) * SMALL + (1 - zoom) * np.array(SMALL) / 2
    matrix = np.array([[zoom, 0, right], [0, zoom, down]])
    moved = cv2.warpAffine(shape, matrix, SMALL[::-1], borderMode=cv2.BORDER_REPLICATE)
    return cv2.GaussianBlur(moved, (0, 0), blur)


def simulate(labels, curve, shift, blur, noise, contrast, seed=0):
    """Yield for each image its maps, its masks and the probabilities of presence."""
    random = np.random.default_rng(seed)
    rles, present = labels.to_numpy(), (labels != "").to_numpy()
    donors = [np.flatnonzero(column) for column in present.T]
    distance = np.sqrt(2) * norm.ppf(curve)  # of the evidence with and without the class
    for there, encoded in zip(present, rles):
        plane = KERNEL.read_plane(encoded, KERNEL.SUBMISSION_SIZE)
        masks = KERNEL.split_planes(plane).numpy()
        evidence = np.where(there, 0.5, -0.5) * distance + random.standard_normal(4)
        calibrated = logit(present.mean(axis=0)) + distance * evidence
        presence = expit(0.6 * calibrated + 0.3)
        shapes = masks.astype(np.float32)
        for index in np.flatnonzero(~there):
            other = KERNEL.read_plane(rles[random.choice(donors[index])], KERNEL.SUBMISSION_SIZE)
            shapes[..., index] = other >> index & 1
        shapes = cv2.resize(shapes, SMALL[::-1], interpolation=cv2.INTER_AREA)
        moved = [
            move(random, np.ascontiguousarray(x), shift, blur) for x in np.moveaxis(shapes, -1, 0)
        ]
        moved = np.stack(moved, axis=-1)
        height = 0.9 * evidence + 0.4 * random.standard_normal(4)
        height = np.where(moved > 0.1, 1, 0.3) * height
        logits = contrast * (moved - 0.55) + height + noise * draw_field(random)
        maps = cv2.resize(expit(logits).astype(np.float32), KERNEL.SUBMISSION_SIZE[::-1])
        yield np.rint(255 * maps).astype(np.uint8), masks, presence


def compare(config, areas, overlaps, presence):
    """Decide in all ways, on images that the rules did not learn on, and print scores and times."""
    there = overlaps[..., 0] > 0
    decisions = {"all masks empty": np.full(there.shape, KERNEL.EMPTY)}
    for way, learn in KERNEL.WAYS.items():
        decisions[way] = KERNEL.cross_decide(learn, config, areas, overlaps, presence)
    dice = KERNEL.dice(overlaps, areas + overlaps[..., :1])
    best = [dice[known, index].mean(axis=0).argmax() for index, known in enumerate(there.T)]
    decisions["presence known, best thresholds"] = np.where(there, best, KERNEL.EMPTY)
    scores = {way: KERNEL.score_decisions(areas, overlaps, x) for way, x in decisions.items()}
    base = scores["threshold and area"]
    for way, score in scores.items():
        gains, options = (score - base).mean(axis=1), {"method": "percentile", "n_resamples": 2000}
        found = bootstrap([gains], np.mean, random_state=config.seed, **options)
        low, high = found.confidence_interval
        over = f"over threshold and area {gains.mean():+.4f} [{low:+.4f}, {high:+.4f}]"
        print(f"{way:31} {score.mean():.4f}  {over}")
    for way, learn in KERNEL.WAYS.items():
        start = time.perf_counter()
        decide = learn(config, areas, overlaps, presence)
        middle = time.perf_counter()
        decide(areas, presence)
        end = time.perf_counter()
        print(f"{way}: learns in {middle - start:.2f} s, decides in {end - middle:.2f} s")


def count_simulated(labels, setting):
    """The areas, overlaps and presence of a setting, and the milliseconds to count a map."""
    areas, overlaps, probabilities, seconds = [], [], [], 0.0
    for maps, masks, presence in simulate(labels, **setting):
        start = time.perf_counter()
        areas.append(KERNEL.count_pixels(maps))
        overlaps.append(KERNEL.count_pixels(maps, masks))
        seconds += time.perf_counter() - start
        probabilities.append(presence)
    print(f"tables: {1000 * seconds / len(areas) / 4:.2f} ms a map")
    return np.stack(areas), np.stack(overlaps), np.stack(probabilities)


def search_in_loops(maps, masks, thresholds, sizes):
    """The grid search of public kernels for one class: the mean Dice of each cell."""
    scores = np.zeros((len(thresholds), len(sizes)))
    for (row, threshold), (column, size) in itertools.product(
        enumerate(thresholds), enumerate(sizes)
    ):
        for probabilities, truth in zip(maps, masks):
            binary = (probabilities >= threshold).astype(np.uint8)
            number, components = cv2.connectedComponents(binary)
            predicted = np.zeros(binary.shape, np.float32)
            for component in range(1, number):
                inside = components == component
                if inside.sum() > size:
                    predicted[inside] = 1
            overlap, total = (truth * predicted).sum(), truth.sum() + predicted.sum()
            scores[row, column] += KERNEL.dice(overlap, total) / len(maps)
    return scores


def main(path, images):
    """Print the comparison for each setting, and the time of the loops on eight images."""
    labels = KERNEL.read_labels(path)
    labels = labels.iloc[np.random.default_rng(0).permutation(len(labels))[:images]]
    for name, setting in SETTINGS.items():
        print(f"\n{name}: {len(labels)} images, {setting}")
        compare(KERNEL.BEST, *count_simulated(labels, setting))
    few = list(itertools.islice(simulate(labels, **SETTINGS["middle"]), 8))
    maps, masks = (np.stack([example[part][..., 0] for example in few]) for part in (0, 1))
    start = time.perf_counter()
    search_in_loops(maps, masks, range(96, 224, 32), range(0, 20000, 5000))
    cells = (time.perf_counter() - start) / (16 * len(few))
    minutes = cells * 100 * 4 * len(labels) / 60
    print(f"loops: {1000 * cells:.1f} ms a map and cell, {minutes:.0f} min for a grid of 100 cells")
    print("on all of these maps (extrapolated from eight)")


if __name__ == "__main__":
    if sys.argv[1].endswith(".npz"):
        for counts in map(np.load, sys.argv[1:]):
            print(f"\n{len(counts['areas'])} images")
            areas, overlaps = (counts[name].astype(int) for name in ("areas", "overlaps"))
            compare(KERNEL.BEST, areas, overlaps, counts["presence"])
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
