"""What is read from a pipeline's file."""

import pytest
import yaml

from rewarm.pipelines.pipeline import read_pipeline
from tests.pipeline_files import counting, pipeline


def test_a_change_reaches_the_stages_after_it(tmp_path):
    def prints(first):
        return [
            stage.fingerprint
            for stage in read_pipeline(pipeline(tmp_path, [first, counting(tmp_path, "b")]), "o", {})
        ]

    before, after = prints(counting(tmp_path, "a")), prints(counting(tmp_path, "a", fail=True))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_variables_are_filled_in_with_their_types(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("{}")
    stages = [
        {
            "name": "a",
            "fit": str(config),
            "set": {"x.n": "$n", "x.text": "${n}0 in $stage", "x.list": ["$kind", "$output"]},
        }
    ]
    path = pipeline(tmp_path, stages, {"n": 3, "kind": {"model_type": "llama"}})
    (stage,) = read_pipeline(path, "out", {"n": "5"})
    assert stage.settings == {"x": {"n": 5, "text": "50 in out/a", "list": [{"model_type": "llama"}, "out"]}}


@pytest.mark.parametrize(
    ("document", "settings", "message"),
    [
        ({"stages": []}, {}, "must have `stages`"),
        ({"stages": [{"name": "a"}]}, {}, "either `run` or `fit`"),
        ({"stages": [{"name": "a b", "run": "x"}]}, {}, "it must begin with a letter"),
        (
            {"stages": [{"name": "..", "run": "x"}]},
            {},
            r"named '\.\.'; it must begin with a letter",
        ),
        ({"stages": [{"name": ".ssh", "run": "x"}]}, {}, r"a stage is named '\.ssh'"),
        ({"stages": [{"name": "-rf", "run": "x"}]}, {}, "a stage is named '-rf'"),
        ({"stages": {"a": 1}}, {}, "stages is {'a': 1}; it must be a list of stages"),
        ({"vars": ["a"], "stages": [{"name": "a", "run": "x"}]}, {}, r"vars is \['a'\]; it must be values"),
        ({"vars": {"a": "$a"}, "stages": [{"name": "a", "run": "$a"}]}, {}, "variable a refers to itself"),
        (
            {"vars": {"a": "x$b", "b": "$a"}, "stages": [{"name": "a", "run": "$a"}]},
            {},
            "the variable a refers to itself: a -> b",
        ),
        ({"stages": [{"name": "a", "run": "echo 'x"}]}, {}, 'run is "echo \'x": No closing quotation'),
        ({"stages": [{"name": "a", "run": ""}]}, {}, "run is ''; it must be a command"),
        ({"stages": [{"name": "a", "run": None}]}, {}, "run is None; it must be a command, as text or"),
        ({"stages": [{"name": "a", "run": ["x", None]}]}, {}, "run has the word None; it must be text"),
        ({"stages": [{"name": "a", "fit": 3}]}, {}, "fit is 3; it must be a config file"),
        (
            {"stages": [{"name": "a", "run": "x", "set": ["x"]}]},
            {},
            r"set is \['x'\]; it must be settings by name",
        ),
        (
            {"stages": [{"name": "a", "run": "x", "checkpoint_every": "often"}]},
            {},
            "checkpoint_every is 'often'; it must be a whole number, at least 1",
        ),
        ({"stages": [{"name": "a", "run": "$nope"}]}, {}, "no variable nope; known are"),
        ({"vars": {"train": None}, "stages": [{"name": "a", "run": "x $train"}]}, {}, "give --set train"),
        ({"stages": [{"name": "a", "fit": "nowhere.yaml"}]}, {}, "config nowhere.yaml: no such file"),
        ({"stages": [{"name": "a", "run": "x"}] * 2}, {}, "two stages are named 'a'"),
        ({"stages": [{"name": "a", "run": "x"}]}, {"seed": "1"}, "has no such variable"),
    ],
)
def test_a_wrong_pipeline_is_named(tmp_path, document, settings, message):
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match=message):
        read_pipeline(str(path), str(tmp_path / "out"), settings)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml: no such file"):
        read_pipeline("nowhere.yaml", "out", {})
    (tmp_path / "p.yaml").write_text("stages: [")
    with pytest.raises(ValueError, match="not YAML"):
        read_pipeline(str(tmp_path / "p.yaml"), "out", {})


def fingerprint(tmp_path, **changes):
    config = {
        "data": {"init_args": {"batch_size": 8, "seed": 0}},
        "trainer": {"max_steps": 5, "num_nodes": 2, "accumulate_grad_batches": 4},
    }
    settings = {"trainer.devices": 8, "trainer.strategy.init_args.timeout": "0:10:00"}
    for name, value in changes.items():
        if name in ("batch_size", "seed"):
            config["data"]["init_args"][name] = value
        elif name in config["trainer"]:
            config["trainer"][name] = value
        else:
            settings[f"trainer.{name}"] = value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    stages = [{"name": "a", "fit": str(tmp_path / "c.yaml"), "set": settings}]
    (stage,) = read_pipeline(pipeline(tmp_path, stages), "out", {})
    return stage.fingerprint


def test_a_stage_may_go_on_elsewhere_and_in_other_batches_but_not_with_other_settings(tmp_path):
    as_it_was = fingerprint(tmp_path)
    elsewhere = {"num_nodes": 1, "devices": 4, "accelerator": "cpu", "strategy.class_path": "x"}
    assert fingerprint(tmp_path, **elsewhere, batch_size=2, accumulate_grad_batches=64) == as_it_was
    for change in ({"max_steps": 6}, {"seed": 1}, {"precision": "bf16-mixed"}):
        assert fingerprint(tmp_path, **change) != as_it_was


@pytest.mark.parametrize("run", ["say $text --to '$stage/a b'", ["say", "$text", "--to", "$stage/a b"]])
def test_a_value_with_spaces_or_quotes_stays_one_word_of_a_command(tmp_path, run):
    path = pipeline(tmp_path, [{"name": "a", "run": run}], {"text": "it's two words; rm -rf x"})
    (stage,) = read_pipeline(path, "out put", {})
    assert stage.command == ("say", "it's two words; rm -rf x", "--to", "out put/a/a b")
