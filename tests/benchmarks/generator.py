"""Time the generator beside its floor, the decoding of the JPEG files alone.

PYTHONPATH=tests python tests/benchmarks/generator.py INPUT_FOLDER [EXAMPLES]
"""

import itertools
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from conftest import KERNEL

FLAGS = {(1312, 2080): cv2.IMREAD_COLOR, (320, 480): cv2.IMREAD_REDUCED_COLOR_4}


def measure_decoding(paths, flag, examples):
    """Milliseconds to decode an image from memory, nothing else."""
    files = [np.fromfile(path, np.uint8) for path in paths]
    start = time.perf_counter()
    for index in range(examples):
        cv2.imdecode(files[index % len(files)], flag)
    return 1000 * (time.perf_counter() - start) / examples


def measure_dataset(config, paths, labels, cache, examples):
    """Milliseconds for a training example, after two epochs to warm up."""
    iterator = iter(KERNEL.make_dataset(config, paths, labels, 0, cache))
    for _ in range(4 * len(paths)):
        next(iterator)
    start = time.perf_counter()
    for _ in itertools.islice(iterator, examples):
        pass
    return 1000 * (time.perf_counter() - start) / examples


def main(folder, examples):
    """Print the floor and the generator at both sizes, with one and two threads."""
    labels = KERNEL.read_labels(folder / "train.csv")
    paths = [folder / "train_images" / name for name in labels.index]
    cv2.setNumThreads(1)
    for threads in (1, 2):
        start = time.perf_counter()
        assert not KERNEL.find_faults(paths[0].parent, [path.name for path in paths] * 10, threads)
        each = 100 * (time.perf_counter() - start) / len(paths)
        print(f"{each:.1f} ms to look for a fault in an image, {threads} threads")
    for size, flag in FLAGS.items():
        config = KERNEL.replace(KERNEL.PAPER, batch_size=1, image_size=size)
        floor = measure_decoding(paths, flag, examples)
        print(f"{size}: {floor:.1f} ms to decode an image")
        kinds = {
            "half of the examples augmented": (config, None),
            "the same with all four transforms in every copy": (
                KERNEL.replace(config, augmentation_probability=1.0),
                None,
            ),
            "half augmented, decoded images in memory": (config, {}),
        }
        for kind, (config, cache) in kinds.items():
            times = []
            for threads in (1, 2):
                threaded = KERNEL.replace(config, threads=threads)
                times.append(measure_dataset(threaded, paths, labels, cache, examples))
            print(
                f"  {kind}: {times[0]:.1f} ms on one thread, {times[0] / floor:.2f} x decoding; "
                f"{times[1]:.1f} ms on two, {times[0] / times[1]:.2f} x the rate"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
