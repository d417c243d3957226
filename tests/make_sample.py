"""Draw a small stand-in for the competition's data, which may not be redistributed.

    python tests/make_sample.py [--train 12] [--test 4] [--seed 0] [--output tests/sample]

The folder has the competition's layout and formats. A picture shows dark sea, sun glint, a black
band where the satellite did not pass, and clouds whose texture differs by class inside boxes. As
in the competition, a mask is the union of a class's boxes, less the band, and boxes of different
classes may overlap. `test_truth.csv`, which the competition does not have, holds the labels of
the test pictures.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
FREQUENCIES = (0.501, 0.426, 0.530, 0.676)  # of the classes in the competition's labels
HEIGHT, WIDTH = 1400, 2100


def noise(rng, cell, stretch=1.0):
    """Smooth noise, float32 (HEIGHT, WIDTH) with mean 0 and deviation 1.

    `cell` is the size of its features in pixels, `stretch` how much wider than high they are.
    """
    rows, columns = max(2, round(HEIGHT / cell)), max(2, round(WIDTH / (cell * stretch)))
    coarse = rng.standard_normal((rows, columns)).astype(np.float32)
    smooth = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return (smooth - smooth.mean()) / smooth.std()


def ramp(values, low, high):
    """0 below `low`, 1 above `high`, linear between them."""
    return np.clip((values - low) / (high - low), 0, 1)


def draw_texture(rng, name):
    """The brightness of one class's clouds over the whole picture, float32 0..1."""
    fine = noise(rng, 9)
    if name == "Fish":  # bones: long bright filaments with wide clear water between them
        spine = 1 - np.abs(noise(rng, 150, stretch=3.0))
        return ramp(spine + 0.25 * fine, 0.62, 1.05) * ramp(noise(rng, 40), -1.2, 0.4)
    if name == "Flower":  # large bright discs, each with its dark moat
        return ramp(noise(rng, 190) + 0.22 * noise(rng, 35) + 0.08 * fine, 0.25, 0.75)
    if name == "Gravel":  # a field of grains
        return 0.9 * ramp(noise(rng, 55) + 0.25 * fine, 0.35, 0.95)
    return 0.55 * ramp(noise(rng, 16) + 0.3 * fine, 0.7, 1.6)  # Sugar: a fine dusting


def draw_band(rng):
    """Where the satellite did not pass: a slanted stripe, bool (HEIGHT, WIDTH)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    slope = rng.choice([-1, 1]) * rng.uniform(0.15, 0.3)
    middle = rng.uniform(0.05, 0.95) * WIDTH + slope * (rows - HEIGHT / 2)
    ragged = 4 * (rng.integers(0, 3, HEIGHT // 10).repeat(10))[:, None]
    return np.abs(columns - middle) + ragged < rng.uniform(0.02, 0.06) * WIDTH


def draw_boxes(rng):
    """The union of one or two boxes, bool (HEIGHT, WIDTH)."""
    boxes = np.zeros((HEIGHT, WIDTH), bool)
    for _ in range(rng.integers(1, 3)):
        height, width = (rng.uniform(0.35, 0.7, 2) * (HEIGHT, WIDTH)).astype(int)
        top, left = rng.integers(0, HEIGHT - height), rng.integers(0, WIDTH - width)
        boxes[top : top + height, left : left + width] = True
    return boxes


def draw_picture(rng):
    """One picture, uint8 BGR (HEIGHT, WIDTH, 3), and its masks, bool (4, HEIGHT, WIDTH)."""
    present = rng.random(4) < FREQUENCIES
    present[rng.integers(4)] |= not present.any()
    band = draw_band(rng)
    masks = np.stack(
        [draw_boxes(rng) & ~band if there else np.zeros_like(band) for there in present]
    )

    clouds = 0.35 * ramp(noise(rng, 90) + 0.4 * noise(rng, 14), 1.5, 2.5)
    for name, mask in zip(CLASSES, masks):
        if mask.any():
            edge = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 15)
            clouds = np.maximum(clouds, edge * draw_texture(rng, name))
    glint = np.exp(-(((np.arange(WIDTH) / WIDTH - rng.uniform()) / rng.uniform(0.06, 0.12)) ** 2))
    sea = 1 + 0.08 * noise(rng, 400)[..., None]
    sea = sea * np.array([52, 36, 22]) + rng.uniform(0, 75) * glint[:, None]
    picture = sea + clouds[..., None] * (235 - sea)
    picture[band] = 0
    return np.clip(picture, 0, 255).astype(np.uint8), masks


def encode(mask):
    """Run-length encoding, column by column, counted from 1; written run by run."""
    runs, start = [], None
    for position, value in enumerate([*mask.T.ravel().tolist(), 0], start=1):
        if value and start is None:
            start = position
        elif not value and start is not None:
            runs.append(f"{start} {position - start}")
            start = None
    return " ".join(runs)


def draw_sample(output, train, test, seed):
    """Write `train` and `test` pictures and the three CSV files into the folder `output`."""
    for part, count, table in (("train", train, "train.csv"), ("test", test, "test_truth.csv")):
        (output / f"{part}_images").mkdir(parents=True, exist_ok=True)
        rows, empty_rows = ["Image_Label,EncodedPixels"], ["Image_Label,EncodedPixels"]
        for number in range(count):
            rng = np.random.default_rng((seed, part == "test", number))
            image = f"{rng.integers(16**7):07x}.jpg"
            picture, masks = draw_picture(rng)
            target = str(output / f"{part}_images" / image)
            cv2.imwrite(target, picture, [cv2.IMWRITE_JPEG_QUALITY, 85])
            rows += [f"{image}_{name},{encode(mask)}" for name, mask in zip(CLASSES, masks)]
            empty_rows += [f"{image}_{name},1 1" for name in CLASSES]
        (output / table).write_text("\n".join(rows) + "\n")
        if part == "test":
            (output / "sample_submission.csv").write_text("\n".join(empty_rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=12, help="number of training pictures")
    parser.add_argument("--test", type=int, default=4, help="number of test pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "sample")
    arguments = parser.parse_args()
    draw_sample(arguments.output, arguments.train, arguments.test, arguments.seed)
