"""How many first answers choices of tokens keep, on a few questions of the bundled model."""

import torch
from click.testing import CliRunner

from benchmarks.ceiling_relevance import Answers, main, too_high_and_low


class Digits:
    """Decodes a token into its own number."""

    def decode(self, token: int) -> str:
        return str(token)


def test_every_choice_is_asked():
    result = CliRunner().invoke(main, ["--conversations", "2", "--kind", "counting", "--threads", "1"])
    assert result.exit_code == 0, result.output
    header, _, shares, signs, means = result.stdout.splitlines()
    assert header == "| kind | all tokens | network | attention | labels | objects | evenly |"
    found = shares.split(" | ")
    assert found[0] == "| counting"
    assert {float(share.rstrip(" |")) for share in found[1:]} <= {0.0, 50.0, 100.0}
    for share, sign in zip(found[1:], signs.split(" | ")[1:], strict=True):
        assert sum(map(int, sign.rstrip(" |").split(", "))) == round((100 - float(share.rstrip(" |"))) / 50)
    assert means.removeprefix("| all kinds alike") == shares.removeprefix("| counting")


def test_a_recipe_of_another_method_is_refused_in_one_line():
    result = CliRunner().invoke(main, ["--recipe", "mini_adsc"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: recipe mini_adsc has the methods ['adsc']")
    assert result.stderr.count("\n") == 1


def test_wrong_counts_are_told_apart():
    said, target = torch.tensor([3, 5, 5]), torch.tensor([3, 4, 7])
    assert too_high_and_low([Answers(said == target, said, target)], Digits()) == "1, 1"
    assert too_high_and_low([Answers(said == said, said, said)], Digits()) == "0, 0"
