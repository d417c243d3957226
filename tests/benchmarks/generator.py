"""Time the generator at full size beside its floor, the decoding of the JPEG files alone.

PYTHONPATH=tests python tests/benchmarks/generator.py INPUT_FOLDER [EXAMPLES]
"""

import itertools
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from conftest import KERNEL


def milliseconds(examples, dataset):
    """The time per example of a dataset of single examples, after four to warm up."""
    iterator = iter(dataset)
    for _ in range(4):
        next(iterator)
    start = time.perf_counter()
    for _ in itertools.islice(iterator, examples):
        pass
    return 1000 * (time.perf_counter() - start) / examples


def main(folder, examples):
    """Print the floor, and the generator with one and two threads."""
    labels = KERNEL.read_labels(folder / "train.csv")
    paths = [folder / "train_images" / name for name in labels.index]
    cv2.setNumThreads(1)
    files = [np.fromfile(path, np.uint8) for path in paths]
    start = time.perf_counter()
    for index in range(examples):
        cv2.imdecode(files[index % len(files)], cv2.IMREAD_COLOR)
    floor = 1000 * (time.perf_counter() - start) / examples
    print(f"{'JPEG decoding alone':42} {floor:6.1f} ms an image")

    epoch = KERNEL.replace(KERNEL.PAPER, batch_size=1)
    kinds = {
        "a training epoch": epoch,
        "the same, all four in every copy": KERNEL.replace(epoch, augmentation_probability=1.0),
    }
    for kind, config in kinds.items():
        single = 0.0
        for threads in (1, 2):
            config = KERNEL.replace(config, threads=threads)
            time_each = milliseconds(
                examples, KERNEL.make_dataset(config, paths, labels, training=True)
            )
            single = single or time_each
            ratios = (
                f"{time_each / floor:.2f} x floor, {single / time_each:.2f} x one thread's rate"
            )
            print(f"{f'{kind}, threads: {threads}':42} {time_each:6.1f} ms an example, {ratios}")

    config = KERNEL.replace(epoch, augmentation_probability=1.0)
    start = time.perf_counter()
    for index in range(examples):
        index %= len(paths)
        KERNEL.load_example(config, paths[index], labels.iloc[index], draw=index)
    each = 1000 * (time.perf_counter() - start) / examples
    print(f"{'only copies with all four, threads: 1':42} {each:6.1f} ms an example")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
