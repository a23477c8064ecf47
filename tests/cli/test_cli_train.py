"""``tokexport train``: what it writes and prints, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run
from tests.training.conftest import write_llava_data
from tokexport.exporter.checkpoint import describe_model, open_weights
from tokexport.recipes.load import load_recipe, override
from tokexport.training.mini import STAGES

SHORT = ("--steps", 1, "--batch-size", 2, "--rank", 2)


def test_a_model_is_tuned_on_data_in_llavas_format(run: Run, recipe: Path, checkpoint: Path, tmp_path: Path):
    data, images = write_llava_data(tmp_path)
    options = ("--data", data, "--images", images, "--gradient-checkpointing", "--accumulate", 2, "--json", "-q")
    outcome = run("train", "adsc", "-r", recipe, "--model", checkpoint, *options, *SHORT, "-o", tmp_path / "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.document == {"adapter": str(tmp_path / "out" / "adapter")}
    # What --adapter takes afterwards.
    chosen = override(load_recipe(str(recipe)), model=str(checkpoint), adapter=outcome.document["adapter"])
    name = "model.language_model.layers.3.mlp.down_proj.weight"
    tuned, plain = (
        open_weights(describe_model(table)).load(name)
        for table in (chosen.model, override(load_recipe(str(recipe)), model=str(checkpoint)).model)
    )
    assert not torch.equal(tuned, plain)


def test_a_model_is_tuned_on_made_scenes_where_there_are_no_data(run: Run, tmp_path: Path):
    options = ("-r", "mini_adsc", "--weights", "random", "--num-layers", 3, "--steps", 1, "--batch-size", 1)
    outcome = run("train", "adsc", *options, "-o", tmp_path, "--curriculum", "none")
    assert (outcome.code, outcome.out) == (0, "")
    assert "adsc mini_adsc, step 1, " in outcome.err
    assert f"the adapter is in {tmp_path / 'adapter'}; build with it: --recipe mini_adsc --adapter " in outcome.err
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.fixture
def mixing(recipe: Path, tmp_path: Path) -> Path:
    """Return a recipe whose compressor has yet to be trained."""
    return untrained(recipe, tmp_path / "mixing.toml", 'method = "metacompress"\nkeep = 4\nwidth = 8')


def untrained(recipe: Path, path: Path, step: str) -> Path:
    """Write a recipe with a method whose weights are not there yet."""
    path.write_text(f'extends = "{recipe}"\n[[compress]]\n{step}\nweights = "made later"\n')
    return path


def test_a_compressor_is_trained_and_built_in(run: Run, mixing: Path, checkpoint: Path, tmp_path: Path):
    data, images = write_llava_data(tmp_path)
    options = ("--data", data, "--images", images, "--steps", 2, "--batch-size", 2, "--gradient-checkpointing")
    outcome = run(
        "train", "metacompress", "-r", mixing, "--model", checkpoint, *options, "-o", tmp_path / "out", "--json"
    )
    assert outcome.code == 0
    path = tmp_path / "out" / "compressor.safetensors"
    assert outcome.document == {"compressor": str(path)}
    assert "metacompress mixing, step 2, " in outcome.err
    made = ("-r", mixing, "--model", checkpoint, "--compressor", path)
    assert run("build", *made, "-o", tmp_path / "artefact", "--no-bench", "--threads", 1).code == 0
    shown = run("inspect", tmp_path / "artefact", "--json").document["methods"]
    assert [(entry["method"], entry["scope"], entry["parameters"]) for entry in shown] == [
        ("metacompress", "/stages/metacompress/", 2 * 64 * 8 + 8)
    ]


def test_an_oracle_tells_how_far_a_compressor_is_from_the_best_matrix(
    run: Run, mixing: Path, checkpoint: Path, tmp_path: Path
):
    data, images = write_llava_data(tmp_path)
    options = ("--data", data, "--images", images, "--steps", 2, "--batch-size", 2, "--oracle")
    outcome = run(
        "train", "metacompress", "-r", mixing, "--model", checkpoint, *options, "-o", tmp_path / "out", "--json"
    )
    assert outcome.code == 0
    assert outcome.document["matrices"] == str(tmp_path / "out" / "oracle.safetensors")
    # The recipe's own is not trained yet.
    assert list(outcome.document["comparison"]) == ["pool", "oracle"]
    assert "metacompress is left out of the comparison: there are no compressor weights made later" in outcome.err
    assert "oracle mixing, step 2, " in outcome.err
    assert f"oracle: divergence {outcome.document['comparison']['oracle']['divergence']:.4g}, entropy " in outcome.err


@pytest.fixture
def ranking(recipe: Path, tmp_path: Path) -> Path:
    """Return a recipe whose network has yet to be trained."""
    return untrained(recipe, tmp_path / "ranking.toml", 'method = "relevance"\nkeep = 6\nchannels = [4]')


def test_a_relevance_network_is_trained_and_built_in(run: Run, ranking: Path, checkpoint: Path, tmp_path: Path):
    data, images = write_llava_data(tmp_path)
    options = ("--data", data, "--images", images, "--steps", 2, "--batch-size", 2, "--conversations", 4)
    outcome = run(
        "train", "relevance", "-r", ranking, "--model", checkpoint, *options, "-o", tmp_path / "out", "--json"
    )
    assert outcome.code == 0
    path = tmp_path / "out" / "compressor.safetensors"
    assert outcome.document["compressor"] == str(path)
    assert outcome.document["kept"].keys() == {"network", "attention", "random"}
    assert "of the labels of other conversations, the tokens kept hold: network " in outcome.err
    made = ("-r", ranking, "--model", checkpoint, "--compressor", path)
    saving = ("--gradient-checkpointing", "--accumulate", 2)
    tuned = run("train", "relevance-adapter", *made, *options[:4], *SHORT, *saving, "-o", tmp_path / "tuned", "--json")
    assert (tuned.code, tuned.document) == (0, {"adapter": str(tmp_path / "tuned" / "adapter")})
    assert "behind relevance ranking, step 1, " in tuned.err
    assert f"build with it: --recipe ranking --compressor {path} --adapter " in tuned.err
    adapter = ("--adapter", tuned.document["adapter"])
    assert run("build", *made, *adapter, "-o", tmp_path / "artefact", "--no-bench", "--threads", 1).code == 0


def test_a_model_is_not_tuned_behind_a_network_that_is_yet_to_be_trained(
    run: Run, ranking: Path, checkpoint: Path, tmp_path: Path
):
    data, images = write_llava_data(tmp_path)
    options = ("--data", data, "--images", images, *SHORT, "-o", tmp_path / "out")
    outcome = run("train", "relevance-adapter", "-r", ranking, "--model", checkpoint, *options)
    assert outcome.code == 1
    assert outcome.error.startswith("there are no compressor weights made later")


@pytest.mark.parametrize(("option", "value"), [("adapter", "mini_adsc"), ("dtype", "float16"), ("quantize", "int8")])
def test_an_option_without_effect_on_tuning_is_refused(run: Run, ranking: Path, option: str, value: str):
    outcome = run("train", "relevance-adapter", "-r", ranking, f"--{option}", value)
    assert outcome.code == 1
    assert outcome.error == f"--{option} {value} has no effect on this training; leave it out"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gradient-checkpointing"], "--gradient-checkpointing has no effect on this training; leave it out"),
        (["--set", "compress=[]"], "recipe ranking has the methods []; this training is for relevance alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_ranked_is_refused_in_one_line(
    run: Run, ranking: Path, checkpoint: Path, tmp_path: Path, arguments: list[str], expected: str
):
    data, images = write_llava_data(tmp_path)
    options = ("--data", data, "--images", images, "--steps", 1, *arguments)
    outcome = run("train", "relevance", "-r", ranking, "--model", checkpoint, *options, "-o", tmp_path / "out")
    assert (outcome.code, outcome.error.startswith(expected)) == (1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "metacompress", "--compressor", "x"], "--compressor x has no effect on this training; leave it out"),
        (["train", "metacompress", "--clip", "0"], "max_grad_norm = 0.0 must be a number above 0"),
        (
            ["train", "metacompress", "--set", "compress=[]"],
            "recipe mixing has the methods []; this training is for metacompress, alone or before adsc",
        ),
        (
            ["export"],
            "there are no compressor weights made later; train them with 'tokexport train' and give the file ",
        ),
        (["export", "-r", "mini_adsc", "--compressor", "x"], "--compressor x is for one method with weights, and "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_mixed_is_refused_in_one_line(
    run: Run, mixing: Path, checkpoint: Path, tmp_path: Path, arguments: list[str], expected: str
):
    command = arguments[: 2 if arguments[0] == "train" else 1]
    data, images = write_llava_data(tmp_path)
    more = ["--data", str(data), "--images", str(images), "--steps", "1"] if command[0] == "train" else []
    outcome = run(
        *command, "-r", mixing, "--model", checkpoint, "-o", tmp_path / "out", *more, *arguments[len(command) :]
    )
    assert outcome.code == 1
    assert outcome.error.startswith(expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_mini_model_is_trained_from_nothing(run: Run, tmp_path: Path):
    # Compiling takes longer than these few steps.
    with torch.compiler.set_stance("force_eager"):
        outcome = run("train", "mini", "--share", 0.0001, "-o", tmp_path, "--json", "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.document == {"checkpoint": str(tmp_path / "checkpoint")}
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    for stage in STAGES:
        assert json.loads((tmp_path / stage.name / "log.jsonl").read_text())["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "{data}", "--accumulate", "3"], "accumulate = 3 must divide the batch size 2, so that all parts "),
        (["--data", "{data}", "--learning-rate", "-1"], "learning_rate = -1.0 must be a number above 0"),
        (["--data", "nowhere.json"], "nowhere.json cannot be read (No such file or directory); give a file in LLaVA's"),
        (["--data", "{data}", "--images", "nowhere"], "{data}, entry 0: there is no image nowhere/0.png; give the "),
        (["--data", "{picture}"], "{picture} is no JSON in UTF-8 ("),
        (["--data", "{empty}"], "{empty}, entry 0: conversations must be a list of question and answer in turn, at "),
        (["--images", "nowhere"], "--images nowhere has no effect on this training; leave it out"),
        (["--data", "{data}", "--adapter", "x"], "--adapter x has no effect on this training; leave it out"),
        (["--data", "{data}", "--dtype", "float16"], "--dtype float16 has no effect on this training; leave it out"),
        ([], "made scenes have 336 x 336 pixels, and the model takes 56; give conversations with --data"),
        (["--model", "nowhere"], "there is no model directory nowhere; give a directory, a hub id like "),
        (
            ["--data", "{data}", "-r", "mini_full"],
            "recipe mini_full has the methods []; tuning is for ADSC alone, e.g. recipe mini_adsc",
        ),
        (["--data", "{broken}"], "{folder}/broken.png cannot be read as an image ("),
        (["--data", "{long}"], "the first turn takes "),
        (["--data", "{data}", "-o", "{data}"], "{data} cannot be made (File exists); choose another folder"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_cannot_be_tuned_is_refused_in_one_line(
    run: Run, recipe: Path, checkpoint: Path, picture: Path, tmp_path: Path, arguments: list[str], expected: str
):
    (tmp_path / "broken.png").write_text("no image")
    asked = {"from": "human", "value": "What?"}
    files = {
        "empty": [{"conversations": []}],
        "broken": [
            {
                "image": "broken.png",
                "conversations": [{**asked, "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}],
            }
        ],
        "long": [{"conversations": [asked, {"from": "gpt", "value": "word " * 3000}]}],
    }
    named = {"data": write_llava_data(tmp_path / "llava")[0], "picture": picture, "folder": tmp_path}
    for name, entries in files.items():
        named[name] = tmp_path / f"{name}.json"
        named[name].write_text(json.dumps(entries))
    if "{data}" in arguments and "--images" not in arguments:
        arguments = [*arguments, "--images", str(named["data"].parent / "images")]
    before = ("train", "adsc", "-r", recipe, "--model", checkpoint, "-o", tmp_path / "out", *SHORT)
    outcome = run(*before, *(argument.format(**named) for argument in arguments))
    assert outcome.code == 1
    assert outcome.error.startswith(expected.format(**named))


@pytest.mark.parametrize(
    "arguments",
    [["mini", "--share", "0"], ["mini", "--share", "2"], ["adsc", "--steps", "0"], ["adsc", "--curriculum", "x"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]):
    assert run("train", *arguments).code == 2


def test_a_run_with_other_options_does_not_go_on(run: Run, recipe: Path, checkpoint: Path, tmp_path: Path):
    data, images = write_llava_data(tmp_path)
    before = ("train", "adsc", "-r", recipe, "--model", checkpoint, "--data", data, "--images", images, *SHORT)
    assert run(*before, "-o", tmp_path / "out").code == 0
    outcome = run(*before, "-o", tmp_path / "out", "--curriculum", "none")
    assert outcome.code == 1
    assert "belongs to another run (curriculum was 'mild-first', is 'none'); " in outcome.error
