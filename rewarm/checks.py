"""Checks of arguments, which speak one dialect: "batch_size is 0; it must be at least 1".

Each takes what is allowed first, and then any number of arguments by their names.
"""

import functools
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, ParamSpec

_Arguments = ParamSpec("_Arguments")


def at_least(bound: float, **arguments: Any) -> None:
    """Refuse arguments below a bound.

    Args:
        bound: The least that is allowed.
        **arguments: Values by the names under which the caller knows them.

    Raises:
        ValueError: If one is below the bound, or no number.

    Example:
        >>> at_least(1, batch_size=8, max_length=0)
        Traceback (most recent call last):
        ValueError: max_length is 0; it must be at least 1
    """
    for name, value in arguments.items():
        _require(_is_number(value) and value >= bound, name, value, f"it must be at least {bound}")


def above(bound: float, **arguments: Any) -> None:
    """Refuse arguments that are not above a bound.

    Args:
        bound: What is too little already.
        **arguments: Values by the names under which the caller knows them.

    Raises:
        ValueError: If one is not above the bound, or no number.

    Example:
        >>> above(0, beta=0.0)
        Traceback (most recent call last):
        ValueError: beta is 0.0; it must be above 0
    """
    for name, value in arguments.items():
        _require(_is_number(value) and value > bound, name, value, f"it must be above {bound}")


def in_range(interval: str, **arguments: Any) -> None:
    """Refuse arguments outside an interval.

    Args:
        interval: Two numbers in brackets; a round bracket leaves the number beside it out: "[0, 1)".
        **arguments: Values by the names under which the caller knows them.

    Raises:
        ValueError: If one is outside of the interval, or no number.

    Example:
        >>> in_range("[0, 0.5)", label_smoothing=0.5)
        Traceback (most recent call last):
        ValueError: label_smoothing is 0.5; it must be in [0, 0.5)
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    for name, value in arguments.items():
        is_inside = (
            _is_number(value)
            and (value > low or (interval[0] == "[" and value == low))
            and (value < high or (interval[-1] == "]" and value == high))
        )
        _require(is_inside, name, value, f"it must be in {interval}")


def one_of(known: Iterable[Any], **arguments: Any) -> None:
    """Refuse arguments that are none of the known values.

    Args:
        known: All values that are allowed.
        **arguments: Values by the names under which the caller knows them.

    Raises:
        ValueError: If one is none of them; lists them.

    Example:
        >>> one_of(("cached", "frozen"), reference="none")
        Traceback (most recent call last):
        ValueError: reference is 'none'; it must be one of 'cached', 'frozen'
    """
    choices = list(known)
    for name, value in arguments.items():
        # True == 1, but they are not the same choice.
        is_known = any(type(value) is type(choice) and value == choice for choice in choices)
        _require(is_known, name, value, f"it must be one of {', '.join(map(repr, choices))}")


class ReplacedArgumentError(TypeError):
    """An argument was given that is gone; says what to write now.

    Example:
        >>> raise ReplacedArgumentError("Noise has no argument 'sigma' any more; write scale=")
        Traceback (most recent call last):
        rewarm.checks.ReplacedArgumentError: Noise has no argument 'sigma' any more; write scale=
    """


def replaced(**replacements: str) -> Callable[[Callable[_Arguments, None]], Callable[_Arguments, None]]:
    """Decorate a constructor so that arguments which it had once are refused with what took their place.

    Args:
        **replacements: What to write now, by the name of the argument that is gone.

    Returns:
        A decorator for `__init__`, which keeps its signature.

    Raises:
        ReplacedArgumentError: In the constructor, if it is given an argument that is gone.

    Example:
        >>> class Noise:
        ...     @replaced(sigma="scale=")
        ...     def __init__(self, *, scale: float) -> None:
        ...         self.scale = scale
        >>> Noise(sigma=1.0)
        Traceback (most recent call last):
        rewarm.checks.ReplacedArgumentError: Noise has no argument 'sigma' any more; write scale=
    """

    def decorate(init: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
        @functools.wraps(init)
        def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
            for name in kwargs:
                refuse_replaced(type(args[0]), name)
            init(*args, **kwargs)

        checked.replaced_arguments = replacements  # type: ignore[attr-defined]
        return checked

    return decorate


def refuse_replaced(kind: type, name: str) -> None:
    """Refuse an argument that a class had once.

    Args:
        kind: Class whose constructor, or that of a class it inherits from, may be decorated with `replaced`.
        name: Name of the argument.

    Raises:
        ReplacedArgumentError: If the argument is gone; says what to write now.

    Example:
        >>> class Noise:
        ...     @replaced(sigma="scale=")
        ...     def __init__(self, *, scale: float) -> None:
        ...         self.scale = scale
        >>> refuse_replaced(Noise, "scale")
        >>> refuse_replaced(Noise, "sigma")
        Traceback (most recent call last):
        rewarm.checks.ReplacedArgumentError: Noise has no argument 'sigma' any more; write scale=
    """
    for ancestor in kind.__mro__:
        replacements = getattr(vars(ancestor).get("__init__"), "replaced_arguments", {})
        if name in replacements:
            raise ReplacedArgumentError(
                f"{kind.__name__} has no argument {name!r} any more; write {replacements[name]}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; {rule}")
