"""Compare the ways to decide on a simulated network over real masks.

    PYTHONPATH=tests python tests/benchmarks/decision.py TRAIN_CSV [IMAGES]

No network is trained: its maps are made from the true masks, shifted, zoomed, blurred and mixed
with smooth noise, and where a class is absent from another image's mask of it. How sure a map is
follows the same evidence as the classifier's probability of presence, which has a chosen area under
the curve and is miscalibrated in a known way. So the scores say how the ways compare on such maps,
and nothing about a leaderboard.

Prints each way's Dice on images that its rules did not learn on, with the 95 % interval of the gain
over the way before it and over "threshold and area"; and what each takes, beside the loops of
public kernels: thresholds times minimum sizes, with connected components for each.
"""

import itertools
import resource
import sys
import time
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
from conftest import KERNEL
from scipy.special import expit, logit
from scipy.stats import norm

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
        masks = KERNEL.split_plane(KERNEL.read_plane(encoded, KERNEL.SUBMISSION_SIZE))
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


def compare(config, labels, setting):
    """Count the maps of a setting, decide in all ways, and print scores and times."""
    counts, probabilities, seconds, shaped_seconds = [], [], 0.0, 0.0
    for maps, masks, presence in simulate(labels, **setting):
        start = time.perf_counter()
        KERNEL.count_pixels(maps, masks)
        middle = time.perf_counter()
        counts.append(KERNEL.count_pixels(maps, masks, shapes=True))
        seconds += middle - start
        shaped_seconds += time.perf_counter() - middle
        probabilities.append(presence)
    (areas, overlaps), presence = np.stack(counts, axis=1), np.stack(probabilities)
    plain, shaped = (1000 * x / presence.size for x in (seconds, shaped_seconds))
    print(f"tables: {plain:.2f} ms a map, {shaped:.2f} with shapes")
    decisions = KERNEL.cross_validate(config, KERNEL.WAYS, areas, overlaps, presence)
    scores = {way: KERNEL.score_decisions(areas, overlaps, x) for way, x in decisions.items()}
    print(KERNEL.compare_ways(scores, config.seed).round(4).to_string())
    random = np.random.default_rng(config.seed)
    for way in list(KERNEL.WAYS)[3:]:
        differences = (scores[way] - scores["threshold and area"]).mean(axis=1)
        gain, low, high = KERNEL.bound_difference(differences, random)
        print(f"{way}, over threshold and area: {gain:+.4f} [{low:+.4f}, {high:+.4f}]")
    for way, learn in KERNEL.WAYS.items():
        start = time.perf_counter()
        decide = learn(config, areas, overlaps, presence)
        middle = time.perf_counter()
        decide(areas, presence)
        end = time.perf_counter()
        tracemalloc.start()
        learn(config, areas, overlaps, presence)(areas, presence)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        times = f"learns in {middle - start:.2f} s, decides in {end - middle:.2f} s"
        print(f"{way}: {times}, {peak:.0f} MiB beyond the tables")


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
            scores[row, column] += KERNEL.dice(truth, predicted) / len(maps)
    return scores


def main(path, images):
    """Print the comparison for each setting, and the time of the loops on eight images."""
    labels = KERNEL.read_labels(path)
    order = np.random.default_rng(0).permutation(len(labels))[:images]
    labels = labels.iloc[order]
    for name, setting in SETTINGS.items():
        print(f"\n{name}: {len(labels)} images, {setting}")
        compare(KERNEL.BEST, labels, setting)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory of all of this: {peak:.2f} GiB")
    few = list(itertools.islice(simulate(labels, **SETTINGS["middle"]), 8))
    maps, masks = (np.stack([example[part][..., 0] for example in few]) for part in (0, 1))
    start = time.perf_counter()
    search_in_loops(maps, masks, range(96, 224, 32), range(0, 20000, 5000))
    cells = (time.perf_counter() - start) / (16 * len(few))
    print(
        f"loops: {1000 * cells:.1f} ms a map and cell, {cells * 100 * 4 * len(labels) / 60:.0f} min"
    )
    print("for a grid of 100 cells on all of these maps (extrapolated from eight)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
