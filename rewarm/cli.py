"""The command line. Nothing heavy is imported before a command needs it: help comes at once."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

_LIGHTNING = {
    "fit": "train a model: rewarm fit --config configs/curriculum_sft.yaml [--config OVERLAY] [--key value]",
    "validate": "run a config's validation, with --ckpt_path for a checkpoint",
    "test": "run a config's test",
    "predict": "run a config's prediction",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a mistake of the user's is one line on stderr and exit code 2.

    Set REWARM_TRACEBACK=1 to see where an error came from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in _LIGHTNING:
            from rewarm.lightning_cli import run_lightning

            run_lightning(arguments)
        else:
            parsed = _parser().parse_args(arguments)
            parsed.run(parsed)
    except Exception as error:
        if os.environ.get("REWARM_TRACEBACK") or not _is_users(error):
            raise
        sys.stderr.write(f"rewarm: error: {_one_line(error)}\n")
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    """Whether an error is about what the user gave, rather than a defect."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names & {"ValueError", "OSError", "ImportError", "MisconfigurationException", "ArgumentError"}
    )


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
    return " ".join(line for line in lines if not line.startswith(noise)) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rewarm", description="Train language models along a curriculum.", allow_abbrev=False
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, what in _LIGHTNING.items():
        commands.add_parser(name, help=what)
    _add_run(commands)
    _add_init(commands)
    _add_export(commands)
    _add_pairs(commands)
    _add_schedule(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from rewarm import __version__

        sys.stdout.write(f"rewarm {__version__}\n")
        parser.exit()


_Commands = argparse._SubParsersAction  # the type has no public name


def _command(
    commands: _Commands, name: str, what: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_run(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.pipeline import run_pipeline

        run_pipeline(args.pipeline, args.output, args.set)

    parser = _command(commands, "run", "run the stages of a pipeline; go on where it was interrupted", run)
    parser.add_argument("pipeline", help="pipeline file, such as configs/pipelines/tiny.yaml")
    parser.add_argument("--output", required=True, help="folder for everything the stages write")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one of the pipeline's variables (repeatable)",
    )


def _add_init(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.initial_model import initial_model

        initial_model(
            args.output,
            args.model,
            args.config,
            args.tokenizer,
            args.vocab_size,
            args.text,
            args.column,
            args.seed,
        )

    parser = _command(
        commands,
        "init",
        "make the folder of a model to start from: a tokenizer and random weights, or a model at hand",
        run,
    )
    parser.add_argument("--output", required=True, help="Hugging Face folder to write")
    parser.add_argument("--model", help="folder of a model to start from instead; it is linked, not copied")
    parser.add_argument(
        "--config", help="YAML file with the fields of a transformers config, `model_type` among them"
    )
    parser.add_argument(
        "--tokenizer", choices=["characters", "bpe"], default="bpe", help="kind of tokenizer to train"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="most tokens of a bpe tokenizer")
    parser.add_argument("--text", nargs="+", default=[], help="files to train the tokenizer on")
    parser.add_argument(
        "--column", action="append", default=[], help="text columns of those files (default: all text)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")


def _add_export(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.export import export

        export(args.checkpoint, args.output, args.tokenizer, average=args.average, dtype=args.dtype)

    parser = _command(commands, "export", "turn a checkpoint into a Hugging Face folder", run)
    parser.add_argument("checkpoint", help="a .ckpt of any rewarm module: a file, or a folder of shards")
    parser.add_argument("--output", required=True, help="folder to write; must not be there yet")
    parser.add_argument(
        "--tokenizer", help="tokenizer to put beside it (default: the one it was trained with)"
    )
    parser.add_argument(
        "--average", action="store_true", help="take the weights averaged by CheckpointAveraging"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the weights written (default: that of the checkpoint)",
    )


def _add_pairs(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.pairs import write_pairs

        write_pairs(**{name: value for name, value in vars(args).items() if name != "run"})

    parser = _command(
        commands,
        "pairs",
        "make preference pairs from a model's verified samples, or from answers at hand",
        run,
    )
    parser.add_argument(
        "--prompts",
        required=True,
        help="rows with a prompt; with `responses` and `rewards` nothing is sampled",
    )
    parser.add_argument("--output", required=True, help="JSON lines file to write; must not be there yet")
    parser.add_argument("--model", help="Hugging Face folder to sample from")
    parser.add_argument("--reward", help="dotted name of a reward function, such as rewarm.exact_number")
    parser.add_argument("--chosen", help="column to take the chosen answer from, instead of the best sample")
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt")
    parser.add_argument("--pairs-per-prompt", type=int, default=1, help="most pairs from one prompt")
    parser.add_argument("--min-gap", type=float, default=0.5, help="least difference of the two rewards")
    parser.add_argument("--limit", type=int, help="take the first so many prompts")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens per completion")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling and of which pairs are taken")


def _add_schedule(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.lightning_cli import write_schedules

        write_schedules(args.config, args.steps, args.plot, args.csv)

    parser = _command(commands, "schedule", "draw and tabulate the learning rate of configs", run)
    parser.add_argument("config", nargs="+", help="config files of `rewarm fit`, one curve each")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the config's trainer.max_steps)")
    parser.add_argument("--plot", help="PNG file to write")
    parser.add_argument("--csv", help="CSV file to write")


if __name__ == "__main__":
    main()
