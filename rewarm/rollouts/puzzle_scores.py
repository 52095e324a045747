"""Scores of reasoning-gym's puzzles without its `eval`; made to run in a sandbox.

Nine of its data sets hand the answer to `eval`, or to sympy's `parse_expr`, which does the same in the end.
Here both are replaced by readers that know numbers, brackets, arithmetic and mathematical functions, and
nothing else.
"""

import ast
import io
import operator
import sys
import tokenize
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}
_SYMBOLS = {"+", "-", "*", "/", "**", "^", "!", "(", ")", "[", "]", "{", "}", ",", "="}
_OTHERS = (  # what sympy does not call a Function
    "Symbol Integer Float Rational Function Add Mul Pow Eq Max Min sqrt cbrt root pi E I oo zoo nan"
    " GoldenRatio EulerGamma Integral Derivative Sum Product Limit Order factorial2"
)
_WORDS_AROUND = {tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.ENCODING}


def evaluate(text: str) -> Any:
    """Return the value of a Python expression of literals and arithmetic; nothing is called or looked up.

    Args:
        text: Numbers, texts, lists, tuples, sets and dictionaries of them, and arithmetic with numbers.

    Raises:
        ValueError: If there is anything else in it.
        SyntaxError: If it is no expression.

    Example:
        >>> evaluate("[[1, 2], ['a', (0x5 + 0x3) << 1]]")
        [[1, 2], ['a', 16]]

    Source: none (ours).   Differs: nothing.
    """
    return _value(ast.parse(text.strip(), mode="eval").body)


def _value(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=parts):
            return [_value(part) for part in parts]
        case ast.Tuple(elts=parts):
            return tuple(_value(part) for part in parts)
        case ast.Set(elts=parts):
            return {_value(part) for part in parts}
        case ast.Dict(keys=keys, values=values) if all(keys):
            pairs = zip(keys, values, strict=True)
            return {_value(key): _value(value) for key, value in pairs if key is not None}
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_number(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_number(left), _number(right))
    raise ValueError(f"the expression has {type(node).__name__}, must have literals and arithmetic alone")


def _number(node: ast.AST) -> Any:
    value = _value(node)
    if not isinstance(value, int | float | complex):
        raise ValueError(f"arithmetic with {type(value).__name__}, must be with numbers")
    return value


@lru_cache
def _known() -> dict[str, Any]:
    """Return sympy's mathematical functions and constants by name: all that a formula may use."""
    import sympy

    known = {name: getattr(sympy, name) for name in _OTHERS.split()}
    known |= {
        name: value
        for name, value in vars(sympy).items()
        if isinstance(value, type) and issubclass(value, sympy.Function)
    }
    known |= {"max": sympy.Max, "min": sympy.Min, "abs": abs, "__builtins__": {}}
    return known


def parse_formula(text: str, local_dict: dict[str, Any] | None = None, **options: Any) -> Any:
    """Parse a formula as `sympy.parse_expr` does, which would run any Python.

    Args:
        text: Numbers, names, brackets, arithmetic, and calls of mathematical functions.
        local_dict: Meaning of some names. Unknown ones are symbols.
        options: As of `sympy.parse_expr`.

    Raises:
        ValueError: If there is anything else in it: an attribute, a text, a keyword, a name with two
            underscores.
        SyntaxError: If it is no formula.

    Example:
        >>> parse_formula("2*x**2 + sin(x)")
        2*x**2 + sin(x)

    Source: none (ours).   Differs: nothing.
    """
    import keyword

    from sympy.parsing.sympy_parser import parse_expr

    for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
        kind, word = token.type, token.string
        is_name = kind == tokenize.NAME and "__" not in word and not keyword.iskeyword(word)
        is_symbol = kind in (tokenize.OP, tokenize.ERRORTOKEN) and (word in _SYMBOLS or word.isspace())
        if not (is_name or is_symbol or kind == tokenize.NUMBER or kind in _WORDS_AROUND):
            raise ValueError(f"the formula has {word!r}, must have numbers, names and arithmetic alone")
    return parse_expr(text, local_dict, global_dict=dict(_known()), **options)


def make_puzzle_score() -> Callable[[tuple[str | None, str, Mapping[str, Any]]], float]:
    """Import reasoning-gym, replace what it evaluates with, and return the function of one answer.

    Returns:
        (answer, name of the data set, puzzle) -> score. An answer of None asks whether the puzzle can be
        scored at all: its own answer is scored, or fails.
    """
    import sympy
    from reasoning_gym.factory import DATASETS, get_score_answer_fn
    from sympy.parsing.sympy_parser import parse_expr

    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym."):
            module.eval = evaluate  # type: ignore[attr-defined]  # comes before the built-in one
            if getattr(module, "parse_expr", None) is parse_expr:
                module.parse_expr = parse_formula  # type: ignore[attr-defined]
    sympy.parse_expr = parse_formula
    scorers = {name: get_score_answer_fn(name) for name in DATASETS if name != "composite"}

    def puzzle_score(item: tuple[str | None, str, Mapping[str, Any]]) -> float:
        answer, name, puzzle = item
        if name not in scorers:
            raise LookupError(", ".join(sorted(scorers)))
        return float(scorers[name](puzzle["answer"] if answer is None else answer, puzzle))

    return puzzle_score
