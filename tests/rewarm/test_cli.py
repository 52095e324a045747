import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from rewarm import cli
from rewarm.arguments import flags_of
from tests import tiny


def rewarm(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-P", "-m", "rewarm", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


OWN = [name for name, (module, _) in cli.COMMANDS.items() if module != "fit"]


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"]])
def test_help_lists_the_commands_and_imports_none(arguments):
    code = f"import sys, rewarm.cli as c\nc.main({arguments})\n"
    code += "assert not {'torch', 'jsonargparse', 'yaml'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS if arguments == ["--help"] else ():
        assert f"\n  {command} " in done.stdout


def function_of(command):
    module = importlib.import_module(f"rewarm.commands.{cli.COMMANDS[command][0]}")
    return getattr(module, command.replace(" ", "_")), getattr(module, "OPTIONS", {})


@pytest.mark.parametrize("command", OWN)
def test_the_table_says_of_a_command_what_its_function_says(command):
    function, _ = function_of(command)
    assert cli.COMMANDS[command][1] == inspect.getdoc(function).splitlines()[0]


@pytest.mark.parametrize("command", OWN)
def test_every_command_explains_each_of_its_arguments(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    function, options = function_of(command)
    for flag in flags_of(function, options):
        assert flag.text in shown
        assert len(flag.help) > 10, f"{flag.text} has no help"
        assert flag.help in shown.replace("- ", "-") or flag.help in shown, flag.text


def test_the_guide_lists_every_command():
    guide = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    for command in cli.COMMANDS:
        assert f"`{command}" in guide or f"`rewarm {command}" in guide, command


def test_every_file_of_a_command_is_in_the_table():
    files = {path.stem for path in Path(cli.__file__).with_name("commands").glob("*.py")} - {"__init__"}
    assert files == {module for module, _ in cli.COMMANDS.values()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["expot"], "there is no command 'expot'; did you mean export?"),
        (["xyzzy"], "there is no command 'xyzzy'; commands are fit, validate, "),
        (["plan"], "there is no command 'plan'; commands are plan lr, plan loss, plan budget, plan memory"),
        (["plan", "los"], "there is no command 'plan los'; did you mean plan loss"),
        ([], "missing COMMAND; commands are fit, validate, "),
        (
            ["plan", "lr", "--parameters", "1e9", "--token", "1"],
            "there is no --token; did you mean --tokens?",
        ),
        (["plan", "lr", "--parameters", "1e9"], "missing --tokens"),
    ],
)
def test_what_is_not_there_is_answered_by_what_is_near(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"rewarm: error: {said}")


def test_a_users_mistake_is_one_line_and_exit_code_two(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "nowhere.ckpt", "--output", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "rewarm: error: nowhere.ckpt: no such checkpoint file\n"


def test_a_defect_shows_its_traceback(monkeypatch):
    import rewarm.commands.export

    def broken(checkpoint: str, *, output: str):
        raise TypeError("a defect")

    monkeypatch.setattr(rewarm.commands.export, "export", broken)
    with pytest.raises(TypeError, match="a defect"):
        cli.main(["export", "x", "--output", "y"])


def test_the_traceback_of_a_mistake_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("REWARM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such checkpoint file"):
        cli.main(["export", "nowhere.ckpt", "--output", "x"])


CONFIG = """
model:
  class_path: rewarm.CurriculumSFT
  init_args:
    model: {model}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data:
  class_path: rewarm.InstructionData
  init_args: {{train: {train}, tokenizer: {tokenizer}, max_length: {max_length}, batch_size: 8}}
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: rewarm.HuggingFaceExport
      init_args: {{folder: {folder}/hf}}
"""


def config(tmp_path, edit=lambda text: text, **changed):
    values = {
        "model": dict(tiny.LLAMA),
        "train": tiny.write_jsonl(tmp_path / "train.jsonl", tiny.sums(16)),
        "tokenizer": tiny.save_tokenizer(tmp_path / "tokenizer"),
        "max_length": 32,
        "folder": tmp_path,
    } | changed
    values["model"] = str(values["model"]).replace("None", "null")
    path = tmp_path / "config.yaml"
    path.write_text(edit(CONFIG.format(**values)))
    return str(path)


def shadow(folder):
    """A folder of the package's name, such as a clone has."""
    (folder / "rewarm").mkdir()
    (folder / "rewarm" / "__init__.py").write_text("raise RuntimeError('not the installed package')")


def test_a_folder_of_the_packages_name_hides_nothing_and_own_modules_are_found(tmp_path):
    shadow(tmp_path)
    (tmp_path / "mine.py").write_text("def score(path):\n    return 1.0\n")
    (tmp_path / "p.yaml").write_text("""
vars: {tries: 2}
stages:
  - {name: one, run: [python, -P, -m, rewarm.sums, --help]}
  - {name: two, run: [rewarm, mixture, a=1, b=1, --sizes, $tries, --score, mine.score, --output, $stage/x]}
""")
    done = rewarm("run", "p.yaml", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[2/2] 1 " in done.stdout
    (tmp_path / "torch.py").write_text("raise RuntimeError('not the installed package')")
    done = rewarm("run", "--set", "tries=3", "p.yaml", "--output", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[3/3] 1 " in done.stdout


@pytest.mark.slow
@pytest.mark.dist
def test_fit_trains_exports_and_leaves_the_folder_alone_that_it_is_called_in(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.yaml").write_text("mine")
    shadow(tmp_path / "here")
    # Lightning starts the second rank by itself.
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = rewarm("fit", "--config", config(tmp_path), *ranks, cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "config.yaml").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["config.yaml", "rewarm"]
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size == tiny.LLAMA["vocab_size"]


BAD = {
    "missing file": ({"train": "nowhere.jsonl"}, None, "nowhere.jsonl: no such file"),
    "unknown class": (
        {},
        ("CurriculumSFT", "CurriculumSTF"),
        "has no 'CurriculumSTF'; its classes are Ability",
    ),
    "unknown key": ({}, ("max_length", "max_lenght"), "'max_lenght' is not accepted"),
    "unknown trainer key": ({}, ("max_steps", "max_stepz"), "trainer.max_stepz"),
    "wrong type": ({"max_length": "many"}, None, "Got value: many"),
    "row too long": ({"max_length": 3}, None, "line 1: 6 positions, but max_length is 3"),
    "missing model": ({"model": "nowhere"}, None, "model is 'nowhere'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_says_what_is_wrong(tmp_path, name, capsys, monkeypatch):
    changed, replaced, message = BAD[name]
    edit = (lambda text: text.replace(*replaced)) if replaced else (lambda text: text)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["rewarm"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", config(tmp_path, edit, **changed)])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rewarm: error:")]
    assert message in line
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "1+1=", "answer": 2}], "completion"),
        ([{"prompt": "1+1=", "completion": ""}], "line 1: the completion is empty"),
        (
            [{"prompt": "1+1=", "completion": "2"}, {"prompt": None, "completion": "2"}],
            "line 2, column 'prompt'",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rewarm"])
    path = tiny.write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", config(tmp_path, train=path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "bad.jsonl" in error


GRPO = """
model:
  class_path: rewarm.GRPO
  init_args:
    model: {model}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
data:
  class_path: rewarm.PromptData
  init_args:
    train: {train}
    tokenizer: {tokenizer}
    reward: {reward}
    max_new_tokens: {max_new_tokens}
    prompts_per_rollout: 4
    completions_per_prompt: 2
trainer:
  accelerator: cpu
  max_steps: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: rewarm.HuggingFaceExport
      init_args: {{folder: {folder}/hf}}
"""


def nan_reward(prompts, completions, **columns):
    return [float("nan")] * len(prompts)


def failing_reward(prompts, completions, **columns):
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("reward", "max_new_tokens", "rows", "message"),
    [
        ("tests.rewarm.test_cli.nan_reward", 4, None, "nan_reward failed on row 0 (prompt '"),
        ("tests.rewarm.test_cli.failing_reward", 4, None, "failing_reward failed on row 0 (prompt '"),
        ("rewarm.exact_number", 4, [{"prompt": "1+1="}], "column 'answer' is missing"),
        ("rewarm.exact_number", 126, None, "take 130 positions, the model has 128"),
        ("rewarm.no_such_reward", 4, None, "no_such_reward"),
        ("rewarm.exact_number", 4, [], "empty"),
    ],
)
def test_bad_rewards_and_prompts_are_one_line(
    tmp_path, reward, max_new_tokens, rows, message, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["rewarm"])
    rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in tiny.sums(8)] if rows is None else rows
    text = GRPO.format(
        model=str(dict(tiny.LLAMA)).replace("None", "null"),
        train=tiny.write_jsonl(tmp_path / "prompts.jsonl", rows),
        tokenizer=tiny.save_tokenizer(tmp_path / "tokenizer"),
        reward=reward,
        max_new_tokens=max_new_tokens,
        folder=tmp_path,
    )
    (tmp_path / "grpo.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", str(tmp_path / "grpo.yaml")])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rewarm: error:")]
    assert message in line
    assert not (tmp_path / "hf").exists()
