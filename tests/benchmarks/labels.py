"""Read, decode and encode every row of a train.csv, and time it beside a decoder with a loop.

PYTHONPATH=tests python tests/benchmarks/labels.py TRAIN_CSV
"""

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from conftest import KERNEL


def decode_by_run(rle, size):
    """The decoder of many public kernels: a slice assignment for each run."""
    mask = np.zeros(size[0] * size[1], np.uint8)
    numbers = np.asarray(rle.split(), int)
    for start, length in zip(numbers[::2] - 1, numbers[1::2]):
        mask[start : start + length] = 1
    return mask.reshape(size[::-1]).T


def main(path):
    """Check every row and print the milliseconds per mask of each step."""
    start = time.perf_counter()
    labels = KERNEL.read_labels(path)
    print(f"{labels.size:,} rows read and checked in {time.perf_counter() - start:.1f} s")
    original = pd.read_csv(path, keep_default_na=False).set_index("Image_Label")["EncodedPixels"]

    seconds = {"decode": 0.0, "decode run by run": 0.0, "encode": 0.0}
    differ, masks = 0, 0
    for label, rle in original.items():
        image, _, name = label.rpartition("_")
        marks = [time.perf_counter()]
        mask = KERNEL.decode_rle(labels.at[image, name], KERNEL.ORIGINAL_SIZE)
        marks.append(time.perf_counter())
        reference = decode_by_run(rle, KERNEL.ORIGINAL_SIZE)
        marks.append(time.perf_counter())
        encoded = KERNEL.encode_rle(mask)
        marks.append(time.perf_counter())
        differ += encoded != rle or not np.array_equal(mask.T, reference.T)
        if rle:
            masks += 1
            for step, duration in zip(seconds, np.diff(marks)):
                seconds[step] += duration
    print(f"{len(original):,} rows decoded and encoded again, {differ} differ; {masks:,} not empty")
    for step, duration in seconds.items():
        print(f"{step:18} {1000 * duration / masks:6.2f} ms a mask")
    print(f"run by run / ours  {seconds['decode run by run'] / seconds['decode']:6.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
