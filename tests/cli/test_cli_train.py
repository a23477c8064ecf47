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
