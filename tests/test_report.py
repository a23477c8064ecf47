"""What the reports say, and that the HTML one needs nothing but itself."""

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tokexport.engines.pages import setting_rows
from tokexport.engines.report import ReportDocuments, render_html, render_markdown, write_reports
from tokexport.errors import BundleError
from tokexport.exporter.bundle import Bundle

HOSTILE = '<script>alert("1")</script> | $x_{$ `rm` [a](b) *c* #010203'

# 576 tokens in layers 0 and 1, 144 in layers 2 and 3: 360 on average, 62.5 %.
PLAN: dict[str, Any] = {
    "recipe": "tiny_adsc",
    "checkpoint": "someone/tiny",
    "vision_tokens": {"emitted": 576, "entering_llm": 576, "per_layer": [576, 576, 144, 144]},
    "mean_vision_tokens": 360.0,
    "prompt_tokens": {"text": 36, "full": 612, "compressed": 612},
    "dtype": "float32",
    "flops": {"full": 2_000_000_000_000, "compressed": 1_200_000_000_000, "reduction": 0.4},
    "predicted_prefill_speedup": 1.67,
    "kv_bytes": {"full": 612_000_000, "compressed": 396_000_000, "reduction": 0.353},
    "kv_bytes_vision": {"full": 576_000_000, "compressed": 360_000_000, "reduction": 0.375},
}


def check(name: str, **changes: Any) -> dict[str, Any]:
    numbers = {"passed": True, "max_abs_diff": 2.5e-5, "cosine": 0.9999999, "tolerance": 1e-4}
    return {"step": "reference vs onnx", "name": name, **numbers, **changes}


def row(method: str, ttft: float, *, engine: str = "ort", **changes: Any) -> dict[str, Any]:
    times = {"ttft_ms": {"median": ttft, "p10": ttft - 2, "p90": ttft + 2}, "vision_ms": 50.0, "prefill_ms": ttft - 50}
    sizes = {"decode_ms_per_token": 9.5, "kv_bytes": 396_000_000, "peak_rss_bytes": 2_500_000_000}
    names = {"engine": engine, "dtype": "float32", "method": method, "compressed": method != "full"}
    return {**names, **times, **sizes, **changes}


def verify(*checks: dict[str, Any]) -> dict[str, Any]:
    passed = all(one["passed"] for one in checks)
    return {"passed": passed, "checks": list(checks), "dtype": "float32", "backend": "ort", "seconds": 8.5}


def bench(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "rows": list(rows),
        "speedup": {"ttft": 1.9, "prefill": 1.5, "predicted_prefill": 1.67},
        "environment": {"cpu": "A fast one", "threads": 2, "versions": {"torch": "2.13.0"}},
        **changes,
    }


def documents(**changes: Any) -> ReportDocuments:
    whole: dict[str, Any] = {
        "name": "tiny_adsc",
        "plan": PLAN,
        "verify": verify(check("logits")),
        "bench": bench(
            row("full", 350.0, engine="transformers"),
            row("full", 250.0),
            row("adsc", 150.0),
            row("sample", 200.0, is_control=True, predicted_prefill=1.68),
        ),
    }
    return ReportDocuments(**{**whole, **changes})


class Page(HTMLParser):
    """Collects the tags of a page and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] != "style":
            self.text += f" {data}"


def text_of(html: str) -> str:
    return " ".join(Page(html).text.split())


def line_with(markdown: str, *parts: str) -> str:
    return next(line for line in markdown.splitlines() if all(part in line for part in parts))


def test_the_markdown_begins_with_the_headline_numbers():
    head = render_markdown(documents()).partition("\n## ")[0]
    assert "576 -> 360 tokens per layer (62.5 %)" in head
    assert "-40.0 %" in line_with(head, "FLOPs")
    assert "-35.3 %" in line_with(head, "KV cache")
    assert "1.90x" in line_with(head, "First token")
    assert "passed" in line_with(head, "Parity")


def test_the_page_begins_with_the_headline_numbers():
    head = text_of(render_html(documents())).partition("Tokens and what they cost")[0]
    for figure in ("576 → 360", "tokens per layer (62.5 %)", "40.0 %", "35.3 %", "1.90×", "passed"):
        assert figure in head


def test_a_fractional_mean_keeps_one_digit():
    plan = copy.deepcopy(PLAN)
    plan["vision_tokens"]["per_layer"] = [576, 288, 144, -1 + 144]
    assert "576 -> 287.8 tokens per layer (50 %)" in render_markdown(documents(plan=plan))


def test_a_smaller_image_is_compared_with_the_whole_one():
    plan = copy.deepcopy(PLAN)
    plan["vision_tokens"] = {"emitted": 144, "entering_llm": 144, "per_layer": [144] * 4}
    plan["prompt_tokens"]["compressed"] = 180
    assert "576 -> 144 tokens per layer (25 %)" in render_markdown(documents(plan=plan))


def test_layers_with_the_same_number_of_tokens_share_a_line():
    assert "| 0-1 | 576 |\n| 2-3 | 144 |" in render_markdown(documents())


def test_nothing_saved_is_no_negative_zero():
    plan = {**PLAN, "flops": {"full": 10**12, "compressed": 10**12, "reduction": 0.0}}
    assert "**0 %**" in line_with(render_markdown(documents(plan=plan)), "FLOPs", "**")


def answered(**changes: Any) -> dict[str, Any]:
    figure = {"accuracy": 0.75, "questions": 4000, "interval": [0.74, 0.76]}
    setting = {"backend": "ort", "metric": "exact", "dialogues": 2000, "max_new_tokens": 16}
    rest = {"weights": "checkpoint", "ignores_compression": False, "data": {"split": "test"}, "full": None}
    turns = [{"turn": 1, **figure, "questions": 2000}, {"turn": 2, **figure, "questions": 2000}]
    return {**figure, "per_turn": turns, "per_kind": {"counting | x": figure}, **setting, **rest, **changes}


FULL = {"full_accuracy": 0.8, "relative": 0.9375, "relative_interval": [0.92, 0.95]}
LOST = {"difference": -0.05, "difference_interval": [-0.06, -0.04], "gained": 20, "lost": 220}


def test_the_accuracy_stands_in_both_reports():
    shown = documents(accuracy=answered(full=FULL | LOST))
    markdown, page = render_markdown(shown), text_of(render_html(shown))
    assert "| turn 2 | 2,000 | 75.0 % | 74.0 to 76.0 % |" in markdown
    assert "93.8 % (92.0 to 95.0 %) of the full model's 80.0 %; -5.00 points (-6.00 to -4.00)" in markdown
    assert "turn 2 2,000 75.0 % 74.0 to 76.0 %" in page
    assert "80.0 % with all tokens" in line_with(markdown, "| Accuracy |")


def test_an_accuracy_that_was_not_measured_is_said_to_be_so():
    assert "Measure it with `tokexport eval`" in render_markdown(documents())
    assert "Measure it with tokexport eval" in text_of(render_html(documents()))


def test_an_accuracy_of_random_weights_is_said_to_mean_nothing():
    assert "the weights are random" in render_markdown(documents(accuracy=answered(weights="random")))


def test_an_accuracy_without_the_compression_is_said_to_be_so():
    assert "transformers runs all tokens" in render_markdown(
        documents(accuracy=answered(ignores_compression=True, backend="transformers"))
    )


def test_a_kind_from_outside_breaks_no_table():
    assert "| counting \\| x | 4,000 |" in render_markdown(documents(accuracy=answered()))


def loyal(**changes: Any) -> dict[str, Any]:
    share = {"mean": 0.9, "interval": [0.85, 0.95]}
    kl = {"mean": 0.125, "interval": [0.1, 0.15], "p50": 0.05, "p90": 0.5, "p99": 2.0}
    figure = {"token_agreement": share, "answer_agreement": share, "agreeing_prefix": {**share, "mean": 7.25}}
    figure |= {"first_token_kl": kl, "questions": 50, "answer_tokens": 9.5, "ttft_ms": {"full": 90.0, "own": 60.0}}
    setting = {"backend": "ort", "dialogues": 50, "max_new_tokens": 64, "weights": "checkpoint", "reselect": False}
    turns = [{"turn": 1, "question": "What | is it?", **figure}, {"turn": 2, "question": "How many?", **figure}]
    rest = {"per_turn": turns, "per_kind": {}, "full": "out/full", "data": {"images": "photos"}}
    return {**figure, **setting, **rest, **changes}


def test_loyalty_stands_in_both_reports():
    shown = documents(loyalty=loyal())
    markdown, page = render_markdown(shown), text_of(render_html(shown))
    cells = "90.0 % (85.0 to 95.0) | 7.2 of 9.5 | 90.0 % (85.0 to 95.0) | 0.12 (0.1 to 0.15) | 0.05, 0.5, 2 |"
    assert f"| turn 2 | 50 | {cells}" in markdown
    assert "asked in turn: What \\| is it? How many?" in markdown
    assert "turn 2 50 90.0 % (85.0 to 95.0)" in page
    assert "first token after 90.0 ms with all tokens, 60.0 ms compressed" in markdown
    assert "| Loyalty | **90.0 %** | of the full model's tokens; 90.0 % of its answers" in markdown


def test_loyalty_that_was_not_measured_has_no_section():
    assert "Loyalty" not in render_markdown(documents()) + render_html(documents())


def test_loyalty_of_random_weights_is_said_to_mean_little():
    assert "the weights are random, so loyalty means" in render_markdown(documents(loyalty=loyal(weights="random")))


def test_what_choosing_anew_gains_stands_in_both_reports():
    pair = {name: {"continuing": 0.5, "reselected": 0.75} for name in ("accuracy", "read_tokens", "ttft_ms")}
    entry = {**pair, "difference": 0.25, "difference_interval": [0.2, 0.3], "gained": 30, "lost": 5, "questions": 100}
    shown = documents(accuracy=answered(reselect={**entry, "per_turn": [{"turn": 2, **entry}]}))
    assert "| turn 2 | 50.0 -> 75.0 % | +25.00 (+20.00 to +30.00) | 30 gained, 5 lost |" in render_markdown(shown)
    assert "turn 2 50.0 → 75.0 % +25.00 (+20.00 to +30.00) 30 gained, 5 lost" in text_of(render_html(shown))


@pytest.mark.parametrize("missing", ["verify", "bench"])
def test_a_page_fetches_nothing(missing: str):
    for html in (render_html(documents()), render_html(documents(**{missing: None}))):
        page = Page(html)
        assert "http:" not in html
        assert "https:" not in html
        assert "@import" not in html
        assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in page.tags}
        references = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src")]
        assert all(value and value.startswith("#") for value in references)


def test_references_inside_the_plots_meet_one_target_each():
    tags = Page(render_html(documents())).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for _, attrs in tags if "href" in attrs} <= set(ids)


def test_every_plot_says_what_it_shows():
    tags = Page(render_html(documents())).tags
    plots = [attrs for tag, attrs in tags if tag == "svg"]
    assert [plot["role"] for plot in plots] == ["img"] * 3
    alts = [str(plot["aria-label"]) for plot in plots]
    assert "layers 0-1: 576; layers 2-3: 144" in alts[0]
    assert "ort adsc: vision 50 ms, prefill 100 ms" in alts[1]
    assert "ort adsc: measured 2.00x, predicted 1.67x" in alts[2]
    assert [tag for tag, _ in tags].count("title") == 4


def test_plots_take_their_colours_and_letters_from_the_page():
    html = render_html(documents())
    drawings = html[html.index("<svg") :]
    assert "var(--kept)" in drawings
    assert "#01020" not in html
    assert ">ort adsc</text>" in drawings


def test_the_same_documents_make_the_same_page():
    assert render_html(documents()) == render_html(documents())


def test_hostile_names_are_shown_and_not_obeyed():
    rows = (row("full", 250.0, engine=HOSTILE), row(HOSTILE, 150.0, engine=HOSTILE))
    hostile = documents(
        name=HOSTILE,
        plan={**PLAN, "checkpoint": HOSTILE},
        verify=verify(check(HOSTILE, note=HOSTILE, step=HOSTILE)),
        bench=bench(*rows, environment={"cpu": HOSTILE}),
    )
    html, markdown = render_html(hostile), render_markdown(hostile)
    assert "<script" not in html
    assert '<script>alert("1")</script> |' in text_of(html)
    assert "<script" not in markdown.replace("\\<", "")
    assert all("\\|" in line for line in markdown.splitlines() if "alert" in line)


def test_line_breaks_in_a_note_do_not_break_the_table():
    markdown = render_markdown(documents(verify=verify(check("logits", note="one\ntwo"))))
    assert line_with(markdown, "| logits |").endswith("| one two |")


def test_a_plan_alone_is_a_report():
    alone = documents(verify=None, bench=None)
    for text in (render_markdown(alone), text_of(render_html(alone))):
        assert "not measured" in text
        assert "not checked" in text
        assert "Read this first" not in text
        assert "Environment" not in text


def test_a_sound_and_useful_artefact_has_no_findings():
    assert "Read this first" not in render_markdown(documents())


def test_a_failed_check_is_named_at_the_top_and_marked_in_the_ladder():
    broken = verify(check("image features"), check("logits", passed=False, max_abs_diff=0.5, cosine=0.2))
    markdown = render_markdown(documents(verify=broken))
    assert "Parity failed: logits" in markdown.partition("\n## ")[0]
    assert "**FAILED** | 0.5 |" in line_with(markdown, "| logits |")
    assert "passed | 2.50e-05 |" in line_with(markdown, "| image features |")
    text = text_of(render_html(documents(verify=broken)))
    assert "Parity failed 1 of 2 checks within tolerance" in text
    assert "logits ✕ failed 0.5" in text


def test_checks_stand_under_their_step():
    checks = [check("logits", step="one"), check("logits", step="two"), check("cache", step="one")]
    markdown = render_markdown(documents(verify=verify(*checks)))
    first, _, second = markdown.partition("### one")[2].partition("### two")
    assert first.count("| logits |") == first.count("| cache |") == second.count("| logits |") == 1


def test_a_comparison_of_tokens_has_no_cosine():
    tokens = check("greedy tokens", max_abs_diff=0.0, tolerance=0.0, cosine=None)
    markdown = render_markdown(documents(verify=verify(tokens)))
    assert "| greedy tokens | passed | 0 | 0 | – | – | – |" in markdown
    assert "greedy tokens ✓ passed 0 0 – – – –" in text_of(render_html(documents(verify=verify(tokens))))


def test_a_difference_that_is_not_a_number_is_shown_as_such():
    broken = documents(verify=verify(check("logits", passed=False, max_abs_diff=float("nan"), cosine=float("nan"))))
    assert "**FAILED** | nan |" in render_markdown(broken)
    assert "✕ failed nan" in text_of(render_html(broken))


@pytest.mark.parametrize(
    ("control", "remark"),
    [
        (120.0, "ort adsc is slower than its control sample by 25.0 %."),
        (148.0, "ort adsc is slower than its control sample by 1.4 %, within the spread of the runs."),
    ],
    ids=["clearly", "within noise"],
)
def test_a_method_slower_than_its_control_is_marked(control: float, remark: str):
    rows = (row("full", 250.0), row("adsc", 150.0), row("sample", control, is_control=True))
    markdown = render_markdown(documents(bench=bench(*rows)))
    assert remark in markdown.partition("\n## ")[0]
    assert "slower than its control" in line_with(markdown, "| ort adsc |")
    assert "slower" not in line_with(markdown, "| ort sample (control) |")
    assert "▲ slower than its control sample" in text_of(render_html(documents(bench=bench(*rows))))


def test_a_control_on_another_engine_is_no_rival():
    rows = (row("full", 250.0), row("adsc", 150.0), row("sample", 100.0, engine="other", is_control=True))
    assert "slower" not in render_markdown(documents(bench=bench(*rows)))


def test_compression_that_costs_time_is_marked():
    rows = (row("full", 200.0), row("adsc", 250.0))
    markdown = render_markdown(documents(bench=bench(*rows)))
    assert "ort adsc is slower than all tokens by 25.0 %." in markdown


def test_the_square_shows_each_engine_with_and_without_compression():
    markdown = render_markdown(documents())
    assert "| transformers | 350 | – | – |\n| ort | 250 | 150 | 1.67x |" in markdown
    assert "250 1.40× as fast 150 2.33× as fast 1.67×" in text_of(render_html(documents()))


def test_two_dtypes_of_an_engine_are_two_lines():
    single = (row("full", 250.0), row("adsc", 150.0))
    half = (row("full", 120.0, dtype="float16"), row("adsc", 80.0, dtype="float16"))
    markdown = render_markdown(documents(bench=bench(*single, *half)))
    assert "| ort float32 | 250 | 150 | 1.67x |\n| ort float16 | 120 | 80 | 1.50x |" in markdown


def test_rows_with_the_required_fields_only_are_enough():
    bare = row("adsc", 150.0)
    del bare["method"]
    assert "| ort compressed | – | 150 (148 to 152) |" in render_markdown(documents(bench=bench(bare)))
    assert "ort compressed" in render_html(documents(bench=bench(bare)))


def test_a_missed_gate_is_named_at_the_top():
    gates = [
        {"name": "ttft", "value": 1.9, "bar": 1.3, "passed": True},
        {"name": "prefill", "value": 1.5, "bar": 1.6, "passed": False},
        {"name": "bytes", "meaning": "off the plan", "value": 8, "bar": 0, "is_upper": True, "passed": False},
    ]
    markdown = render_markdown(documents(bench=bench(row("full", 250.0), row("adsc", 150.0), gates=gates)))
    head = markdown.partition("\n## ")[0]
    assert "Gate prefill missed: 1.5, wanted at least 1.6." in head
    assert "Gate bytes missed: 8, wanted at most 0." in head
    assert "Gate ttft" not in head
    assert "| prefill | 1.5 | at least 1.6 | **MISSED** |  |" in markdown
    assert "| bytes | 8 | at most 0 | **MISSED** | off the plan |" in markdown


def test_what_the_plan_foretold_is_printed_beside_what_was_measured():
    figure = {"name": "disk_bytes", "foretold": 2_000_000, "measured": 2_010_000, "measured_of_foretold": 1.005}
    measured = bench(row("full", 250.0), row("adsc", 150.0), foretold={"figures": [figure], "machine": None})
    assert "| artefact on disk | 2.0 MB | 2.0 MB | +0.50 % |" in render_markdown(documents(bench=measured))
    assert "artefact on disk" in text_of(render_html(documents(bench=measured)))
    assert "foretold" not in render_markdown(documents())


def test_where_the_time_goes_is_printed():
    op = {"op": "MatMul", "count": 7, "ms": 98.5, "share": 0.985}
    phase = {"run_ms": 110.0, "kernels_ms": 100.0, "ops": [op], "method": {"nodes": 3, "ms": 2.0, "share": 0.02}}
    profile = {"phases": {"prefill": phase}, "method": {"ms": 2.0, "of_full_prefill": 0.01}}
    measured = bench(row("full", 250.0), row("adsc", 150.0), profile=profile)
    markdown = render_markdown(documents(bench=measured))
    assert "| prefill | MatMul | 7 | 98.5 ms | 98.5 % |" in markdown
    assert "the method takes 2 ms, 1.0 % of the prefill of all tokens" in markdown
    assert "Where the time goes" in text_of(render_html(documents(bench=measured)))
    assert "Where the time goes, as" not in render_markdown(documents())


def test_the_environment_is_printed():
    text = text_of(render_html(documents()))
    for fact in ("A fast one", "torch 2.13.0", "backend ort"):
        assert fact in text


def artefact(path: Path) -> Bundle:
    """Return an artefact that has reports and a recipe's name, all that the report reads of it."""
    recipe = {"name": "tiny_adsc", "model": {"family": "llava15", "checkpoint": "mini"}}
    return Bundle(path, cast(Any, SimpleNamespace(recipe=recipe)))


def test_both_reports_are_written_beside_the_documents(tmp_path: Path):
    bundle = artefact(tmp_path)
    bundle.write_report("plan.json", PLAN)
    bundle.write_report("bench.json", json.loads(json.dumps(bench(row("full", 250.0), row("adsc", 150.0)))))
    markdown, html = write_reports(bundle)
    assert (markdown, html) == (tmp_path / "reports/report.md", tmp_path / "reports/report.html")
    assert markdown.read_text(encoding="utf-8").startswith("# tiny_adsc\n")
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>\n")


def test_an_artefact_without_a_plan_has_no_report(tmp_path: Path):
    with pytest.raises(BundleError, match=r"no reports/plan\.json"):
        write_reports(artefact(tmp_path))


def test_settings_stand_in_words():
    found = setting_rows({"cpu": "a fast one", "memory_bytes": 25_276_510_208, "gpus": (), "kinds": ["a", "b"]})
    assert found == [("cpu", "a fast one"), ("memory", "25.28 GB"), ("gpus", "none"), ("kinds", "a, b")]
