"""What commands print where, and the exit code of everything that can go wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Outcome, Run, in_process
from tests.conftest import recipe_for
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.schema import Recipe

# What is printed where


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["build", "--help"], ["run", "-h"]], ids=str)
def test_help_is_printed_on_stdout(run: Run, arguments: list[str]):
    outcome = run(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage: " in outcome.out


def test_help_names_every_command(run: Run):
    out = run("--help").out
    for name in ("build", "export", "plan", "verify", "bench", "eval", "run", "chat", "inspect", "list", "doctor"):
        assert f"  {name} " in out


def test_the_version_is_printed(run: Run):
    outcome = run("--version")
    assert outcome.code == 0
    assert "0.1.0" in outcome.out


def test_importing_the_command_line_loads_no_heavy_package():
    code = "import sys, tokexport.cli; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "numpy", "PIL", "matplotlib"}
    assert heavy & set(printed.split()) == set()


def test_the_plan_as_json_is_the_only_thing_on_stdout(run: Run):
    outcome = run("plan", "--recipe", "llava15_adsc", "--json")
    assert outcome.code == 0
    assert outcome.document["vision_tokens"]["emitted"] == 576
    assert "vision tokens" in outcome.err


def test_the_plan_for_people_leaves_stdout_empty(run: Run):
    outcome = run("plan", "--recipe", "mini_adsc")
    assert (outcome.code, outcome.out) == (0, "")
    assert "576 -> 264.625 tokens (45.9 %)" in outcome.err


def test_budgets_are_whole_numbers_with_commas(run: Run, tmp_path: Path):
    outcome = run("compare", "mini_full", "--budgets", "192,x", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "'192,x' is no list of whole numbers, e.g. 192,128,64" in outcome.err
    assert not (tmp_path / "out").exists()


def test_recipes_are_compared_without_budgets(run: Run, tmp_path: Path):
    outcome = run("compare", "mini_adsc", "--dialogues", 4, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.error.startswith("0 of the recipes mini_adsc are without [[compress]]")


def test_recipes_are_compared_from_a_list_with_commas_too(run: Run, tmp_path: Path):
    outcome = run("compare", "mini_adsc_64", "--recipes", "mini_adsc, mini_adsc_128", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.error.startswith("0 of the recipes mini_adsc_64, mini_adsc, mini_adsc_128 are without [[compress]]")


def test_a_comparison_of_nothing_is_wrong_usage(run: Run, tmp_path: Path):
    outcome = run("compare", "-o", tmp_path / "out")
    assert outcome.code == 2
    assert "no recipe is given; give names, TOML files, or folders of them" in outcome.err


@pytest.mark.parametrize("option", ["--recipes", "--precisions", "--budgets"])
@pytest.mark.parametrize("given", ["a,", ",a", "a,,b", ""])
def test_a_list_with_nothing_behind_a_comma_is_wrong_usage(run: Run, tmp_path: Path, option: str, given: str):
    outcome = run("compare", "mini_full", option, given, "-o", tmp_path / "out")
    assert outcome.code == 2
    assert f"{given!r} has nothing before or behind a comma; leave the comma out" in outcome.err


def test_the_plan_of_a_smaller_image_compares_with_the_whole_one(run: Run):
    outcome = run("plan", "--recipe", "mini_full", "--set", 'compress=[{method="resize", keep=144}]')
    assert "mean             576 -> 144 tokens (25 %)" in outcome.err


@pytest.mark.parametrize("command", [["plan"], ["list"], ["doctor"]], ids=str)
def test_quiet_leaves_stderr_empty(run: Run, command: list[str]):
    outcome = run(*command, "--quiet", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.document


def test_the_plan_says_what_it_takes_here(run: Run):
    outcome = run("plan", "--recipe", "mini_adsc", "--json")
    document = outcome.document
    assert document["disk_bytes"]["graphs"].keys() == {"vision_encoder", "embed_tokens", "decoder_model_merged"}
    # 14.6 MB of decoder, 7.2 of tower and projector, 0.4 of embeddings, and the graphs.
    assert round(document["disk_bytes"]["total"] / 1e6, 1) == 23.5
    assert document["fits_here"].keys() == {"disk", "memory"}
    assert "time_bound" not in document
    assert "the artefact on disk, in MB" in outcome.err


def test_the_plan_for_another_machine_takes_its_figures(run: Run):
    outcome = run("plan", "--recipe", "llava15_adsc", "--machine", "180,20", "--json")
    bound = outcome.document["time_bound"]
    # 3760.5 GFLOP at 180 GFLOP/s; 26.43 GB of weights and 0.3 of cache at 20 GB/s.
    assert bound["prefill_ms"]["compressed"] == pytest.approx(20_892, rel=1e-3)
    assert bound["decode_ms_per_token"]["compressed"] == pytest.approx(1336.5, rel=1e-3)
    assert "fits_here" not in outcome.document
    assert "least time, at 180 GFLOP/s and 20.0 GB/s" in " ".join(outcome.err.split())


def test_the_plan_for_this_machine_measures_it(run: Run):
    bound = run("plan", "--recipe", "mini_adsc", "--machine", "here", "--threads", 1, "--json").document["time_bound"]
    assert (bound["machine"]["precision"], bound["machine"]["threads"]) == ("float32", 1)
    assert 0 < bound["prefill_ms"]["compressed"] < bound["prefill_ms"]["full"]


def test_a_budget_is_solved(run: Run):
    proposals = run("plan", "--recipe", "llava15_full", "--solve", "kv=0.433", "--json").document["proposals"]
    assert proposals
    assert all(0.4 < proposal["kv"] <= 0.433 for proposal in proposals[:1])


def test_inspect_shows_model_graphs_and_files(run: Run, artefact: Path):
    outcome = run("inspect", artefact, "--json")
    assert outcome.code == 0
    assert outcome.document["vision_tokens"]["per_layer"] == [16, 8, 8, 4]
    assert outcome.document["graphs"].keys() == {"vision_encoder", "embed_tokens", "decoder_model_merged"}
    assert "onnx/embed_tokens.onnx" in outcome.document["files"]
    assert "decoder_model_merged" in outcome.err


def test_list_names_recipes_methods_families_and_engines(run: Run):
    document = run("list", "--json").document
    assert document.keys() == {"recipes", "methods", "families", "engines"}
    assert "mini_adsc" in document["recipes"]
    assert {"adsc", "sample", "random"} <= document["methods"].keys()
    assert all(text for kind in document.values() for text in kind.values())


def test_list_for_people_shows_the_same_names(run: Run):
    err = run("list").err
    assert all(name in err for name in ("llava15_adsc", "sample", "llava15", "ort-portable"))


def test_doctor_says_which_engines_run_here(run: Run):
    document = run("doctor", "--json").document
    engines = {engine["name"]: engine for engine in document["engines"]}
    assert engines["torch-eager"]["available"]
    assert all(engine["available"] or engine["reason"] for engine in engines.values())
    assert document["environment"]["cores"] >= 1
    assert min(document["machine"]["gflops_per_s"], document["machine"]["gb_per_s"]) > 0


# Errors that a user can act on: exit code 1 and one line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "mini_adcs"], "there is no recipe 'mini_adcs'; did you mean 'mini_adsc'?"),
        (["--recipe", "nothing.toml"], "there is no recipe file nothing.toml; give a path that exists, or a name from"),
        (["--set", "export.dtpye=float16"], "[export] has no key 'dtpye'; did you mean 'dtype'?"),
        (["--set", "export.dtype=float61"], "[export] dtype = \"float61\" is not known; did you mean 'float16'?"),
        (["--set", "modle.seed=1"], "recipe mini_adsc has no table 'modle'; did you mean 'model'?"),
        (["--set", "compress.0.method=adcs"], "there is no method 'adcs'; did you mean 'adsc'?"),
        (["--set", "compress.0.fase=0.5"], "[[compress]] adsc has no key 'fase'; did you mean 'phase'?"),
        (["--set", "compress.0.phase=2"], "[[compress]] adsc phase = 2.0 must be at least 0 and below 1"),
        (["--set", "compress.7.phase=0.5"], "--set compress.7.phase: '7' is no index of a list with 1 entries"),
        (
            ["--set", "compress.0.drops.0.keep=600"],
            "[[compress]] adsc drop before layer 3: keep = 600 is more than",
        ),
        (["--set", "phase"], "--set phase must look like key=value, e.g. export.dtype=float16"),
        (["--set", "model.family=llava51"], "there is no family 'llava51'; did you mean 'llava15'?"),
        (["--set", "plan.text_tokens=-1"], "[plan] text_tokens = -1 must be at least 0"),
        (
            ["--num-layers", "99", "--weights", "random"],
            "num_layers = 99 is more than the 8 decoder layers of mini; choose a smaller number",
        ),
        (["--model", "nowhere"], "there is no model directory nowhere; give a directory, a hub id like"),
        (["--machine", "fast"], "the machine fast must be 'here', or GFLOP/s and GB/s as 'tokexport doctor' prints"),
        (["--machine", "here", "--dtype", "bfloat16"], "backend 'ort' does not run graphs in bfloat16, only in"),
        (["--solve", "kv"], "the budget kv must be a part between 0 and 1, e.g. kv=0.433"),
        (["--solve", "flop=0.5"], "a budget of 'flop' is not known; did you mean 'flops'?"),
        (["--solve", "kv=0.001"], "no schedule of up to 3 halvings keeps only kv = 0.001; the least is kv = "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_recipe_that_cannot_be_planned_is_refused(run: Run, arguments: list[str], expected: str):
    outcome = run("plan", *arguments)
    assert outcome.code == 1
    assert outcome.error.startswith(expected)
    assert outcome.out == ""


@pytest.mark.parametrize("command", ["run", "chat", "verify", "build"])
def test_an_unknown_engine_is_refused_with_the_nearest(run: Run, artefact: Path, tmp_path: Path, command: str):
    arguments = {"build": ["-o", tmp_path / "out"], "run": [artefact, "-p", "Hello."]}.get(command, [artefact])
    outcome = run(command, *arguments, "--backend", "ort-portabel")
    assert outcome.code == 1
    assert outcome.error == "there is no backend 'ort-portabel'; did you mean 'ort-portable'?"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [["run", "-p", "Hello."], ["chat"], ["verify"], ["bench"], ["eval"], ["inspect"]], ids=str
)
def test_a_folder_that_is_no_artefact_is_refused(run: Run, tmp_path: Path, command: list[str]):
    outcome = run(*command, tmp_path)
    assert outcome.code == 1
    assert outcome.error == (
        f"{tmp_path} has no tokexport.json, so it is no artefact; make one with: tokexport build -o {tmp_path}"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--top-k", "5"],
        ["--temperature", "-1"],
        ["--temperature", "1", "--top-p", "0"],
        ["--temperature", "nan"],
        ["--temperature", "1", "--top-p", "nan"],
        ["--temperature", "1", "--seed", "99999999999999999999"],
        ["--max-text-tokens", "3"],
        ["--max-images", "0", "--image", "{picture}"],
        ["--image", "missing.png"],
        ["--image", "."],
        ["--backend", "torch-eager", "--model", "nowhere"],
    ],
    ids=" ".join,
)
def test_a_question_that_cannot_be_answered_is_refused(run: Run, artefact: Path, picture: Path, arguments: list[str]):
    outcome = run("run", artefact, "-p", "Hello.", *(part.format(picture=picture) for part in arguments))
    assert outcome.code == 1
    assert len(outcome.error) > 20


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_image_is_refused(run: Run, artefact: Path, tmp_path: Path, content: bytes):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    outcome = run("run", artefact, "-p", "Hello.", "--image", path)
    assert outcome.code == 1
    assert str(path) in outcome.error


def test_an_empty_prompt_is_refused(run: Run, artefact: Path):
    outcome = run("run", artefact, "-p", " ")
    assert (outcome.code, outcome.error) == (1, "the prompt is empty; ask something")


def test_a_prompt_longer_than_the_cache_is_refused_with_its_length(run: Run, artefact: Path):
    outcome = run("run", artefact, "-p", "word " * 200)
    assert outcome.code == 1
    assert outcome.error.endswith("do not fit into a cache for 128; shorten the prompt or raise --max-text-tokens")


# Wrong usage: exit code 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["biuld"],
        ["plan", "--recipes", "x"],
        ["plan", "--text-tokens", "-1"],
        ["plan", "--threads", "1"],
        ["plan", "--weights", "zero"],
        ["plan", "--num-layers", "0"],
        ["build", "--dtype", "float8"],
        ["build", "--threads", "0"],
        ["run"],
        ["run", "out"],
        ["run", "out", "-p", "Hello.", "--max-images", "-1"],
        ["run", "out", "-p", "Hello.", "--max-new-tokens", "many"],
        ["bench", "out", "--repeats", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]):
    outcome = run(*arguments)
    assert outcome.code == 2
    assert "Error: " in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


# Asking


def test_run_streams_the_answer_to_stdout(run: Run, artefact: Path, picture: Path):
    arguments = (artefact, "-p", "What is it?", "--image", picture, "--max-new-tokens", 5)
    text, document = run("run", *arguments), run("run", *arguments, "--json").document
    assert text.code == 0
    assert text.out.strip() == document["text"]
    assert document.keys() >= {"text", "token_ids", "prompt_tokens", "ttft_ms", "total_ms"}
    assert "first token after" in text.err


def test_run_quietly_prints_the_answer_alone(run: Run, artefact: Path):
    outcome = run("run", artefact, "-p", "Hello.", "--max-new-tokens", 2, "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.endswith("\n")


def test_run_ends_its_answer_where_the_cache_is_full(run: Run, artefact: Path):
    outcome = run("run", artefact, "-p", "Hello.", "--max-text-tokens", 40, "--max-new-tokens", 500, "--json")
    assert outcome.code == 0
    assert outcome.document["ended_by"] == "full cache"


def test_run_takes_several_images(run: Run, artefact: Path, picture: Path):
    outcome = run("run", artefact, "-p", "Hello.", "--image", picture, "--image", picture, "--max-new-tokens", 2)
    assert outcome.code == 0


def test_run_draws_the_same_answer_with_the_same_seed(run: Run, artefact: Path):
    arguments = (artefact, "-p", "Hello.", "--temperature", 3, "--max-new-tokens", 6, "--json")
    first, same, other = (run("run", *arguments, "--seed", seed).document["token_ids"] for seed in (1, 1, 2))
    assert first == same != other


def chat(run: Run, artefact: Path, *lines: str) -> Outcome:
    stdin = "".join(f"{line}\n" for line in lines)
    return run("chat", artefact, "--max-new-tokens", 2, "--json", stdin=stdin)


def answers(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_chat_answers_every_line_of_its_input(run: Run, artefact: Path, picture: Path):
    outcome = chat(run, artefact, "Hello.", f"/image {picture}", "What is it?", "", "And now?")
    assert outcome.code == 0
    assert len(answers(outcome)) == 3


def test_chat_begins_anew_after_reset(run: Run, artefact: Path):
    first, second, again = answers(chat(run, artefact, "Hello.", "And?", "/reset", "Hello."))
    assert again["token_ids"] == first["token_ids"]
    assert again["prompt_tokens"] == first["prompt_tokens"]
    assert second["prompt_tokens"] != first["prompt_tokens"]


@pytest.fixture
def choosing(checkpoint: Path, exported: Callable[[Recipe], Bundle]) -> Path:
    return exported(recipe_for(checkpoint, {"method": "fastv", "keep": 4, "layer": 1})).path


def test_chat_chooses_anew_and_says_what_that_costs(run: Run, choosing: Path, picture: Path):
    arguments = ("chat", choosing, "--image", picture, "--max-new-tokens", 2, "--reselect", "--json")
    outcome = run(*arguments, stdin="What is it?\nAnd now?\n")
    first, second = answers(outcome)
    assert first["continuing"] is None
    assert (first["vision_tokens"], second["vision_tokens"]) == (16, 16)
    assert second["prompt_tokens"] > first["prompt_tokens"] > second["continuing"]["text_tokens"]
    assert f"chosen anew for this question: {second['prompt_tokens']} text and 16 vision tokens read" in outcome.err
    assert f"continuing on the cache reads {second['continuing']['text_tokens']} text tokens in" in outcome.err


def test_chat_chooses_anew_quietly(run: Run, choosing: Path, picture: Path):
    outcome = run(
        "chat", choosing, "--image", picture, "--max-new-tokens", 2, "--reselect", "-q", stdin="Is it?\nAnd?\n"
    )
    assert (outcome.code, outcome.err) == (0, "")


def test_chat_refuses_to_choose_anew_what_is_never_chosen(run: Run, artefact: Path):
    outcome = run("chat", artefact, "--reselect", stdin="Hello.\n")
    assert outcome.code == 1
    assert outcome.error.startswith(f"{artefact} keeps the same vision tokens whatever is asked, so --reselect has no")


def test_chat_ends_with_quit(run: Run, artefact: Path):
    outcome = chat(run, artefact, "Hello.", "/quit", "never asked")
    assert (outcome.code, len(answers(outcome))) == (0, 1)


def test_chat_names_its_commands_where_one_is_unknown(run: Run, artefact: Path):
    outcome = chat(run, artefact, "/picture x", "Hello.")
    assert (outcome.code, len(answers(outcome))) == (0, 1)
    assert "there is no command /picture; /image FILE, /reset and /quit are known" in " ".join(outcome.err.split())


def test_chat_without_input_ends_at_once(run: Run, artefact: Path):
    assert chat(run, artefact).code == 0


def test_chat_from_a_file_stops_at_a_question_that_fails(run: Run, artefact: Path):
    outcome = chat(run, artefact, "Hello.", "/image missing.png", "What is it?", "never asked")
    assert outcome.code == 1
    assert outcome.error == "there is no image missing.png; give the path of an image file"
    assert len(answers(outcome)) == 1


def test_a_reader_that_goes_away_ends_the_command_without_a_traceback():
    process = in_process("list", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in err
