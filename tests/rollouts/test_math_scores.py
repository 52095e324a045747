import pytest

from rewarm.rollouts.math_scores import LONGEST
from rewarm.rollouts.rewards import math_verify

package = pytest.importorskip("math_verify")

TEXTS = [
    r"\boxed{\frac{3}{4}}",
    "0.75",
    "the answer is 3/4",
    r"$x = \frac{6}{8}$",
    "75%",
    "4/3",
    "",
    r"\boxed{",
    "$$",
]


def test_texts_are_judged_as_the_package_judges_them():
    gold = package.parse(r"\boxed{\frac{3}{4}}", parsing_timeout=None)
    expected = [
        float(package.verify(gold, package.parse(text, parsing_timeout=None), timeout_seconds=None))
        for text in TEXTS
    ]
    assert 0 < sum(expected) < len(TEXTS)
    assert math_verify([""] * len(TEXTS), TEXTS, answer=[r"\frac{3}{4}"] * len(TEXTS)) == expected


def test_the_final_expression_is_looked_for_at_the_end():
    filler = "word " * (LONGEST // 5)
    texts = [filler + r"\boxed{2}", r"\boxed{2}" + filler]
    assert math_verify([""] * 2, texts, answer=["2", "2"]) == [1.0, 0.0]
