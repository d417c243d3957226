"""Draw a small stand-in for the competition's data, which may not be redistributed.

    python tests/make_sample.py [--train 160] [--test 24] [--seed 0] [--size 256 384]
        [--output tests/sample]

The folder has the competition's layout and formats; its pictures are resized copies, of (height,
width), of what is drawn at 1400 x 2100, at which their masks are encoded. A picture shows dark sea,
sun glint, a black band where the satellite did not pass, and clouds whose texture differs by class
inside boxes. As in the competition, a mask is the union of a class's boxes, less the band, and
boxes of different classes may overlap.
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
        spine = 1 - np.abs(noise(rng, 150, stretch=4.0))
        return ramp(spine + 0.1 * fine, 0.6, 0.8) * ramp(noise(rng, 90), -2.2, -1)
    if name == "Flower":  # large bright discs, each with its dark moat
        return ramp(noise(rng, 170) + 0.22 * noise(rng, 35) + 0.08 * fine, 0.25, 0.75)
    if name == "Gravel":  # a field of grains
        return 0.9 * ramp(noise(rng, 55) + 0.25 * fine, 0.35, 0.95)
    return 0.65 * ramp(noise(rng, 18) + 0.3 * fine, 0.6, 1.4)  # Sugar: a fine dusting


def draw_band(rng):
    """Where the satellite did not pass: a slanted stripe, bool (HEIGHT, WIDTH)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    slope = rng.choice([-1, 1]) * rng.uniform(0.15, 0.3)
    middle = rng.uniform(0.05, 0.95) * WIDTH + slope * (rows - HEIGHT / 2)
    ragged = 4 * (rng.integers(0, 3, HEIGHT // 10).repeat(10))[:, None]
    return np.abs(columns - middle) + ragged < rng.uniform(0.02, 0.06) * WIDTH


def draw_boxes(rng):
    """One or two boxes, bool (HEIGHT, WIDTH): high ones, whose encodings are short."""
    boxes = np.zeros((HEIGHT, WIDTH), bool)
    for _ in range(rng.choice([1, 1, 1, 1, 2])):
        height = int(min(rng.uniform(0.6, 1.4), 1) * HEIGHT)
        width = int(rng.uniform(0.2, 0.4) * WIDTH)
        top, left = rng.integers(0, HEIGHT - height + 1), rng.integers(0, WIDTH - width)
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

    clouds = 0.25 * ramp(noise(rng, 90) + 0.4 * noise(rng, 14), 1.5, 2.5)
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
    """Run-length encoding, column by column, counted from 1; a run may go on in the next column."""
    runs, height = [], len(mask)
    for column, values in enumerate(mask.T):
        ends = np.flatnonzero(np.diff(values.astype(int), prepend=0, append=0)) + column * height
        for start, end in ends.reshape(-1, 2).tolist():
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, end))
    return " ".join(f"{start + 1} {end - start}" for start, end in runs)


def draw_sample(output, train, test, seed, size):
    """Write `train` and `test` pictures and the two CSV files into the folder `output`."""
    for part, count, table in (("train", train, "train"), ("test", test, "sample_submission")):
        (output / f"{part}_images").mkdir(parents=True, exist_ok=True)
        rows = ["Image_Label,EncodedPixels"]
        for number in range(count):
            rng = np.random.default_rng((seed, part == "test", number))
            image = f"{rng.integers(16**7):07x}.jpg"
            picture, masks = draw_picture(rng)
            target = str(output / f"{part}_images" / image)
            picture = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)
            cv2.imwrite(target, picture, [cv2.IMWRITE_JPEG_QUALITY, 60])
            rles = map(encode, masks) if part == "train" else ["1 1"] * len(CLASSES)
            rows += [f"{image}_{name},{rle}" for name, rle in zip(CLASSES, rles)]
        (output / f"{table}.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=160, help="number of training pictures")
    parser.add_argument("--test", type=int, default=24, help="number of test pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 384], help="of the pictures")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "sample")
    arguments = parser.parse_args()
    draw_sample(**vars(arguments) | {"size": tuple(arguments.size)})
