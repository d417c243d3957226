"""Train on real pictures what the notebook does, what others do, and single changes, and score it.

    PYTHONPATH=tests python tests/benchmarks/real.py CLOUDS OUTPUT [--ways best paper popular]
        [--minutes 10] [--seeds 0] [--size 64 96] [--images 500]
        [--encoder efficientnetb0] [--encoder-weights PATH [--relu6]] [--fields JSON]

CLOUDS is a folder of the competition's data, or of resized copies, whose test pictures have their
true rows in test_truth.csv. All train the same encoder for the same time, from random weights or
from those in a file, on four fifths of the training pictures, or on the first `images` of these.
The encoder is half as wide and a third as deep as B0, or another by its name or its coefficients;
with --relu6 its swish is ReLU6. --fields sets single fields of the configuration.
Minutes are those of one processor core, so that other work beside does not count. Rules learn on
the last fifth; scored are the test pictures, and those of the last fifth by rules that learned on
others of them. The ways are

- best: BEST's U-Net for nine tenths of the time, its classifier for one;
- paper: PAPER's U-Net for the whole time, threshold and minimum area for each class;
- popular: the recipe of the competition's popular Keras notebooks: sigmoid, cross-entropy + Dice of
  a whole batch, Adam, whose rate falls where the validation loss stands still, flips, PAPER's
  decoder, threshold and minimum area for each class;
- mirrored: best, whose classifier judges mirror images too;
- started: best, whose classifier starts from the U-Net's encoder;
- alone: best without a classifier, the U-Net for nine tenths of the time;
- plain: best without means of weights;
- head: best's U-Net for the whole time, with presence as a second output of its encoder;
- present, half present: best, whose U-Net's loss weighs absent classes by 0.2, by 0.5;
- batch: best, whose U-Net's Dice loss is of whole batches;
- longer: best, whose classifier has four times as long;
- frozen: alone, whose encoder stays as it is for the first fifth of the time;
- grown: alone, with images of half the height and width for the first half of the time;
- augmented: alone, every copy augmented;
- more: augmented, with scale, shift, brightness and contrast too;
- dropout, smoothed, larger: longer, with dropout of 0.3 before the classifier's last layer, with
  labels of 0.05 and 0.95, with pictures of twice the height and width.

"WAY by dice" and "WAY by last" take the U-Net's weights of the highest validation Dice and the last
ones, of the same training.

Prints for each the Dice by the rule it uses, the average precision of its classifier, and the gain
over the first way, the mean over the seeds with its 95 % interval. OUTPUT keeps what was trained,
where ways that share a network find it, and the scores; other minutes, pictures, sizes or encoders
need another OUTPUT.
"""

import argparse
import json
import shutil
import time
import types
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from conftest import ENCODER, KERNEL

tf = KERNEL.tf
FIELDS = {
    "batch_norm_momentum": 0.95,
    "batch_size": 16,
    "baseline_epochs": 1,
    "classifier_epochs": 5,
    "epochs": 999,
    "learning_rate": 3e-3,
}
CLASSIFIER_SHARE = 0.1
HEAD_WEIGHT = 0.2
KERNEL.time = types.SimpleNamespace(monotonic=time.process_time)
tf.get_logger().setLevel("ERROR")  # no warnings that further networks have graphs of their own


def build_with_head(config, encoder, size):
    """EfficientUNet, and from its encoder's last map the probabilities of presence."""
    unet, layers = KERNEL.build_efficient_unet(config, encoder, size), tf.keras.layers
    part = unet.get_layer(index=2)
    both = tf.keras.Model(part.input, [part.output, part.get_layer("top_activation").output])
    maps, top = both(unet.get_layer(index=1)(unet.input))
    average = layers.GlobalAveragePooling2D(name="average")(top)
    presence = layers.Dense(4, "sigmoid", dtype="float32", name="presence")(average)
    return tf.keras.Model(unet.input, [layers.Activation("sigmoid", name="maps")(maps), presence])


def loss_with_head(config, planes, probabilities):
    """The U-Net's loss of the maps, a share of the classifier's of the presence."""
    if probabilities.shape.rank == 2:
        return HEAD_WEIGHT * KERNEL.classifier_loss(config, planes, probabilities)
    return KERNEL.unet_loss(config, planes, probabilities)


def measure_with_head(config, planes, probabilities):
    """The U-Net's measure of the maps, the classifier's of the presence."""
    measure = KERNEL.accuracy if probabilities.shape.rank == 2 else KERNEL.dice_at_half
    return measure(config, planes, probabilities)


def weigh_absent(config, planes, probabilities, absent_weight):
    """The U-Net's loss, class by class, of absent ones only a share."""
    truth = tf.cast(KERNEL.split_planes(planes), tf.float32)
    entropy = tf.keras.backend.binary_crossentropy(truth, probabilities)
    overlap = tf.reduce_sum(truth * probabilities, axis=(1, 2))
    total_area = tf.reduce_sum(truth + probabilities, axis=(1, 2))
    share, soft_dice = config.cross_entropy_weight, (2 * overlap + 1) / (total_area + 1)
    losses = share * tf.reduce_mean(entropy, axis=(1, 2)) + (1 - share) * (1 - soft_dice)
    present = tf.cast(tf.reduce_any(truth > 0, axis=(1, 2)), tf.float32)
    return tf.reduce_mean((present + absent_weight * (1 - present)) * losses, axis=-1)


def loss_of_present(config, planes, probabilities):
    """The U-Net's loss with a fifth of the weight for absent classes."""
    return weigh_absent(config, planes, probabilities, 0.2)


def loss_of_half_present(config, planes, probabilities):
    """The U-Net's loss with half of the weight for absent classes."""
    return weigh_absent(config, planes, probabilities, 0.5)


def loss_of_batch(config, planes, probabilities):
    """The U-Net's loss, with the Dice coefficients of all pixels of a batch."""
    truth = tf.cast(KERNEL.split_planes(planes), tf.float32)
    entropy = tf.reduce_mean(KERNEL.cross_entropy(config, truth, probabilities), axis=(1, 2))
    overlap = tf.reduce_sum(truth * probabilities, axis=(0, 1, 2))
    total_area = tf.reduce_sum(truth + probabilities, axis=(0, 1, 2))
    share, soft_dice = config.cross_entropy_weight, (2 * overlap + 1) / (total_area + 1)
    return share * entropy + (1 - share) * (1 - tf.reduce_mean(soft_dice))


def build_with_dropout(config, encoder, size):
    """The classifier, with dropout before its last layer."""
    model = KERNEL.build_classifier(config, encoder, size)
    dropped = tf.keras.layers.Dropout(0.3)(model.get_layer("average").output)
    output = model.get_layer("probabilities")(model.get_layer("logits")(dropped))
    return tf.keras.Model(model.input, output)


def loss_of_smoothed(config, planes, probabilities):
    """The classifier's loss, with labels of 0.05 and 0.95."""
    presence = tf.reduce_any(KERNEL.split_planes(planes) > 0, axis=(1, 2))
    truth = 0.05 + 0.9 * tf.cast(presence, tf.float32)
    return KERNEL.cross_entropy(config, truth, probabilities)


def augment_all(count, epoch, seed):
    """plan_epoch, whose copies are all augmented."""
    generator = np.random.default_rng((seed, epoch))
    draws = generator.integers(2**31, size=2 * count)
    return generator.permutation(np.column_stack([np.tile(np.arange(count), 2), draws]))


def augment_more(config, draw):
    """make_augmentation, with scale, shift, brightness and contrast."""
    transforms, chance = KERNEL.albumentations, config.augmentation_probability
    flips = [transforms.HorizontalFlip(p=chance), transforms.VerticalFlip(p=chance)]
    turn = (-config.rotation_limit, config.rotation_limit)
    own = {"scale": (0.8, 1.25), "translate_percent": (-0.1, 0.1), "rotate": turn, "p": 0.8}
    others = transforms.Affine(**own), transforms.GridDistortion(p=0.3)
    compose = transforms.Compose([*flips, *others, transforms.RandomBrightnessContrast(p=chance)])
    compose.set_random_state(np.random.default_rng(draw), KERNEL.random.Random(draw))
    return compose


def fit_decoder_first(config, network, pictures, schedule, fit=KERNEL.fit):
    """fit, after a fifth of the time in which the encoder stays as it is."""
    encoder = KERNEL.build_classifier(config, network.encoder, network.size).get_layer(index=2)
    part = network.model.get_layer(index=2)
    layers = [part.get_layer(layer.name) for layer in encoder.layers[1:]]
    now = time.process_time()
    first = KERNEL.Schedule(config, network, now + (schedule.deadline - now) / 5)
    for trained, planned in ((False, first), (True, schedule)):
        for file in network.folder.glob("[!s]*"):
            file.unlink()  # the history and the weights: the training begins anew
        shutil.rmtree(network.folder / "state", ignore_errors=True)
        for layer in layers:
            layer.trainable = trained
        fit(config, network, pictures, planned)


def fit_smaller_first(config, network, pictures, schedule, fit=KERNEL.fit):
    """fit, after half of the time with images of half the height and width."""
    size, folder = tuple(side // 2 for side in network.size), network.folder / "smaller"
    folder.mkdir(exist_ok=True)
    smaller = replace(network, size=size, folder=folder)
    smaller = replace(smaller, model=network.build(config, network.encoder, size))
    now = time.process_time()
    first = KERNEL.Schedule(config, smaller, now + (schedule.deadline - now) / 2)
    fit(config, smaller, pictures, first)
    smaller.model.load_weights(folder / "weights.h5")
    network.model.set_weights(smaller.model.get_weights())
    fit(config, network, pictures, schedule)


class KeepAll(KERNEL.KeepBest):
    """Keep the weights of the highest validation Dice and the last ones too."""

    highest = -1

    def on_epoch_end(self, epoch, logs=None):
        """Keep what was validated."""
        self.model.save_weights(self.folder / "last.h5")
        if logs.get("val_dice_at_half", -2) > self.highest:
            self.highest = logs["val_dice_at_half"]
            self.model.save_weights(self.folder / "dice.h5")
        super().on_epoch_end(epoch, logs)


KERNEL.KeepBest = KeepAll
PATCHES = {  # of the notebook's functions, in ways that are alone but for them
    "frozen": {"fit": fit_decoder_first},
    "grown": {"fit": fit_smaller_first},
    "augmented": {"plan_epoch": augment_all},
    "more": {"plan_epoch": augment_all, "make_augmentation": augment_more},
}
UNETS = {  # what is other in a way's U-Net
    "head": {"build": build_with_head, "loss": loss_with_head, "measure": measure_with_head},
    "present": {"loss": loss_of_present},
    "half present": {"loss": loss_of_half_present},
    "batch": {"loss": loss_of_batch},
}
LONGER = {  # in the baseline and the classifier of those that train it for longer
    "longer": {},
    "dropout": {"build": build_with_dropout},
    "smoothed": {"loss": loss_of_smoothed},
    "larger": {},
}


def write_encoder(config, unet, path):
    """Write the weights of a U-Net's encoder as initial weights of another network."""
    encoder = KERNEL.build_classifier(config, unet.encoder, unet.size).get_layer(index=2)
    for layer in (layer for layer in encoder.layers if layer.weights):
        layer.set_weights(unet.model.get_layer(index=2).get_layer(layer.name).get_weights())
    encoder.save_weights(path)


def mirror(model):
    """The mean of a classifier's probabilities over an image and its mirror images."""
    views = [model(tf.reverse(model.input, turn)) for turn in ([], [1], [2], [1, 2])]
    return tf.keras.Model(model.input, tf.add_n(views) / len(views))


def train_popular(config, unet, pictures, deadline, path):
    """The popular recipe; keeps the weights of the lowest validation loss in a file."""
    model = unet.build(config, unet.encoder, unet.size)

    def read(part):
        rows = (row for _, row in part.iterrows())
        examples = zip(*(KERNEL.load_example(config, row, unet.size) for row in rows))
        return tf.data.Dataset.from_tensor_slices(tuple(map(np.stack, examples)))

    def split(image, plane):
        return image, tf.cast(KERNEL.split_planes(plane), tf.float32)

    def flip(image, plane):
        both = tf.concat([image, plane[..., None]], axis=-1)
        both = tf.image.random_flip_up_down(tf.image.random_flip_left_right(both))
        return split(both[..., :3], both[..., 3])

    def end(batch, logs):
        model.stop_training |= time.process_time() > deadline

    held_out = pictures["fold"] == unet.fold
    training = read(pictures[~held_out]).shuffle(10**5).map(flip).batch(unet.batch_size)
    validation = read(pictures[held_out]).map(split).batch(unet.batch_size)
    loss = KERNEL.segmentation_models.losses.bce_dice_loss
    model.compile(tf.keras.optimizers.legacy.Adam(1e-3), loss)
    callbacks = [
        tf.keras.callbacks.LambdaCallback(on_train_batch_end=end),
        tf.keras.callbacks.ReduceLROnPlateau(patience=3),
        tf.keras.callbacks.ModelCheckpoint(path, save_best_only=True, save_weights_only=True),
    ]
    model.fit(training, validation_data=validation, epochs=999, callbacks=callbacks, verbose=2)
    model.load_weights(path)
    return replace(unet, model=model)


def train(config, network, pictures, output, end, kept="weights"):
    """A network that is trained until `end`, or as another way has trained it.

    `kept` names the file of the weights to take.
    """
    network = replace(network, folder=KERNEL.choose_folder(config, network, pictures, output))
    if not (done := network.folder / "done").exists():
        held_out = (pictures["fold"] == network.fold).sum()
        KERNEL.tf.keras.utils.set_random_seed(config.seed)
        network = KERNEL.build_network(config, network, network.start)
        KERNEL.fit(config, network, pictures, KERNEL.Schedule(config, network, end, held_out))
        done.touch()  # also if the clock has ended it
    weights = network.folder / f"{kept}.h5"
    return KERNEL.build_network(config, network, weights)


def run(way, seed, args):
    """Train one way and score it on the held-out and on the test pictures; see run_way."""
    way, _, kept = way.partition(" by ")
    if way not in PATCHES:
        return run_way(way, seed, args, kept or "weights")
    own = argparse.Namespace(**vars(args) | {"output": args.output / way})
    (own.output / "networks").mkdir(parents=True, exist_ok=True)
    with mock.patch.multiple(KERNEL, **PATCHES[way]):
        return run_way("alone", seed, own, kept or "weights")


def run_way(way, seed, args, kept):
    """Train one way, with the notebook as it is now, and score it.

    Returns their Dice, and the probabilities and the truth of presence: (pictures, classes) each.
    """
    whole, size = 60 * args.minutes, tuple(args.size)
    own = FIELDS | {"encoder_weights": args.encoder_weights, "seed": seed, "image_size": size}
    own |= {"hours": args.minutes / 60, "classifier_size": size}
    if way == "popular":
        own |= {"flips": False, "decision": "threshold and area"}
        own["decoder_filters"] = KERNEL.PAPER.decoder_filters
    own |= {"averaging": False} if way == "plain" else {}
    own |= {"classifier_epochs": 50} if way in LONGER else {}
    own |= {"classifier_size": tuple(2 * side for side in size)} if way == "larger" else {}
    config = replace(KERNEL.PAPER if way == "paper" else KERNEL.BEST, **own)
    tables = []
    for name, folder in (("train.csv", "train_images"), ("test_truth.csv", "test_images")):
        labels = KERNEL.read_labels(args.source / name)
        tables.append(labels.assign(path=[args.source / folder / image for image in labels.index]))
    folds = KERNEL.assign_folds(tables[0], 5, 0)
    held_out, others = tables[0][folds == 0], tables[0][folds != 0][: args.images]
    pictures = pd.concat([held_out, others]).assign(fold=folds)
    judged = pd.concat([held_out, tables[1]])
    presence = np.full((len(judged), 4), 0.5)

    encoder = args.encoder[0] if len(args.encoder) == 1 else tuple(map(float, args.encoder))
    parts = KERNEL.build_efficient_unet, KERNEL.unet_loss, KERNEL.dice_at_half
    unet = KERNEL.Network("U-Net", encoder, 0, KERNEL.UNetConfig, size, config.epochs, *parts)
    unet = replace(unet, batch_size=config.batch_size, **UNETS.get(way, {}))
    start = time.process_time()
    tf.keras.utils.set_random_seed(seed)
    if way == "popular":
        path = args.output / f"popular-{seed}.h5"
        unet = train_popular(config, unet, pictures, start + whole, path)
    else:
        share = 1 if way in ("paper", "head") else 1 - CLASSIFIER_SHARE
        unet = train(config, unet, pictures, args.output, start + whole * share, kept)
    if way == "head":
        maps, found = (tf.keras.Model(unet.model.input, output) for output in unet.model.outputs)
        presence = KERNEL.predict_presence(replace(unet, model=found), judged).to_numpy()
        unet = replace(unet, model=maps)
    elif way not in ("paper", "popular", "alone"):
        if way == "started":
            path = args.output / f"encoder-{seed}.h5"
            write_encoder(config, unet, path)
            config = replace(config, encoder_weights=str(path))
        share = CLASSIFIER_SHARE * (4 if way in LONGER else 1)
        shared = pictures, args.output, time.process_time() + whole * share
        own = {"kind": "baseline", "shape": KERNEL.NetworkConfig, "size": config.classifier_size}
        own |= {"build": KERNEL.build_classifier, "loss": KERNEL.classifier_loss}
        own |= {"measure": KERNEL.accuracy, "epochs": config.baseline_epochs, "model": None}
        baseline = train(config, replace(unet, **own | LONGER.get(way, {})), *shared)
        own = {"kind": "classifier", "epochs": config.classifier_epochs}
        own["start"] = baseline.folder / "weights.h5"
        classifier = train(config, replace(baseline, **own), *shared)
        if way == "mirrored":
            classifier = replace(classifier, model=mirror(classifier.model))
        presence = KERNEL.predict_presence(classifier, judged).to_numpy()
    predictor = replace(unet, model=KERNEL.build_predictor(unet.model, config.flips))
    areas, overlaps = KERNEL.count_validation([predictor], judged)[-1]
    count, decide = len(held_out), KERNEL.WAYS[config.decision]
    known = config, areas[:count], overlaps[:count], presence[:count]
    decided = [KERNEL.cross_decide(decide, *known)]
    decided.append(decide(*known)(areas[count:], presence[count:]))
    scores = KERNEL.score_decisions(areas, overlaps, np.concatenate(decided))
    return scores, presence, (judged[KERNEL.CLASSES] != "").to_numpy()


def main():
    """Print the scores and the gains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ways", nargs="+", default=["best", "paper", "popular"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, nargs=2, default=[64, 96])
    parser.add_argument("--images", type=int)
    parser.add_argument("--encoder", nargs="+", default=ENCODER)
    parser.add_argument("--encoder-weights")
    parser.add_argument("--relu6", action="store_true")
    parser.add_argument("--fields", type=json.loads, default={})
    args, scores = parser.parse_args(), {}
    FIELDS.update(args.fields)
    if args.relu6:
        KERNEL.efficientnet.model.get_swish = lambda **modules: tf.nn.relu6
    (args.output / "networks").mkdir(parents=True, exist_ok=True)
    for way in args.ways:
        for seed in args.seeds:
            path = args.output / f"{way}-{seed}.npz"
            if not path.exists():
                np.savez(path, *run(way, seed, args))
            score, presence, truth = np.load(path).values()
            scores.setdefault(way, []).append(score)
            average = KERNEL.metrics.average_precision_score(truth, presence, average=None)
            text = f"{way}, seed {seed}: Dice {score.mean():.4f}, average precision"
            print(text, f"{average.mean():.3f} {average.round(3)}", flush=True)
        gains = np.mean(scores[way], axis=0) - np.mean(scores[args.ways[0]], axis=0)
        options = {"method": "percentile", "n_resamples": 2000, "random_state": 0}
        interval = KERNEL.stats.bootstrap([gains.mean(axis=1)], np.mean, **options)
        text = "{:+.4f} [{:+.4f}, {:+.4f}]".format(gains.mean(), *interval.confidence_interval)
        print(f"{way}: {text}", flush=True)


if __name__ == "__main__":
    main()
