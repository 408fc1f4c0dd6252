"""Class names: an exact name is never lost to another class's synonym, and what is ambiguous is refused."""

from __future__ import annotations

import numpy as np
import pytest

from pyard.conditions import ClassConditions
from pyard.errors import InputError

# Of ImageNet: the second synonym of class 0 is the whole name of class 1, and "crane" names two.
NAMES = ["tank suit, maillot", "maillot", "crane", "crane", "Polish", "polish", "ram, tup", "tup, sheep"]


@pytest.mark.parametrize(
    ("label", "number"),
    [("maillot", 1), ("tank suit", 0), ("tank suit, maillot", 0), ("MAILLOT", 1), ("Polish", 4), ("polish", 5), ("sheep", 7)],
)
def test_a_whole_name_comes_before_a_synonym_and_an_exact_one_before_other_letters(label, number):
    assert ClassConditions(len(NAMES), NAMES).find([label]) == [number]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("crane", r"'crane' is the name of several classes: 2 \(crane\), 3 \(crane\); give a number"),
        ("tup", r"'tup' is the name of several classes: 6 \(ram, tup\), 7 \(tup, sheep\)"),
        ("suit", "no class is named 'suit'; near: tank suit, maillot"),
        (1.0, "label is 1.0; expected a whole number"),
        (True, "label is True; expected a whole number"),
        (8, "label is 8; expected 0 to 7"),
    ],
)
def test_names_of_several_classes_and_what_is_no_label_are_refused(label, message):
    with pytest.raises(InputError, match=message):
        ClassConditions(len(NAMES), NAMES).find(["maillot", label])


def test_names_and_numbers_of_any_kind_may_be_mixed():
    assert ClassConditions(len(NAMES), NAMES).find(["maillot", np.uint8(3), 4]) == [1, 3, 4]
