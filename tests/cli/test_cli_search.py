"""``tokexport search``: its document, its recipe, and what it refuses."""

from pathlib import Path

import pytest

from tests.cli.conftest import Run

SHORT = ("--dialogues", 1, "--screening", 1, "--finalists", 1, "--repeats", 1, "--threads", 1)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny_full.toml"
    path.write_text(
        'description = "for tests"\n[model]\nfamily = "llava15"\ncheckpoint = "someone/tiny"\n'
        "[session]\nmax_text_tokens = 128\nmax_images = 2\n[plan]\ntext_tokens = 8\n"
    )
    return path


def test_the_winners_recipe_is_built_by_build(run: Run, full: Path, checkpoint: Path, tmp_path: Path):
    out = tmp_path / "search"
    found = run("search", "-b", "flops=0.7", "-r", full, "--model", checkpoint, "--method", "divprune", *SHORT,
                "-o", out, "--json")  # fmt: skip
    assert found.code == 0
    assert found.document.keys() >= {"winner", "rows", "screened", "budgets", "summary", "failures", "settings"}
    assert found.document["winner"].startswith("divprune-")
    assert "Pareto set of accuracy and FLOPs" in found.err
    assert "The winner is divprune-" in found.err
    built = run("build", "-r", out / "winner.toml", "-o", tmp_path / "built", "--no-verify", "--no-bench", "--json")
    assert built.code == 0
    row = next(row for row in found.document["rows"] if row["recipe"] == found.document["winner"])
    assert built.document["plan"]["mean_vision_tokens"] == row["mean_vision_tokens"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-b", "flop=0.5"], "a budget of 'flop' is not known; did you mean 'flops'?"),
        (["-b", "kv=20ms"], "the budget kv=20ms is in 'ms', expected"),
        (["-b", "kv=1GB"], "the budget kv=1GB is met by the uncompressed model, which takes 7.5 MB; give less"),
        (["-b", "flops=0.5", "-r", "mini_adsc"], "recipe mini_adsc is compressed already (adsc); give the recipe of"),
        (["-b", "flops=0.5", "--method", "adcs"], "there is no method 'adcs'; did you mean 'adsc'?"),
        (["-b", "flops=0.001"], "no candidate meets the budgets; the nearest is"),
        (["-b", "flops=0.5", "--also", "nothing"], "there is no recipe 'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_searched_is_refused_in_a_line(run: Run, tmp_path: Path, arguments: list[str], problem: str):
    outcome = run("search", *arguments, *SHORT, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.error.startswith(problem)
    assert outcome.out == ""
    assert not (tmp_path / "out").exists()


def test_a_search_without_a_budget_is_wrong_usage(run: Run):
    outcome = run("search")
    assert outcome.code == 2
    assert "Missing option '--budget'" in outcome.err
