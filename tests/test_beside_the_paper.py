"""Beside the paper has the paper's tables."""

import pytest


@pytest.mark.parametrize(
    ("row", "encoder", "value"),
    [
        ("I: baseline accuracy", "efficientnetb0", 0.670),
        ("I: fine-tuned accuracy", "efficientnetb5", 0.732),
        ("II: Dice, cross-validation", "efficientnetb1", 0.6423),
        ("II: Dice, private leaderboard", "efficientnetb3", 0.64585),
        ("III: Dice, private leaderboard", "efficientnetb0", 0.6611),
        ("III: Dice, cross-validation", "efficientnetb2", 0.6589),
    ],
)
def test_the_paper_s_tables_are_as_they_are_printed(kernel, row, encoder, value):
    assert kernel.PAPER_TABLES.loc[encoder, row] == value
