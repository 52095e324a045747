"""The command line: a table of the commands, of which only the one that is called is imported."""

import os
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

COMMANDS = {
    "fit": ("fit", "Train a model: rewarm fit --config FILE [--config OVERLAY] [--KEY VALUE]."),
    "validate": ("fit", "Run a config's validation, with --ckpt_path for a checkpoint."),
    "test": ("fit", "Run a config's test."),
    "predict": ("fit", "Run a config's prediction."),
    "run": ("run", "Run the stages of a pipeline in a row; go on where it was interrupted."),
    "init": ("init", "Make the folder of a model to start from: random weights, or a link to one at hand."),
    "export": ("export", "Write the policy of a checkpoint as a Hugging Face folder."),
    "average": ("average", "Average checkpoints of one model, or fine-tunes of it, into a folder."),
    "mixture": ("mixture", "Search for the mixture of data sources with which training scores best."),
    "pairs": ("pairs", "Make preference pairs from a model's verified samples, or from answers at hand."),
    "preview": ("preview", "Show what training would learn of a data set, and what it would leave out."),
    "score": ("score", "Score the examples of a data set, for curricula; go on where it was interrupted."),
    "schedule": ("schedule", "Draw or tabulate the learning rates of some configs."),
    "plan lr": ("plan", "Print the peak learning rate and the batch size of the Step Law, for pretraining."),
    "plan loss": (
        "plan",
        "Fit a law to the logged losses of some runs, and predict those of other schedules.",
    ),
    "plan budget": ("plan", "Print how many supervised examples and preference pairs to have annotated."),
    "plan memory": ("plan_memory", "Print peak memory and time of a step, by part; nothing is trained."),
}
"""For each command the file of its function in `rewarm.commands`, and the first line of its docstring.

`plan lr` is run by `plan_lr`.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a mistake of the user's is one line on stderr and exit code 2.

    Set REWARM_TRACEBACK=1 to see where an error came from.

    Args:
        argv: Words of the command line, without the program's; None takes those of this process.

    Raises:
        SystemExit: With code 2, after a mistake of the user's.

    Example:
        >>> main(["--version"])
        rewarm 0.1.0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Own modules are found by `class_path`, behind all that is installed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        _run(arguments)
    except Exception as error:
        if os.environ.get("REWARM_TRACEBACK") or not _is_users(error):
            raise
        sys.stderr.write(f"rewarm: error: {_one_line(error)}\n")
        sys.exit(2)


def _run(arguments: list[str]) -> None:
    first, *rest = arguments or [""]
    if first in ("-h", "--help"):
        sys.stdout.write(_help(""))
        return
    if first == "--version":
        from rewarm import __version__

        sys.stdout.write(f"rewarm {__version__}\n")
        return
    several = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if several and rest[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_help(first))
        return
    name = " ".join([first, *rest[:1]]) if several else first
    if name not in COMMANDS:
        known = several or list(COMMANDS)
        near = [] if name == first and several else get_close_matches(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"commands are {', '.join(known)}"
        raise ValueError(f"there is no command {name!r}; {hint}" if name else f"missing COMMAND; {hint}")
    module = import_module(f"rewarm.commands.{COMMANDS[name][0]}")
    if COMMANDS[name][0] == "fit":
        module.run_lightning(arguments)
        return
    from rewarm.arguments import call

    function = getattr(module, name.replace(" ", "_"))
    call(function, rest[1:] if several else rest, name, getattr(module, "OPTIONS", None))


def _help(group: str) -> str:
    lines = [f"usage: rewarm {group or 'COMMAND'} ...", "", "Train language models along a curriculum.", ""]
    shown = {name: what for name, (_, what) in COMMANDS.items() if name.startswith(group)}
    width = 2 + max(map(len, shown))
    for name, what in shown.items():
        lines += textwrap.wrap(
            f"{name:<{width}}{what}", 100, initial_indent="  ", subsequent_indent=" " * (width + 2)
        )
    lines += ["", "`rewarm COMMAND --help` explains a command; `rewarm --version` tells the version."]
    return "\n".join(lines) + "\n"


def _is_users(error: Exception) -> bool:
    """Whether an error is about what the user gave, rather than a defect."""
    names = {kind.__name__ for kind in type(error).__mro__}
    users = {"ValueError", "OSError", "ImportError", "MisconfigurationException", "ArgumentError"}
    return bool(names & (users | {"ReplacedArgumentError"}))


def _one_line(error: Exception) -> str:
    # The parser repeats the whole section that it could not use, and every type that it tried.
    noise = (
        "Does not validate against",
        "Subtypes:",
        "Errors:",
        "- Expected a <class 'NoneType'>",
        "Given value",
    )
    lines = [line.strip() for line in str(error).splitlines()]
    told = " ".join(line for line in lines if not line.startswith(noise))
    return told.removeprefix("- ") or type(error).__name__


if __name__ == "__main__":
    main()
