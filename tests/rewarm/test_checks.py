"""What the checks let through and what they refuse."""

import inspect
import math

import jsonargparse
import pytest

from rewarm.checks import above, at_least, in_range, one_of, refuse_replaced, replaced


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: at_least(1, n=0), "n is 0; it must be at least 1"),
        (lambda: at_least(0, n=math.nan), "n is nan; it must be at least 0"),
        (lambda: at_least(0, n="3"), "n is '3'; it must be at least 0"),
        (lambda: at_least(0, a=1, b=-1), "b is -1; it must be at least 0"),
        (lambda: above(0, n=0), "n is 0; it must be above 0"),
        (lambda: above(0, n=None), "n is None; it must be above 0"),
        (lambda: in_range("[0, 1)", n=1), r"n is 1; it must be in \[0, 1\)"),
        (lambda: in_range("(0, 1]", n=0.0), r"n is 0.0; it must be in \(0, 1\]"),
        (lambda: in_range("[0, 1]", n=math.nan), r"n is nan; it must be in \[0, 1\]"),
        (lambda: one_of(("a", "b"), kind="c"), "kind is 'c'; it must be one of 'a', 'b'"),
        (lambda: one_of((1, "all"), kind=True), "kind is True; it must be one of 1, 'all'"),
    ],
)
def test_the_message_names_the_argument_its_value_and_what_is_allowed(check, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check()


def test_bounds_themselves_pass_where_they_are_allowed():
    at_least(1, n=1)
    at_least(1)
    above(0, n=math.inf)
    in_range("[0, 1]", low=0, high=1.0)
    in_range("(0, 1)", n=0.5)
    one_of((False, True, "padding_free"), packing=True)


class Noise:
    @replaced(sigma="scale=", kind="shape='normal' or 'uniform'")
    def __init__(self, seed: int, *, scale: float = 1.0) -> None:
        self.seed, self.scale = seed, scale


def test_an_argument_that_is_gone_is_refused_with_what_took_its_place():
    with pytest.raises(TypeError, match=r"^Noise has no argument 'sigma' any more; write scale=$"):
        Noise(0, sigma=1.0)


def test_a_class_that_inherits_refuses_what_its_base_has_no_more():
    class Louder(Noise):
        def __init__(self, **options):
            super().__init__(0, **options)

    with pytest.raises(TypeError, match=r"^Louder has no argument 'sigma' any more; write scale=$"):
        refuse_replaced(Louder, "sigma")
    refuse_replaced(Louder, "scale")


def test_a_constructor_with_replaced_arguments_keeps_its_signature_and_works():
    assert list(inspect.signature(Noise).parameters) == ["seed", "scale"]
    noise = Noise(3, scale=2.0)
    assert (noise.seed, noise.scale) == (3, 2.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sgima'"):
        Noise(0, sgima=1.0)


def test_the_command_line_reads_the_signature_of_such_a_constructor():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Noise, "noise")
    assert parser.parse_args(["--noise.seed=1", "--noise.scale=0.5"]).noise.scale == 0.5
