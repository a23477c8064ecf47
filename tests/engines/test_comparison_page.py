"""The page of a comparison, from a report and what stays of an image."""

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokexport.engines.comparison_page import render_comparison
from tokexport.engines.comparison_plots import ParetoPoint, pareto_set
from tokexport.engines.intervals import Difference
from tokexport.engines.kept_tokens import KeptStage, KeptTokens
from tokexport.engines.precisions import Loss
from tokexport.engines.verdicts import Verdict


def row(recipe: str, accuracy: float, ttft: float, **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "recipe": recipe,
        "methods": [] if recipe == "full" else ["adsc"],
        "compressed": recipe != "full",
        "is_control": False,
        "budget": None,
        "mean_vision_tokens": 576.0 if recipe == "full" else 127.5,
        "flops": {"full": 4e9, "compressed": ttft * 1e8, "reduction": 0.5},
        "kv_bytes_vision": {"full": 4e6, "compressed": 2e6, "reduction": 0.5},
        "ttft_ms": {"median": ttft, "p10": ttft, "p90": ttft},
        "decode_ms_per_token": 5.0,
        "kv_bytes": 2_000_000,
        "bytes_on_disk": 6_300_000,
        "accuracy": accuracy,
        "interval": [accuracy - 0.01, accuracy + 0.01],
        "per_turn": [{"turn": 1, "accuracy": accuracy}],
        "per_kind": {"where_is": {"accuracy": accuracy - 0.05}},
        "relative_to_full": None,
    }
    return usual | changes


def report(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "rows": list(rows) or [row("full", 0.9, 80), row("thin@128", 0.8, 40, budget=128), row("slow", 0.7, 60)],
        "verdicts": [
            Verdict(
                recipe="thin@128",
                control="sample",
                control_tokens=128,
                accuracy="worse",
                difference=-0.02,
                difference_interval=(-0.03, -0.01),
                basis="paired",
                ttft_ratio=1.05,
            ).report()
        ],
        "losses": [],
        "failures": {"small@128": "the nearest is 121 or 144"},
        "settings": {
            "data": {"split": "test", "dialogues": 2000},
            "backend": "ort",
            "metric": "exact",
            "max_new_tokens": 16,
            "budgets": [128],
            "repeats": 9,
            "text_tokens": 36,
            "environment": {"cpu": "A fast one", "gpus": [], "versions": {"torch": "2.13"}},
        },
    }
    return usual | changes


def kept(*weights: float, hidden: str = "") -> KeptTokens:
    stage = KeptStage(where="from layer 1 on", kept=2, weight_N=np.array(weights))
    return KeptTokens(grid=(2, 2), stages=(stage,) if weights else (), hidden=hidden)


def words_of(html: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def test_rows_verdicts_and_failures_are_on_the_page():
    words = words_of(render_comparison(report()))
    assert "thin@128 asked for 128, has 127.5" in words
    assert "sample (128 tokens) worse −2.0 −3.0 to −1.0 1.05" in words
    assert "small@128: the nearest is 121 or 144" in words


def test_losses_stand_on_the_page_where_there_are_several_precisions():
    lost = Difference(mean=-0.012, interval=(-0.02, -0.004), gained=1, lost=5)
    loss = Loss(recipe="slow", precision="int8", of_compression=None, of_precision=lost, of_both=lost)
    words = words_of(render_comparison(report(losses=[loss.report()])))
    shown = words[words.index("slow 6.3") :].replace("\N{NO-BREAK SPACE}", " ")
    assert shown.startswith("slow 6.3 MB 60.0 ms 5.00 ms 70.0 % – −1.2 (−2.0 to −0.4)")
    assert "What precision and compression cost" not in words_of(render_comparison(report()))


def test_the_three_plots_say_in_words_what_they_show():
    html = render_comparison(report())
    labels = re.findall(r'role="img" aria-label="([^"]*)"', html)
    assert [label.split(",")[0] for label in labels] == [
        "Accuracy against the time to the first token",
        "Accuracy against FLOPs",
        "Accuracy against the KV cache",
    ]
    assert "thin@128: 80.0 % at 40" in labels[0]
    assert all(html.count(f">{name}</text>") == 3 for name in ("full", "thin@128", "slow"))


def test_the_pareto_set_is_named_and_bold():
    html = render_comparison(report())
    assert "answers as well as thin@128, full." in words_of(html)
    assert re.findall(r'class="method">\s*<th scope="row">(\S+?)<', html) == ["full", "thin@128"]


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([("a", 1, 50), ("b", 2, 60)], "ab"),
        ([("a", 1, 60), ("b", 2, 50)], "a"),
        ([("a", 1, 50), ("b", 1, 60)], "b"),
        ([("a", 1, 50), ("b", 2, 50)], "a"),
    ],
    ids=["dearer and better", "dearer and worse", "as dear and better", "dearer and as good"],
)
def test_the_pareto_set_holds_what_no_other_beats(points: list[tuple[str, float, float]], best: str):
    given = [
        ParetoPoint(label=label, cost=cost, accuracy=accuracy, interval=(0, 100), is_control=False)
        for label, cost, accuracy in points
    ]
    assert "".join(point.label for point in pareto_set(given)) == best


def test_what_is_lost_to_the_full_model_is_darker():
    # 10 points of 50 are a fifth of the darkest, 70 %; the full model's own cells have no colour.
    html = render_comparison(report(row("full", 0.9, 80), row("thin", 0.8, 40)))
    heat = html[html.index('class="heat"') :].partition("</table>")[0]
    assert re.findall(r"var\(--vision\) (\d+)%", heat) == ["14"] * 3
    assert "where is" in heat


def test_kept_patches_are_drawn_over_each_image_and_what_is_hidden_is_said():
    image = Image.new("RGB", (8, 8), "red")
    given = {"thin": [kept(1, 0, 0, 1)] * 2, "attentive": [kept(hidden="nobody knows")] * 2}
    html = render_comparison(report(), [image, image], given)
    assert html.count('<use href="#image-0"/>') == html.count('<use href="#image-1"/>') == 1
    assert html.count('id="image-') == 2
    words = words_of(html)
    assert "from layer 1 on: 2 tokens, of 2 x 2 patches" in words
    assert "No picture: nobody knows." in words


def test_the_page_fetches_nothing_and_obeys_no_name():
    hostile = "<script>alert(1)</script>"
    html = render_comparison(report(row("full", 0.9, 80), row(hostile, 0.8, 40), failures={hostile: hostile}))
    assert "<script" not in html
    assert "http:" not in html
    assert "https:" not in html
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:href|src)="([^"]*)"', html))
