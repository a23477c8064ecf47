"""What ships with tokexport is found by name, everything else by its path."""

from pathlib import Path

import pytest

from tests.conftest import MINI
from tokexport.exporter import bundled
from tokexport.exporter.bundled import BUNDLED_MODEL, list_bundled, local_directory


def test_the_model_whose_processor_random_weights_take_ships():
    assert BUNDLED_MODEL in list_bundled()
    assert local_directory(BUNDLED_MODEL) == MINI


def test_the_names_that_ship_are_those_of_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bundled, "BUNDLED", tmp_path)
    for name in ("second", "first"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text("no model")
    assert list_bundled() == ["first", "second"]


@pytest.mark.parametrize("name", ["", ".", "..", "./mini", "mini/", "{absolute}"])
def test_only_the_bare_name_means_what_ships(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mini").mkdir()
    found = local_directory(name.format(absolute=tmp_path / "mini"))
    assert found is not None
    assert MINI.parent not in (found.resolve(), *found.resolve().parents)


@pytest.mark.parametrize("name", ["nothing", "mini/config.json", "someone/mini"])
def test_what_is_no_directory_is_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert local_directory(name) is None
