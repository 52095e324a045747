"""The command line. Nothing heavy is imported before a command needs it: help comes at once."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

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
            from rewarm.commands.fit import run_lightning

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
    _add_average(commands)
    _add_mixture(commands)
    _add_pairs(commands)
    _add_preview(commands)
    _add_score(commands)
    _add_schedule(commands)
    _add_plan(commands)
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
        from rewarm.pipelines.pipeline import run_pipeline

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
        from rewarm.commands.init import initial_model

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
        from rewarm.commands.export import export

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


def _add_average(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.average import average_command

        average_command(**{name: value for name, value in vars(args).items() if name != "run"})

    parser = _command(
        commands, "average", "average checkpoints of one model, or fine-tunes of it, into a folder", run
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        help=".ckpt files or folders of shards, or Hugging Face folders; where the order matters, oldest"
        " first",
    )
    parser.add_argument("--output", required=True, help="Hugging Face folder to write; must not be there yet")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        help="one per checkpoint, summing to 1 (default: the plain mean)",
    )
    parser.add_argument(
        "--ema", type=float, metavar="ALPHA", help="moving average in which the newest weighs ALPHA"
    )
    parser.add_argument(
        "--debias", action="store_true", help="of --ema: do not give the oldest all that is left"
    )
    parser.add_argument(
        "--decay",
        metavar="SHAPE",
        help="weights that stand for a decay of the learning rate over these checkpoints: linear, sqrt,"
        " cosine, ...",
    )
    parser.add_argument("--end", type=float, help="of --decay: factor of the learning rate where it ends")
    parser.add_argument(
        "--greedy",
        metavar="SCORE",
        help="take only those that raise a validation score: a shell command with {} for the folder, whose"
        " last line of output is the score (higher is better), or the dotted name of a Python function",
    )
    parser.add_argument("--base", help="model to interpolate with, such as the one training started from")
    parser.add_argument("--share", type=float, help="of the average in the interpolation; the rest is --base")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the weights written (default: that of the checkpoints)",
    )
    parser.add_argument("--tokenizer", help="tokenizer to put beside it (default: the first checkpoint's)")


def _add_mixture(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.mixture import mixture_command

        mixture_command(**{name: value for name, value in vars(args).items() if name != "run"})

    parser = _command(
        commands,
        "mixture",
        "search for the mixture of data sources that trains best; go on where it was interrupted",
        run,
    )
    parser.add_argument(
        "sources", nargs="+", metavar="NAME=TOKENS", help="the sources, two or more, and how large each is"
    )
    parser.add_argument(
        "--score",
        required=True,
        help="trains a small model and scores it: a shell command with {} for a JSON file with each source's"
        " share, whose last line of output is the score (higher is better), or the dotted name of a Python"
        " function",
    )
    parser.add_argument("--output", required=True, help="folder of the search")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[64, 32, 16], help="mixtures to try in each iteration"
    )
    parser.add_argument(
        "--predictor",
        help="dotted name of a class with scikit-learn's fit and predict, such as lightgbm.LGBMRegressor"
        " (default: kernel ridge regression)",
    )
    parser.add_argument("--candidates", type=int, default=20_000, help="mixtures to predict the score of")
    parser.add_argument("--top", type=int, default=200, help="how many of the best predicted to draw from")
    parser.add_argument("--seed", type=int, default=0, help="of the mixtures")


def _add_pairs(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.pairs import write_pairs

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


def _add_preview(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.preview import preview

        preview(**{name: value for name, value in vars(args).items() if name != "run"})

    parser = _command(
        commands, "preview", "show what training would learn of a data set, and what it would leave out", run
    )
    parser.add_argument("data", help="instruction or preference data: a file, a folder or a Hub id")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder or id of a tokenizer")
    parser.add_argument("--max-length", type=int, default=1024, help="most positions per row")
    parser.add_argument(
        "--overlong",
        choices=["error", "drop", "keep_start", "keep_end"],
        default="keep_start",
        help="what becomes of longer rows",
    )
    parser.add_argument("--samples", type=int, default=3, help="how many examples to print")
    parser.add_argument("--seed", type=int, default=0, help="of which examples are printed")


def _add_score(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.score import score

        score(**{name: value for name, value in vars(args).items() if name != "run"})

    what = "score the examples of a data set, for curricula; go on where it was interrupted"
    parser = _command(commands, "score", what, run)
    parser.description = f"{what}. {_SCORES}"
    add = parser.add_argument
    add("data", help="file or saved data set: prompts with completions, conversations, pairs, or prompts")
    add("--by", required=True, metavar="SCORE", help="one of the scores above")
    add("--output", required=True, help="Parquet table; if there is one of these data, it gains a column")
    add("--name", default=argparse.SUPPRESS, help="of the column (default: the score)")
    add("--plot", default=argparse.SUPPRESS, help="PNG file for a histogram")
    of_scores: dict[str, tuple[str, dict[str, Any]]] = {
        "--part": (
            "length, rarity, compression: of what (default: all)",
            {"choices": ["completion", "prompt", "all"]},
        ),
        "--column": ("column: a column of the data that holds numbers", {}),
        "--answers": (
            "irt_difficulty: tables with pass rates of several models, or columns that are 1 where a model"
            " was right and 0 where not",
            {"nargs": "+"},
        ),
        "--tokenizer": ("folder or id (default: the model's)", {}),
        "--model": ("Hugging Face folder or id", {}),
        "--device": ("such as cuda:1 (default: an accelerator if there is one)", {}),
        "--dtype": ("of the model (default: float32)", {"choices": ["float32", "bfloat16"]}),
        "--batch-tokens": ("positions per batch, padding included (default: 16384)", {"type": int}),
        "--max-length": ("most positions per example (default: the model's context)", {"type": int}),
        "--overlong": (
            "what becomes of longer ones (default: error)",
            {"choices": ["error", "drop", "keep_start"]},
        ),
        "--other": ("perplexity_ratio: compare with this model, not with leaving out the prompt", {}),
        "--reward": ("pass_rate: dotted name of a reward function, such as rewarm.exact_number", {}),
        "--samples": ("pass_rate: completions per prompt (default: 8)", {"type": int}),
        "--passing": ("pass_rate: least reward that passes (default: 1)", {"type": float}),
        "--max-new-tokens": ("pass_rate: most tokens per completion (default: 256)", {"type": int}),
        "--temperature": ("pass_rate: of the sampling (default: 1)", {"type": float}),
        "--top-p": ("pass_rate: probability mass sampled from (default: 1)", {"type": float}),
        "--prefix-weight": ("angle: weight of the template's prefix (default: 8)", {"type": float}),
        "--prototypes": ("prototype_distance: how many (default: 100)", {"type": int}),
        "--passes": ("prototype_distance: passes of k-means (default: 3)", {"type": int}),
        "--seed": ("pass_rate, prototype_distance: of the draws (default: 0)", {"type": int}),
    }
    for flag, (what, options) in of_scores.items():
        add(flag, default=argparse.SUPPRESS, help=what, **options)


_SCORES = (
    "Without a model: length (tokens); rarity (of the tokens); compression (ratio); column (any that holds"
    " numbers); irt_difficulty (from several models' answers). With --model: loss; perplexity;"
    " perplexity_ratio (with and without the prompt, or of two models); pass_rate (of verified samples, with"
    " its interval); angle (concentration of the question's hidden states); prototype_distance. An example is"
    " known by the hash of its columns, so the table survives another order of the rows. Under torchrun the"
    " ranks share the work."
)


def _add_schedule(commands: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.schedule import write_schedules

        write_schedules(args.config, args.steps, args.plot, args.csv, args.lr)

    parser = _command(commands, "schedule", "draw and tabulate the learning rate of configs", run)
    parser.add_argument("config", nargs="+", help="config files of `rewarm fit`, all in one picture")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the config's trainer.max_steps)")
    parser.add_argument(
        "--lr", type=float, help="peak (default: the config's; for a branch that of its checkpoint)"
    )
    parser.add_argument("--plot", help="picture to write; its suffix is the format, such as .png")
    parser.add_argument("--csv", help="table to write (default, without --plot: to the screen)")


def _add_plan(commands: _Commands) -> None:
    what = (
        "settle numbers before training: learning rate and batch, loss of a schedule, annotation budget,"
        " memory and time of a step"
    )
    parser = commands.add_parser("plan", help=what, description=what, allow_abbrev=False)
    plans = parser.add_subparsers(title="plans", metavar="WHAT", required=True)
    _add_plan_lr(plans)
    _add_plan_loss(plans)
    _add_plan_budget(plans)
    _add_plan_memory(plans)


def _add_plan_lr(plans: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.plan import plan_lr

        plan_lr(args.parameters, args.tokens, args.sequence_length)

    parser = _command(plans, "lr", "peak learning rate and batch size for pretraining, by the Step Law", run)
    parser.add_argument("--parameters", type=float, required=True, help="of the model, without embeddings")
    parser.add_argument("--tokens", type=float, required=True, help="to train on")
    parser.add_argument("--sequence-length", type=int, help="to tell the batch in sequences too")


def _add_plan_loss(plans: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.plan import plan_loss

        plan_loss(**{name: value for name, value in vars(args).items() if name != "run"})

    what = "fit a law to the logged losses of some runs, and predict those of other schedules"
    parser = _command(plans, "loss", what, run)
    parser.add_argument(
        "logs", nargs="+", help="a log of each run: a TensorBoard folder, or a CSV file with a column `step`"
    )
    parser.add_argument(
        "--configs", nargs="+", default=[], help="configs of `rewarm fit` whose last loss to predict"
    )
    parser.add_argument(
        "--held-out", nargs="+", default=[], help="logs that are not fitted: how far off is the law on them?"
    )
    parser.add_argument("--law", choices=["annealing", "multi-power"], default="annealing", help="law to fit")
    parser.add_argument("--loss", default="train/loss", help="name of the loss in the logs")
    parser.add_argument("--lr", default="lr", help="name of the learning rate in the logs")
    parser.add_argument(
        "--decay", type=float, help="lambda of the annealing law (default: the best of several)"
    )
    parser.add_argument("--skip", type=int, default=0, help="leave out the losses of the first so many steps")
    parser.add_argument("--steps", type=int, help="optimizer steps of the configs (default: as they say)")


def _add_plan_budget(plans: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.plan import plan_budget

        plan_budget(args.budget, args.share, args.sft_cost, args.preference_cost)

    what = "how many supervised examples and preference pairs to have annotated"
    parser = _command(plans, "budget", what, run)
    parser.add_argument("budget", type=float, help="what may be spent, in any currency")
    parser.add_argument(
        "--share", type=float, help="part for supervised examples, 0 to 1 (default: by published findings)"
    )
    parser.add_argument("--sft-cost", type=float, default=1.0, help="price of a supervised example")
    parser.add_argument("--preference-cost", type=float, default=1.0, help="price of a preference pair")


def _add_plan_memory(plans: _Commands) -> None:
    def run(args: argparse.Namespace) -> None:
        from rewarm.commands.plan_memory import plan_memory

        plan_memory(**{name: value for name, value in vars(args).items() if name != "run"})

    what = "peak memory and time of a step, by part, and what fits; nothing is trained"
    parser = _command(plans, "memory", what, run)
    add = parser.add_argument
    add("configs", nargs="+", help="configs of `rewarm fit`, a column each; their data need not be there")
    add("--overlay", nargs="+", default=[], help="configs on top of each, such as configs/trainer/fsdp.yaml")
    add("--model", help="in place of theirs: Hugging Face folder or id, or YAML file with a config's fields")
    add("--devices", type=int, help="processes over all nodes (default: as the configs say)")
    add("--memory", type=float, help="GiB of one device (default: that of the CUDA device here, if any)")
    add("--device", help="GPU to tell the time for, such as H200 (default: the one here, if any)")
    add("--measure", action="store_true", help="tell the time for this machine, by measuring what it reaches")
    add("--prompt-length", type=int, help="tokens of the longest prompt; GRPO needs it")


if __name__ == "__main__":
    main()
