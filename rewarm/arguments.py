"""A command's arguments, from the signature and the docstring of the function that runs it.

What stands before the `*` of a signature is told by its place, what stands behind it by a flag of its name. A
flag without a default must be given; a list takes one or more values, a mapping NAME=VALUE. Help is what the
docstring says. Parameters of other types are for callers in Python and have no flag.
"""

import inspect
import re
import types
import typing
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from docstring_parser import Docstring, DocstringStyle, parse
from jsonargparse import ArgumentParser

Options = Mapping[str, Sequence[Callable[..., Any]]]
"""Functions that take what a command leaves to its `**options`, by the word that chooses among them."""


def call(
    function: Callable[..., Any], arguments: Sequence[str], name: str, options: Options | None = None
) -> None:
    """Call a function with what a command line says.

    Args:
        function: Function whose signature and docstring say what the arguments are.
        arguments: Command line, without the command's name.
        name: Words by which the command is called, for its help.
        options: Functions that take the function's `**options`.

    Raises:
        ValueError: If an argument is unknown, missing, or not of its type.

    Example:
        >>> def greet(name: str, *, times: int = 1) -> None:
        ...     print(*[f"hello {name}"] * times)
        >>> call(greet, ["you", "--times", "2"], "greet")
        hello you hello you
    """
    flags = list(flags_of(function, options or {}))
    parser = _parser(function, name, flags)
    try:
        given = vars(parser.parse_args(list(arguments)))
    except ArgumentError as error:
        raise ValueError(_explained(str(error), flags)) from error
    function(**{flag.name: flag.read(given[flag.name]) for flag in flags if flag.name in given})


class Flag(NamedTuple):
    """An argument of a command.

    Attributes:
        name: Name of the parameter.
        kind: Type of one value.
        shape: What holds several values, list or dict; None for one alone.
        help: What the docstring says.
        is_needed: Whether it must be given.
        by_place: Whether it is told by its place.

    Example:
        >>> Flag("max_steps", int, None, "Steps.", is_needed=True, by_place=False).text
        '--max-steps'
    """

    name: str
    kind: Any
    shape: type | None
    help: str
    is_needed: bool
    by_place: bool

    @property
    def text(self) -> str:
        """What is written on the command line."""
        return self.name if self.by_place else f"--{self.name.replace('_', '-')}"

    def read(self, value: Any) -> Any:
        """Turn the values of a mapping, NAME=VALUE each, into one."""
        if self.shape is not dict or not isinstance(value, list):
            return value
        found: dict[str, Any] = {}
        for pair in value:
            name, equals, text = pair.partition("=")
            try:
                known = None if name in found else self.kind(text)
            except ValueError:
                known = None
            if not name or not equals or known is None:
                content = "VALUE" if self.kind is str else "NUMBER"
                raise ValueError(f"{self.text} is {pair!r}; it must be NAME={content}, each name once")
            found[name] = known
        return found


def flags_of(function: Callable[..., Any], options: Options) -> Iterator[Flag]:
    """Tell the arguments of a command.

    Args:
        function: Function that runs it.
        options: Functions that take its `**options`.

    Example:
        >>> def greet(name: str, *, times: int = 1) -> None:
        ...     print(*[f"hello {name}"] * times)
        >>> [(flag.text, flag.is_needed) for flag in flags_of(greet, {})]
        [('name', True), ('--times', False)]
    """
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            yield from _merged(options)
        elif (flag := _flag(function, name, parameter)) is not None:
            yield flag


def _flag(function: Callable[..., Any], name: str, parameter: inspect.Parameter) -> Flag | None:
    hints = typing.get_type_hints(vars(function)["__init__"] if isinstance(function, type) else function)
    kind, shape = _kind(hints[name])
    if kind is None:
        return None
    texts = {one.arg_name: one.description or "" for one in _docstring(function).params}
    text, default = " ".join(texts.get(name, "").split()), parameter.default
    if default is not parameter.empty and default is not None and default is not False and default != ():
        text += f" (default: {default if shape is None else ' '.join(map(str, default))})"
    return Flag(
        name,
        kind,
        shape,
        help=text,
        is_needed=default is parameter.empty,
        by_place=parameter.kind is parameter.POSITIONAL_OR_KEYWORD,
    )


def _merged(options: Options) -> Iterator[Flag]:
    """Flags of functions of which some are called: each once, with the words for which it is there."""
    found: dict[str, list[tuple[str, Flag]]] = {}
    for word, functions in options.items():
        for function in functions:
            for name, parameter in inspect.signature(function).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY and (flag := _flag(function, name, parameter)):
                    found.setdefault(name, []).append((word, flag))
    for uses in found.values():
        words = ", ".join(word for word, _ in uses)
        flag = next((flag for _, flag in uses if flag.help), uses[0][1])
        # Whether it is needed depends on the word, and is for the command to say.
        text = flag.help if len(uses) == len(options) else f"{words}: {flag.help}"
        yield flag._replace(help=text, is_needed=False)


def _kind(hint: Any) -> tuple[Any, type | None]:
    """The type of one value and of what holds them; None if no text on a command line can be one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in map(_kind, typing.get_args(hint)) if kind[0] is not None]
        return kinds[0] if kinds else (None, None)
    if hint in (str, int, float, bool) or typing.get_origin(hint) is Literal:
        return hint, None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, Sequence):
        return _kind(arguments[0])[0], list
    if origin in (dict, Mapping) and arguments[0] is str:
        return _kind(arguments[1])[0], dict
    return None, None


def _parser(function: Callable[..., Any], name: str, flags: Sequence[Flag]) -> ArgumentParser:
    docstring = _docstring(function)
    parser = ArgumentParser(
        prog=f"rewarm {name}",
        description=" ".join(filter(None, (docstring.short_description, docstring.long_description))),
        exit_on_error=False,
        allow_abbrev=False,
    )
    for flag in flags:
        # What is not given is left to the function's own default.
        keywords: dict[str, Any] = {"help": flag.help, "default": SUPPRESS}
        if flag.is_needed:
            keywords = {"help": flag.help} | ({} if flag.by_place else {"required": True})
        if typing.get_origin(flag.kind) is Literal:
            keywords["choices"] = list(typing.get_args(flag.kind))
        elif flag.kind is bool:
            keywords["action"] = "store_true"
        else:
            keywords["type"] = str if flag.shape is dict else flag.kind
        if flag.shape is dict:
            keywords["metavar"] = "NAME=VALUE"
        if flag.shape is list or (flag.shape is dict and flag.by_place):
            keywords["nargs"] = "+"
        if flag.shape is not None and not flag.by_place:
            keywords["action"] = "extend" if flag.shape is list else "append"
        parser.add_argument(flag.text, **keywords)
    return parser


def _docstring(function: Callable[..., Any]) -> Docstring:
    return parse(inspect.getdoc(function) or "", DocstringStyle.GOOGLE)


_KINDS = {"int": "a whole number", "float": "a number", "str": "text"}


def _explained(message: str, flags: Sequence[Flag]) -> str:
    """Say what is wrong as all errors do, with the flags near an unknown one."""
    written = {flag.name: flag.text for flag in flags}
    known = [text for text in written.values() if text.startswith("-")]
    if found := re.match(r"unrecognized arguments: (-[^\s=]+)", message):
        near = get_close_matches(found[1], known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        return f"there is no {found[1]}; {hint}"
    if found := re.match(r"unrecognized arguments: (.+)", message):
        return f"there are more arguments than have a place: {found[1]}"
    if found := re.match(r"the following arguments are required: (.+)", message):
        missing = (written.get(name, name) for name in found[1].split(", "))
        return f"missing {', '.join(missing)}"
    if found := re.match(r"argument (\S+): invalid choice: (.+) \(choose from (.+)\)", message):
        return f"{found[1]} is {found[2]}; it must be one of {found[3]}"
    if found := re.match(r"argument (\S+): invalid (\w+) value: (.+)", message):
        return f"{found[1]} is {found[3]}; it must be {_KINDS.get(found[2], found[2])}"
    if found := re.match(r'Parser key "(\w+)":\s+Expected a <class \'(\w+)\'>. Got value: (.*)', message):
        return f"{written[found[1]]} is {found[3]!r}; it must be {_KINDS.get(found[2], found[2])}"
    return message.removeprefix("argument ")
