"""Split the images deals them into folds that are alike, and refuses too few of them."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st


@given(
    combinations=st.lists(st.integers(0, 15), min_size=1, max_size=80),
    folds=st.integers(2, 6),
    seed=st.integers(0, 3),
)
def test_every_combination_is_spread_evenly_over_the_folds(kernel, combinations, folds, seed):
    present = np.array([[c >> bit & 1 for bit in range(4)] for c in combinations])
    labels = pd.DataFrame(np.where(present, "1 1", ""), columns=kernel.CLASSES)
    assigned = kernel.assign_folds(labels, folds, seed)
    assert assigned.index.equals(labels.index) and assigned.between(0, folds - 1).all()
    for members in [assigned, *(group for _, group in assigned.groupby(combinations))]:
        sizes = np.bincount(members, minlength=folds)
        assert sizes.max() - sizes.min() <= 1


def test_folds_depend_on_the_seed_alone(kernel, labels):
    many = pd.concat([labels] * 20, ignore_index=True)
    first, again, other = (kernel.assign_folds(many, 5, seed) for seed in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)


def test_a_first_try_takes_a_few_images_and_says_so(source, begin, warnings):
    found = begin(image_limit=3, folds=2, held_out=[0])
    assert len(found["labels"]) == len(found["present"]) == len(found["folds"]) == 3
    assert len(found["test_images"][0]) == 3
    assert list(warnings.values()) == ["Only 3 training and 3 test images."]


def test_too_few_images_for_the_folds_are_refused(begin):
    assert len(begin(folds=11, held_out=[0])["folds"]) == 12
    with pytest.raises(ValueError, match="Too few: 12 for 11 folds, 4 to test"):
        begin(folds=11, held_out=[0, 1])
