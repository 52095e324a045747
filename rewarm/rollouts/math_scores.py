"""Equality of mathematical expressions as the `math-verify` package sees it; made to run in a sandbox."""

from collections.abc import Callable

LONGEST = 100_000
"""Characters at a text's end in which its final expression is looked for."""


def make_math_score() -> Callable[[tuple[str | None, str]], float]:
    r"""Import math-verify, and return the function of one text.

    Returns:
        (text, reference) -> 1.0 where the text's final expression equals the reference, else 0.0. A text of
        None asks whether the reference can be parsed: ValueError if not.
    """
    from math_verify import parse, verify

    def math_score(item: tuple[str | None, str]) -> float:
        text, reference = item
        marked = "$" in reference or "\\boxed" in reference
        # Bare LaTeX is not recognised as mathematics. The sandbox sets limits of time, not signals.
        gold = parse(reference if marked else f"\\boxed{{{reference}}}", parsing_timeout=None)
        if not gold:
            raise ValueError("the reference cannot be parsed")
        if text is None:
            return 1.0
        return float(verify(gold, parse(text[-LONGEST:], parsing_timeout=None), timeout_seconds=None))

    math_score((r"$\frac{1}{2}$ or 0.5", "0.5"))  # compiles what every call uses
    return math_score
