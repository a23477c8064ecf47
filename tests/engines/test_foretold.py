"""What a benchmark says of the plan's forecast, and how it is shown."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NUM_LAYERS
from tokexport.engines.cost_text import foretold_remark, foretold_rows
from tokexport.engines.foretold import foretold_and_measured
from tokexport.engines.worker import Workload
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import design

WORKLOAD = Workload(text_tokens=8, new_tokens=2)
ROW = {
    "engine": "ort",
    "prefill_ms": 4.0,
    "decode_ms_per_token": 2.0,
    "peak_rss_bytes": 140_000_000,
    "baseline_rss_bytes": 90_000_000,
}


def figures(bundle: Bundle, **changes: Any) -> dict[str, dict[str, Any]]:
    report = foretold_and_measured(bundle, design(bundle.recipe), {**ROW, **changes}, WORKLOAD, threads=1)
    return {figure["name"]: figure for figure in report["figures"]}


def test_disk_memory_and_times_are_compared(tiny_adsc: Bundle):
    found = figures(tiny_adsc)
    assert found.keys() == {"disk_bytes", "peak_rss_bytes", "prefill_ms", "decode_ms_per_token"}
    files = [path for path in tiny_adsc.path.rglob("*") if path.is_file() and "reports" not in path.parts]
    assert found["disk_bytes"]["measured"] == sum(path.stat().st_size for path in files)
    for figure in found.values():
        assert figure["measured_of_foretold"] == figure["measured"] / figure["foretold"]


def test_memory_begins_with_what_the_process_held_before(tiny_adsc: Bundle):
    peak = figures(tiny_adsc)["peak_rss_bytes"]
    terms = peak["terms"]
    assert terms["interpreter"] == 90_000_000
    # Room for 10 text tokens: 16 + 8 + 8 + 4 vision tokens in the layers, keys and values of 2 heads of 16 numbers.
    assert terms["kv_cache"] == (NUM_LAYERS * 10 + 36) * 2 * 2 * 16 * 4
    assert peak["foretold"] == terms["total"] == sum(value for name, value in terms.items() if name != "total")


def test_of_engines_that_run_the_checkpoint_only_the_disk_is_foretold(tiny_adsc: Bundle):
    report = foretold_and_measured(
        tiny_adsc, design(tiny_adsc.recipe), {**ROW, "engine": "torch-eager"}, WORKLOAD, threads=1
    )
    assert [figure["name"] for figure in report["figures"]] == ["disk_bytes"]
    assert report["machine"] is None


def test_an_artefact_that_is_not_what_was_foretold_shows_it(tiny_adsc: Bundle, copied: Any):
    bundle: Bundle = copied(tiny_adsc)
    path: Path = bundle.path / "tokexport.json"
    path.write_text(path.read_text() + " " * 1_000_000)
    assert figures(bundle)["disk_bytes"]["measured_of_foretold"] > 1.5


BENCH = {
    "foretold": {
        "machine": {"gflops_per_s": 180.4, "gb_per_s": 20.06, "precision": "int8", "threads": 2},
        "figures": [
            {"name": "disk_bytes", "foretold": 2e6, "measured": 2.01e6, "measured_of_foretold": 1.005},
            {
                "name": "peak_rss_bytes",
                "foretold": 2e8,
                "measured": 1.9e8,
                "measured_of_foretold": 0.95,
                "terms": {"interpreter": 100_000_000, "total": 200_000_000},
            },
            {"name": "prefill_ms", "foretold": 100.0, "measured": 125.0, "measured_of_foretold": 1.25},
        ],
    }
}


def test_sizes_are_shown_in_percent_and_times_in_multiples_of_the_least():
    assert list(foretold_rows(BENCH)) == [
        ("artefact on disk", "2.0 MB", "2.0 MB", "+0.50 %"),
        ("most memory", "200.0 MB", "190.0 MB", "-5.00 %"),
        ("of it Python and ONNX Runtime", "100.0 MB", "", ""),
        ("prefill, least time", "100 ms", "125 ms", "1.25x"),
    ]
    assert foretold_remark(BENCH) == (
        "Least times are for 180 GFLOP/s in int8 on 2 threads and 20.1 GB/s, as measured beside."
    )


@pytest.mark.parametrize("older", [{}, {"foretold": {}}], ids=str)
def test_a_report_that_was_made_before_has_no_rows(older: dict[str, Any]):
    assert list(foretold_rows(older)) == []
    assert foretold_remark(older) == ""
