"""Folders of averages against sums in float64."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rewarm import cli
from rewarm.commands import average as averages
from rewarm.commands.average import merge_weights, write_average, write_greedy_average
from rewarm.functional.averaging import ema_weights, mean_weights
from tests import tiny
from tests.checkpoints.saved_models import KINDS, build, save
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def read(folder):
    """A written folder, in the dtype that its config says."""
    return AutoModelForCausalLM.from_pretrained(folder)


def saved(tmp_path, kinds=("folder", "file", "shards"), dtype=torch.float32, **fields):
    """Some models, and their paths."""
    models = [build(seed, dtype, **fields) for seed in range(len(kinds))]
    paths = [
        str(save(m, tmp_path / f"{i}.{k}", k)) for i, (m, k) in enumerate(zip(models, kinds, strict=True))
    ]
    return models, paths


def assert_mean(folder, models, weights, **tolerance):
    found = read(folder).state_dict()
    columns = [model.state_dict() for model in models]
    assert found.keys() == columns[0].keys()
    for name, tensor in found.items():
        expected = sum(w * column[name].double() for w, column in zip(weights, columns, strict=True))
        torch.testing.assert_close(
            tensor.double(),
            expected,
            **tolerance or {"rtol": 1e-6, "atol": 1e-6},
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_models_saved_in_every_way_have_the_mean_of_their_weights(tmp_path):
    models, paths = saved(tmp_path, KINDS)
    for number, order in enumerate(itertools.islice(itertools.permutations(range(4)), 0, 24, 5)):
        write_average([paths[i] for i in order], str(tmp_path / f"mean{number}"))
        assert_mean(tmp_path / f"mean{number}", models, mean_weights(4))


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], [0.0, 1.0, 0.0], ema_weights(0.2, 3)])
def test_weights_go_to_the_checkpoints_in_their_order(tmp_path, weights):
    models, paths = saved(tmp_path)
    write_average(paths, str(tmp_path / "mean"), weights)
    assert_mean(tmp_path / "mean", models, weights)
    told = json.loads((tmp_path / "mean" / "average.json").read_text())
    assert [(one["checkpoint"], one["weight"]) for one in told] == list(zip(paths, weights, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_checkpoints_average_to_themselves_to_the_last_bit(tmp_path, kind, dtype):
    model = build(0, dtype)
    path = str(save(model, tmp_path / "model.ckpt", kind))
    write_average([path] * 6, str(tmp_path / "mean"), ema_weights(0.2, 6))
    found = read(tmp_path / "mean").state_dict()
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_bfloat16_is_averaged_in_float32(tmp_path):
    models, paths = saved(tmp_path, ["folder"] * 8, torch.bfloat16)
    write_average(paths, str(tmp_path / "mean"))
    found = read(tmp_path / "mean").state_dict()
    off = 0
    for name, tensor in found.items():
        column = [model.state_dict()[name] for model in models]
        exact = sum(t.double() for t in column) / 8
        half_a_unit = exact.abs() * 2**-8 + 1e-6
        assert ((tensor.double() - exact).abs() <= half_a_unit).all()
        off += int(((sum(t / 8 for t in column).double() - exact).abs() > half_a_unit).sum())
    assert off > 1000  # had they been summed in bfloat16


def test_another_dtype_is_written_and_loaded(tmp_path):
    models, paths = saved(tmp_path, ["folder", "file"], torch.bfloat16)
    write_average(paths, str(tmp_path / "wide"), dtype="float32")
    assert read(tmp_path / "wide").dtype == torch.float32
    assert_mean(tmp_path / "wide", models, [0.5, 0.5])
    write_average([str(tmp_path / "wide"), paths[0]], str(tmp_path / "narrow"), dtype="bfloat16")
    assert read(tmp_path / "narrow").dtype == torch.bfloat16


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_base_has_the_rest_of_the_share(tmp_path, share):
    models, paths = saved(tmp_path)
    write_average(paths[:2], str(tmp_path / "mean"), [0.75, 0.25], base=paths[2], share=share)
    assert_mean(tmp_path / "mean", models, [0.75 * share, 0.25 * share, 1 - share])


def test_a_large_result_is_split_as_transformers_does(tmp_path, monkeypatch):
    models, paths = saved(tmp_path)
    monkeypatch.setattr(averages, "_SHARD_BYTES", 20_000)
    write_average(paths, str(tmp_path / "mean"))
    files = sorted(path.name for path in (tmp_path / "mean").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert max(path.stat().st_size for path in (tmp_path / "mean").glob("*.safetensors")) < 22_000
    assert_mean(tmp_path / "mean", models, mean_weights(3))


def test_tied_weights_are_one_whichever_names_were_saved(tmp_path):
    models, paths = saved(tmp_path, tie_word_embeddings=True)  # a folder has one name, checkpoints have both
    write_average(paths, str(tmp_path / "mean"))
    assert_mean(tmp_path / "mean", models, mean_weights(3))
    loaded = read(tmp_path / "mean")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    sizes = [
        path.stat().st_size
        for path in (Path(paths[0]), tmp_path / "mean")
        for path in path.glob("*.safetensors")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


# --- what stands beside the weights ---------------------------------------------------------------------


def test_a_folders_other_files_are_copied_but_for_its_card(tmp_path):
    _, paths = saved(tmp_path, ["folder", "file"])
    first = Path(paths[0])
    (first / "README.md").write_text("About another model.")
    (first / "additional_chat_templates").mkdir()
    (first / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    write_average(paths, str(tmp_path / "mean"))
    names = {path.relative_to(first) for path in first.rglob("*")} - {Path("README.md")}
    assert {path.relative_to(tmp_path / "mean") for path in (tmp_path / "mean").rglob("*")} == names | {
        Path("average.json")
    }
    for name in names:
        if (first / name).is_file() and name.name not in ("model.safetensors", "config.json"):
            assert (tmp_path / "mean" / name).read_bytes() == (first / name).read_bytes()
    templates = AutoTokenizer.from_pretrained(tmp_path / "mean").chat_template
    assert templates == {"default": tiny.CHAT_TEMPLATE, "tools": "{{ tools }}"}
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (first, tmp_path / "mean")]
    assert [config.pop("_name_or_path") for config in configs]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_of_a_checkpoint_the_folder_is_the_one_that_transformers_would_write(tmp_path, kind):
    model = build(0)
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer", tiny.CHAT_TEMPLATE)
    path = save(model, tmp_path / "model.ckpt", kind, tokenizer=tokenizer)
    write_average([str(path)], str(tmp_path / "mean"))
    save(model, tmp_path / "own", "folder")
    names = {path.name for path in (tmp_path / "own").iterdir()}
    assert {path.name for path in (tmp_path / "mean").iterdir()} == names | {"average.json"}
    for name in names - {"tokenizer_config.json"}:  # in which transformers notes where it was read from
        assert (tmp_path / "mean" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_another_tokenizer_may_be_named(tmp_path, kind):
    path = save(build(0), tmp_path / "model.ckpt", kind)
    other = tiny.save_tokenizer(tmp_path / "other", "{{ messages }}")
    write_average([str(path)], str(tmp_path / "mean"), tokenizer=other)
    assert AutoTokenizer.from_pretrained(tmp_path / "mean").chat_template == "{{ messages }}"


# --- greedy soup ----------------------------------------------------------------------------------------


def near(target):
    """Scores a folder by how near its weights are to some."""

    def score(folder):
        found = read(folder).state_dict()
        return -float(sum((found[name] - tensor).square().sum() for name, tensor in target.items()))

    return score


def test_a_greedy_soup_is_the_mean_of_those_that_help(tmp_path, capsys):
    models = [build(seed) for seed in range(4)]
    with torch.no_grad():
        # The second and the last are the target but for opposite errors; the others are far from it.
        for ours, theirs, base in zip(
            models[1].parameters(), models[3].parameters(), build(9).parameters(), strict=True
        ):
            error = 0.1 * torch.randn_like(base)
            ours.copy_(base + error)
            theirs.copy_(base - error * 1.2)
    paths = [str(save(model, tmp_path / f"{i}.ckpt", "file")) for i, model in enumerate(models)]
    taken = write_greedy_average(paths, str(tmp_path / "soup"), near(build(9).state_dict()))
    assert taken == [paths[1], paths[3]]
    assert_mean(tmp_path / "soup", models, [0, 0.5, 0, 0.5])
    assert capsys.readouterr().out.count("\n") >= 2 * 4 - 1
    assert {path.name for path in tmp_path.iterdir()} == {*(Path(path).name for path in paths), "soup"}


def test_of_a_greedy_soup_with_a_base_the_interpolation_is_scored(tmp_path):
    models, paths = saved(tmp_path)
    middle = {n: 0.5 * models[0].state_dict()[n] + 0.5 * t for n, t in models[2].state_dict().items()}
    taken = write_greedy_average(paths[:2], str(tmp_path / "soup"), near(middle), base=paths[2], share=0.5)
    assert taken == [paths[0]]
    assert_mean(tmp_path / "soup", models, [0.5, 0, 0.5])


# --- the weights ----------------------------------------------------------------------------------------


def test_merge_weights_are_those_of_what_was_asked_for():
    assert merge_weights(4) == [0.25] * 4
    assert merge_weights(6, ema=0.2) == pytest.approx([0.328, 0.082, 0.102, 0.128, 0.160, 0.200], abs=5e-4)
    assert merge_weights(3, ema=0.5, debias=True) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert merge_weights(6, decay="sqrt") == pytest.approx([0.41, 0.17, 0.13, 0.11, 0.10, 0.09], abs=5e-3)
    assert merge_weights(5, decay="linear", end=0.5) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ([], [1 / 3] * 3),
        (["--weights", "0.2", "0.3", "0.5"], [0.2, 0.3, 0.5]),
        (["--ema", "0.5"], [0.25, 0.25, 0.5]),
        (["--ema", "0.5", "--debias"], [1 / 7, 2 / 7, 4 / 7]),
        (["--decay", "linear", "--end", "0.4"], [0.2, 0.2, 0.6]),
    ],
)
def test_the_command_weighs_the_checkpoints_as_it_is_told(tmp_path, options, shares, capsys):
    models, paths = saved(tmp_path)
    cli.main(["average", *paths, "--output", str(tmp_path / "mean"), *options])
    assert_mean(tmp_path / "mean", models, shares)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-1] == [f"{share:.4f}  {path}" for share, path in zip(shares, paths, strict=True)]
    assert printed[-1] == f"wrote {tmp_path / 'mean'}"


def test_the_command_interpolates_with_a_base_in_another_dtype(tmp_path):
    models, paths = saved(tmp_path)
    base = ["--base", paths[2], "--share", "0.4", "--dtype", "bfloat16"]
    cli.main(["average", *paths[:2], "--output", str(tmp_path / "mean"), *base])
    assert_mean(tmp_path / "mean", models, [0.2, 0.2, 0.6], rtol=2**-8, atol=1e-6)
    assert read(tmp_path / "mean").dtype == torch.bfloat16


def test_the_command_cooks_a_greedy_soup_by_a_shell_command(tmp_path, capsys):
    models, paths = saved(tmp_path)
    # The third is the best, the mean of it with the second is no worse, with the first it is.
    asked = 'p = r"""{}/average.json"""; w = [round(r["weight"], 2) for r in json.load(open(p))]; '
    scores = "{(1, 0, 0): 1, (0, 1, 0): 2, (0, 0, 1): 3, (0, 0.5, 0.5): 3, (0.33, 0.33, 0.33): 2}"
    script = f"import json; {asked}print({scores}[tuple(w)])"
    greedy = f"{sys.executable} -c '{script}'"
    cli.main(["average", *paths, "--output", str(tmp_path / "soup"), "--greedy", greedy])
    assert_mean(tmp_path / "soup", models, [0, 0.5, 0.5])
    assert f"0.0000  {paths[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ema", "0.2", "--decay", "linear"], "--ema and --decay: give one of them"),
        (["--weights", "0.5", "0.5", "--greedy", "echo 1 {}"], "--weights and --greedy: give one of them"),
        (["--greedy", "accuracy"], "neither a command with {} in it"),
        (["--greedy", "false {}"], "failed with exit code 1"),
        (["--weights", "1", "1"], "weights must be 0 or more and sum to 1"),
        (["--debias"], "debias is for ema"),
        ([], "intermediate_size is 64 in one, 48 in the other"),
    ],
)
def test_what_the_command_cannot_do_it_says_in_one_line(tmp_path, options, said, capsys):
    save(build(0), tmp_path / "one", "folder")
    save(build(1, **({} if options else {"intermediate_size": 48})), tmp_path / "other.ckpt", "file")
    capsys.readouterr()
    paths = [str(tmp_path / "one"), str(tmp_path / "other.ckpt")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["average", *paths, "--output", str(tmp_path / "mean"), *options])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("rewarm: error: ")
    assert said in message
    assert "\n" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"one", "other.ckpt"}


# --- errors ---------------------------------------------------------------------------------------------


def refused(tmp_path, call):
    """The one line that is said; nothing is left of the output."""
    with pytest.raises(ValueError, match=".") as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "mean" in path.name]
    return str(caught.value)


def changed(tmp_path, **weights):
    """A like model's folder in which some weights are others."""
    model = build(1)
    state = model.state_dict() | {name.replace("__", "."): value for name, value in weights.items()}
    path = save(model, tmp_path / "changed.ckpt", "file")
    saved = torch.load(path)
    saved["state_dict"] = {
        f"policy.model.{name}": value for name, value in state.items() if value is not None
    }
    torch.save(saved, path)
    return str(path)


NORM = "model__norm__weight"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"intermediate_size": 48}, "intermediate_size is 64 in one, 48 in the other"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 1 in one, 2 in the other"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is False in one, True in the other"),
        ({"rope_theta": 500.0}, "rope_parameters is"),
    ],
)
def test_configs_that_differ_are_named(tmp_path, fields, said):
    one = str(save(build(0), tmp_path / "one", "folder"))
    other = str(save(build(1, **fields), tmp_path / "other.ckpt", "file"))
    message = refused(tmp_path, lambda: write_average([one, other], str(tmp_path / "mean")))
    assert said in message
    assert one in message
    assert other in message


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({NORM: torch.ones(31)}, "model.norm.weight has shapes (32,) and (31,)"),
        ({NORM: None}, "only one has model.norm.weight"),
        ({"model__extra": torch.ones(2)}, "only one has model.extra"),
        (
            {NORM: torch.ones(32).bfloat16()},
            "model.norm.weight is torch.float32 and torch.bfloat16; set dtype",
        ),
        ({NORM: torch.full((32,), torch.nan)}, "model.norm.weight has values that are not finite"),
        ({NORM: torch.full((32,), -torch.inf)}, "model.norm.weight has values that are not finite"),
    ],
)
def test_weights_that_differ_are_named(tmp_path, weights, said):
    one, other = str(save(build(0), tmp_path / "one", "folder")), changed(tmp_path, **weights)
    message = refused(tmp_path, lambda: write_average([one, other], str(tmp_path / "mean")))
    assert said in message
    assert "changed.ckpt" in message


def test_tied_weights_with_two_values_are_an_error(tmp_path):
    model = build(0, tie_word_embeddings=True)
    path = save(model, tmp_path / "one.ckpt", "file")
    state = torch.load(path)
    state["state_dict"]["policy.model.lm_head.weight"] = torch.zeros(64, 32)
    torch.save(state, path)
    message = refused(tmp_path, lambda: write_average([str(path)], str(tmp_path / "mean")))
    assert "model.embed_tokens.weight and lm_head.weight are one weight" in message


def test_whole_numbers_are_kept_where_they_agree(tmp_path):
    paths = [str(changed(tmp_path, model__seen=torch.tensor([3, 4])))]
    paths.append(str(Path(paths[0]).rename(tmp_path / "first.ckpt")))
    paths[0] = changed(tmp_path, model__seen=torch.tensor([3, 4]))
    write_average(paths, str(tmp_path / "kept"))
    paths[0] = changed(tmp_path, model__seen=torch.tensor([3, 5]))
    message = refused(tmp_path, lambda: write_average(paths, str(tmp_path / "mean")))
    assert "differ in model.seen, whole numbers that have no mean" in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"weights": [0.5, 0.25]}, "weights must be 0 or more and sum to 1"),
        ({"weights": [1.0]}, "weights is [1.0], for 2 checkpoints"),
        ({"weights": [1.5, -0.5]}, "weights must be 0 or more and sum to 1"),
        ({"share": 0.5}, "base is None and share 0.5: they go together"),
        ({"base": "one", "share": 1.5}, "share is 1.5; it must be in [0, 1]"),
        ({"base": "one"}, "share None: they go together"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of 'float32', 'bfloat16'"),
        ({"tokenizer": "gone"}, "tokenizer 'gone' cannot be loaded"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    save(build(0), Path("one"), "folder")
    save(build(1), Path("other"), "folder")
    assert said in refused(tmp_path, lambda: write_average(["one", "other"], "mean", **arguments))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ema": 0.2, "decay": "linear"}, "give one of them"),
        ({"debias": True}, "debias is for ema"),
        ({"end": 0.1}, "there is no decay"),
        ({"decay": "up"}, "shape is 'up'"),
        ({"decay": "linear", "end": 2.0}, "must fall"),
        ({"ema": 2.0}, "alpha is 2.0"),
    ],
)
def test_weights_that_cannot_be_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        merge_weights(3, **arguments)


def test_an_output_that_is_there_is_kept(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="output .*there is there already"):
        write_average(["gone"], str(tmp_path / "there"))
    with pytest.raises(ValueError, match="output .*there is there already"):
        write_greedy_average(["gone"], str(tmp_path / "there"), lambda folder: 0.0)


def test_what_a_killed_average_left_is_not_in_the_next_one(tmp_path):
    _, paths = saved(tmp_path)
    (tmp_path / ".mean.partial").mkdir()
    (tmp_path / ".mean.partial" / "stale.json").write_text("")
    write_average(paths, str(tmp_path / "mean"))
    assert not (tmp_path / "mean" / "stale.json").exists()
    assert not (tmp_path / ".mean.partial").exists()


def test_without_checkpoints_there_is_no_average(tmp_path):
    with pytest.raises(ValueError, match="checkpoints is empty"):
        write_average([], str(tmp_path / "mean"))


# --- memory ---------------------------------------------------------------------------------------------

LARGE = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 8}


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def taken(file_bytes, small, large, output):
    """In a process of its own: the memory that averaging took, in bytes."""
    write_average(small, output + " small")  # loads all that it needs
    averages._SHARD_BYTES = file_bytes
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    write_average(large, output)
    return memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process"
)
def test_memory_is_that_of_one_written_file_however_many_checkpoints_there_are(tmp_path):
    models = {"small": build(0), "large": build(0, **LARGE)}
    size = sum(tensor.nbytes for tensor in models["large"].state_dict().values())
    assert size > 150e6
    saved = {
        name: [str(save(model, tmp_path / f"{name}.{kind}", kind)) for kind in ("file", "shards", "folder")]
        for name, model in models.items()
    }

    def peak(share, times):
        output = str(tmp_path / f"mean-{share}-{times}")
        (found,) = on_ranks(1, taken, int(share * size) + 1, saved["small"], saved["large"] * times, output)
        return found / size

    for share, times in ((1.0, 1), (1.0, 3), (0.1, 3)):
        # Beside the file one tensor on its way, and what Python needs.
        assert peak(share, times) < share + 0.15, (share, times)
