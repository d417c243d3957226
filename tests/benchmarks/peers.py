"""Compare BEST with the paper's way and with that of popular notebooks, on the same pictures.

    PYTHONPATH=tests python tests/benchmarks/peers.py CLOUDS OUTPUT [MINUTES [SEED ...]]

CLOUDS is a folder of the competition's data, or of resized copies, whose test pictures have their
true rows in test_truth.csv. All train the same encoder from random weights at 64 x 96 for the same
MINUTES (10), on four fifths of the training pictures; their rules learn on the last fifth, and they
are scored on the test pictures.

- paper: PAPER's U-Net for the whole time, threshold and minimum area for each class.
- popular: the recipe of the competition's popular Keras notebooks: sigmoid, cross-entropy + Dice of
  a whole batch, Adam, whose rate falls where the validation loss stands still, flips, threshold and
  minimum area for each class.
- best: BEST's U-Net for three quarters of the time, its classifier for one, as in the notebook.

Prints each way's Dice for each seed, and the gains of BEST with their 95 % intervals. OUTPUT keeps
what was trained, which is not trained again.
"""

import functools
import sys
import time
from pathlib import Path

import numpy as np
from conftest import KERNEL

tf = KERNEL.tf

SIZE = (64, 96)
ENCODER = (0.5, 0.3)
FIELDS = {
    "encoders": (ENCODER,),
    "encoder_weights": None,
    "image_size": SIZE,
    "classifier_size": SIZE,
    "precision": "float32",
    "batch_norm_momentum": 0.95,
    "batch_size": 16,
    "classifier_batch_size": 16,
    "classifier_epochs": (1, 5),
    "learning_rate": 3e-3,
}


def train_popular(config, parts, deadline, path):
    """The popular recipe; keeps the weights of the lowest validation loss in a file."""
    model = KERNEL.build_efficient_unet(config, ENCODER, SIZE)
    if path.exists():
        model.load_weights(path)
        return model

    def read(images):
        batches = [*KERNEL.make_dataset(config, SIZE, 1, *images)]
        return tf.data.Dataset.from_tensor_slices(
            tuple(np.concatenate([batch[part] for batch in batches]) for part in (0, 1))
        )

    def flip(image, plane):
        both = tf.concat([image, plane[..., None]], axis=-1)
        both = tf.image.random_flip_up_down(tf.image.random_flip_left_right(both))
        return both[..., :3], tf.cast(KERNEL.split_planes(both[..., 3]), tf.float32)

    def end(batch, logs):
        model.stop_training |= time.monotonic() > deadline

    training, validation = (read(images).cache() for images in parts)
    training = training.shuffle(10**5).map(flip).batch(config.batch_size)
    validation = validation.map(flip).batch(config.batch_size)
    loss = KERNEL.segmentation_models.losses.bce_dice_loss
    model.compile(tf.keras.optimizers.legacy.Adam(1e-3), loss)
    callbacks = [
        tf.keras.callbacks.LambdaCallback(on_train_batch_end=end),
        tf.keras.callbacks.ReduceLROnPlateau(patience=3),
        tf.keras.callbacks.ModelCheckpoint(path, save_best_only=True, save_weights_only=True),
    ]
    model.fit(training, validation_data=validation, epochs=999, callbacks=callbacks, verbose=2)
    model.load_weights(path)
    return model


def train_ours(config, network, parts, labels, deadline, output, begin=None):
    """A network of the notebook's; its Training."""
    shared = labels, 1, 1000.0, output
    training = KERNEL.plan_training(config, network, ENCODER, 0, *shared)
    strategy = tf.distribute.get_strategy()
    KERNEL.train(strategy, config, training, parts, deadline, 0, begin)
    return training


def run(way, seed, source, output, minutes):
    """Train one way and score it: the Dice of the test pictures, float (images, classes)."""
    preset = KERNEL.PAPER if way == "paper" else KERNEL.BEST
    own = {"epochs": 999, "seed": seed, "hours": minutes / 60, **FIELDS}
    own |= {"flips": False, "decision": "threshold and area"} if way == "popular" else {}
    config = KERNEL.replace(preset, **own)
    labels, truth = (KERNEL.read_labels(source / name) for name in ("train.csv", "test_truth.csv"))
    folds = KERNEL.assign_folds(labels, 5, 0)
    parts = KERNEL.split_images(labels, folds, source / "train_images", 0)
    tests = [source / "test_images" / name for name in truth.index], truth
    folder = output / f"{way}-{seed}"
    (folder / "members").mkdir(parents=True, exist_ok=True)
    start, strategy = time.monotonic(), tf.distribute.get_strategy()
    tf.keras.utils.set_random_seed(seed)
    plan = functools.partial(train_ours, config)
    presence = [np.full((len(rows), 4), 0.5) for _, rows in (parts[1], tests)]
    training = KERNEL.Training("", "unet", ENCODER, 0, SIZE, 16, 1, folder)
    if way == "popular":
        unet = train_popular(config, parts, start + 60 * minutes, folder / "weights.h5")
    else:
        share = 0.75 if way == "best" else 1
        training = plan("unet", parts, labels, start + 60 * minutes * share, folder)
        unet = KERNEL.load_network(config, training)
    if way == "best":
        end = time.monotonic() + 60 * minutes / 4
        baseline = plan("baseline", parts, labels, end, folder)
        classifier = plan("classifier", parts, labels, end, folder, baseline)
        presence = [
            KERNEL.predict_presence(strategy, config, classifier, *images).to_numpy()
            for images in (parts[1], tests)
        ]
    predictors = [(training, KERNEL.build_predictor(unet, config.flips))]
    known, new = (KERNEL.count_validation(config, predictors, *x)[-1] for x in (parts[1], tests))
    decide = KERNEL.WAYS[config.decision](config, *known, presence[0])
    return KERNEL.score_decisions(*new, decide(new[0], presence[1]))


def main(source, output, minutes=10, *seeds):
    """Print the scores and the gains."""
    source, output, scores = Path(source), Path(output), {}
    for seed in [int(seed) for seed in seeds] or [0]:
        for way in ("paper", "popular", "best"):
            path = output / f"{way}-{seed}.npy"
            if not path.exists():
                np.save(path, run(way, seed, source, output, float(minutes)))
            scores.setdefault(way, []).append(np.load(path))
            print(f"{way}, seed {seed}: Dice {scores[way][-1].mean():.4f}", flush=True)
    means = {way: np.mean(several, axis=0) for way, several in scores.items()}
    for way in ("paper", "popular"):
        gain, *interval = KERNEL.bound_difference(means["best"], means[way], 0)
        print("best over {}: {:+.4f} [{:+.4f}, {:+.4f}]".format(way, gain, *interval))


if __name__ == "__main__":
    main(*sys.argv[1:])
