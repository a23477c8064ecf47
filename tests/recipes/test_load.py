"""Recipes: those that ship, how one builds on another, single values, and what is refused."""

import re
from pathlib import Path

import pytest

from tests.conftest import recipe_for
from tokexport.errors import RecipeError
from tokexport.exporter.export import design, planned
from tokexport.recipes.load import (
    DEFAULT_RECIPE,
    list_recipes,
    load_changed,
    load_recipe,
    merged,
    override,
    parse_recipe,
    recipe_toml,
)
from tokexport.recipes.schema import Recipe

MODEL = {"family": "llava15", "checkpoint": "mini"}


def parsed(**tables: object) -> Recipe:
    return parse_recipe("mine", {"model": MODEL, **tables})


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_says_what_it_is(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_plans_without_a_checkpoint(name: str):
    made, report = planned(load_recipe(name))
    assert report["vision_tokens"]["per_layer"] == list(made.plan.per_layer)
    assert (report["flops"]["reduction"] > 0) == bool(made.methods)


@pytest.mark.parametrize("name", [name for name in list_recipes() if " per layer" in load_recipe(name).description])
def test_a_shipped_description_tells_the_tokens_that_the_plan_has(name: str):
    said = re.search(r"([\d.]+) of (\d+) vision tokens per layer", load_recipe(name).description)
    _, report = planned(load_recipe(name))
    assert said is not None
    assert float(said[1]) == pytest.approx(report["mean_vision_tokens"], abs=0.5)
    assert int(said[2]) == report["vision_tokens"]["emitted"]


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("mini")])
def test_what_a_recipe_of_the_mini_model_learned_ships_and_fits(name: str):
    made = design(load_recipe(name))
    assert made.open_weights().shapes
    learning = [step.options["weights"] for step in made.recipe.compress if "weights" in step.options]
    assert "untrained" not in learning
    assert {"adsc": made.recipe.model.adapter, "metacompress": learning}.get(name.split("_")[1], "nothing")


def test_the_default_recipe_ships():
    assert DEFAULT_RECIPE in list_recipes()


def test_a_recipe_is_read_from_a_path(tmp_path: Path):
    path = tmp_path / "own.toml"
    path.write_text('[model]\nfamily = "llava15"\ncheckpoint = "mini"\n')
    assert load_recipe(str(path)) == parse_recipe("own", {"model": MODEL})


def test_a_recipe_lays_its_tables_over_those_it_extends(tmp_path: Path):
    path = tmp_path / "own.toml"
    path.write_text(
        'extends = "bench_adsc"\n[export]\ndtype = "float16"\n[model.architecture.text_config]\nvocab_size = 9\n'
    )
    recipe, base = load_recipe(str(path)), load_recipe("bench_adsc")
    assert recipe.export.dtype == "float16"
    assert recipe.model.architecture["text_config"] == {**base.model.architecture["text_config"], "vocab_size": 9}
    assert recipe.compress == base.compress


def test_a_list_replaces_the_list_it_inherits():
    base = {"a": [1, 2, 3], "b": {"c": 1, "d": 2}}
    assert merged(base, {"a": [4], "b": {"c": 5}}) == {"a": [4], "b": {"c": 5, "d": 2}}
    assert base == {"a": [1, 2, 3], "b": {"c": 1, "d": 2}}


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(RecipeError, match="recipe a extends itself: a -> a"):
        load_recipe("a.toml")


def test_files_that_extend_each_other_are_refused(tmp_path: Path):
    (tmp_path / "a.toml").write_text(f'extends = "{tmp_path / "b.toml"}"\n')
    (tmp_path / "b.toml").write_text(f'extends = "{tmp_path / "a.toml"}"\n')
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(str(tmp_path / "a.toml"))


def test_a_file_may_have_the_name_of_the_recipe_it_extends(tmp_path: Path):
    (tmp_path / "mini_full.toml").write_text('extends = "mini_full"\n[plan]\ntext_tokens = 5\n')
    assert load_recipe(str(tmp_path / "mini_full.toml")).plan.text_tokens == 5


def test_a_file_is_found_beside_the_one_that_extends_it(tmp_path: Path):
    (tmp_path / "base.toml").write_text('extends = "mini_full"\n[plan]\ntext_tokens = 5\n')
    (tmp_path / "own.toml").write_text('extends = "base.toml"\n')
    assert load_recipe(str(tmp_path / "own.toml")).plan.text_tokens == 5


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ('export.dtype="float16"', lambda recipe: recipe.export.dtype == "float16"),
        ("export.dtype=float16", lambda recipe: recipe.export.dtype == "float16"),
        (" export.dtype = float16 ", lambda recipe: recipe.export.dtype == "float16"),
        ("plan.text_tokens=5", lambda recipe: recipe.plan.text_tokens == 5),
        ("name=a=b", lambda recipe: recipe.name == "a=b"),
        ("compress.0.phase=0.5", lambda recipe: recipe.compress[0].options["phase"] == 0.5),
        ("compress.0.drops.1.keep=100", lambda recipe: recipe.compress[0].options["drops"][1]["keep"] == 100),
        ("compress=[]", lambda recipe: recipe.compress == ()),
        ('compress=[{method="sample", keep=9}]', lambda recipe: recipe.compress[0].options == {"keep": 9}),
        (
            "model.architecture.text_config.vocab_size=9",
            lambda recipe: recipe.model.architecture == {"text_config": {"vocab_size": 9}},
        ),
    ],
)
def test_a_setting_changes_one_value(setting: str, read):  # pyright: ignore
    assert read(load_recipe("mini_adsc", [setting]))


def test_a_setting_leaves_everything_else_as_it_was():
    changed, plain = load_recipe("mini_adsc", ["compress.0.drops.1.keep=40"]), load_recipe("mini_adsc")
    drops = [{"layer": 3, "keep": 121}, {"layer": 5, "keep": 40}]
    assert changed.compress[0].options == {**plain.compress[0].options, "drops": drops}
    assert (changed.model, changed.export, changed.session) == (plain.model, plain.export, plain.session)


def test_of_two_settings_of_one_key_the_last_counts():
    assert load_recipe("mini_adsc", ["plan.text_tokens=5", "plan.text_tokens=6"]).plan.text_tokens == 6


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("export.dtype", "--set export.dtype must look like key=value, e.g. export.dtype=float16"),
        ("=3", "--set =3 must look like key=value"),
        ("compress.1.phase=0", "--set compress.1.phase: '1' is no index of a list with 1 entries (counted from 0)"),
        ("compress.x.phase=0", "--set compress.x.phase: 'x' is no index of a list with 1 entries"),
        ("compress.-1.phase=0", "--set compress.-1.phase: '-1' is no index of a list with 1 entries"),
        ("model.family.x=0", "--set model.family.x: 'x' lies below the plain value 'llava15'"),
        ("export.dtyp=float16", "[export] has no key 'dtyp'; did you mean 'dtype'?"),
        ("exprot.dtype=float16", "recipe mini_adsc has no table 'exprot'; did you mean 'export'?"),
        ("export.dtype=float15", "[export] dtype = \"float15\" is not known; did you mean 'float16'?"),
        ("plan.text_tokens=many", '[plan] text_tokens must be a whole number, not "many"'),
        ("session.max_text_tokens=0", "[session] max_text_tokens = 0 must be at least 1"),
        ("session.max_images=-1", "[session] max_images = -1 must be at least 0"),
        ("plan.text_tokens=-1", "[plan] text_tokens = -1 must be at least 0"),
        ("model.num_layers=0", "[model] num_layers = 0 must be at least 1"),
        ("quantize.decoder=int2", '[quantize] decoder = "int2" is not known; did you mean \'int'),
        (
            "quantize.embed_tokens=int4",
            '[quantize] embed_tokens = "int4" is not known; a table of embeddings takes int8',
        ),
        ("quantize.block_size=48", "[quantize] block_size = 48 must be one of (16, 32, 64, 128, 256)"),
        ('quantize.keep=["lm_head"]', "[quantize] keep says what is not quantized, and nothing is; say what is"),
        ("export=3", "[export] must be a table, not 3"),
        ("compress=3", "compress must be an array of tables; write [[compress]] with two pairs of brackets"),
        ("compress.0.method=3", '[[compress]] number 0 needs a method, e.g. method = "adsc"'),
        ("compress=[3]", "[[compress]] number 0 needs a method"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(setting: str, text: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe("mini_adsc", [setting])
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("compress.0.phaze=0.5", "[[compress]] adsc has no key 'phaze'; did you mean 'phase'?"),
        ("compress.0.method=adcs", "there is no method 'adcs'; did you mean 'adsc'?"),
        ("model.family=llava16", "there is no family 'llava16'; did you mean 'llava15'?"),
        ("model.architecture.text_config.vocab=3", "[model.architecture.text_config] has no key 'vocab'; "),
        ("model.architecture.text_confg.vocab_size=3", "[model.architecture] has no key 'text_confg'; did you mean "),
    ],
)
def test_a_name_unknown_to_the_model_or_the_method_is_refused_when_planning(setting: str, text: str):
    with pytest.raises(RecipeError) as caught:
        planned(load_recipe("mini_adsc", [setting]))
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({}, "recipe mine needs a table [model] with family and checkpoint"),
        ({"model": {"family": "llava15"}}, "[model] needs the key 'checkpoint'"),
        ({"model": MODEL, "compres": []}, "recipe mine has no table 'compres'; did you mean 'compress'?"),
        ({"model": MODEL, "compress": {"method": "adsc"}}, "compress must be an array of tables"),
        (
            {"model": {**MODEL, "weights": "randon"}},
            "[model] weights = \"randon\" is not known; did you mean 'random'?",
        ),
    ],
)
def test_a_recipe_with_wrong_tables_is_refused(table: dict[str, object], text: str):
    with pytest.raises(RecipeError) as caught:
        parse_recipe("mine", table)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mini_asdc", "there is no recipe 'mini_asdc'; did you mean 'mini_adsc'?"),
        ("zzz", "there is no recipe 'zzz'; choose one of: bench_adsc, "),
        ("nowhere.toml", "there is no recipe file nowhere.toml; give a path that exists, or a name"),
        ("no/where", "there is no recipe file no/where; "),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused(name: str, text: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("content", [b"[model\n", b"a = 1\na = 2\n", b"\xff\xfe"], ids=["syntax", "twice", "no text"])
def test_a_file_that_is_no_toml_is_refused_by_its_name(tmp_path: Path, content: bytes):
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe .*broken\.toml is not valid TOML: "):
        load_recipe(str(path))


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_written_as_toml_is_read_as_the_same_recipe(name: str, tmp_path: Path):
    recipe = load_recipe(name)
    (tmp_path / "written.toml").write_text(recipe_toml(recipe), encoding="utf-8")
    assert load_recipe(str(tmp_path / "written.toml")) == recipe


def test_a_written_recipe_says_every_default(checkpoint: Path):
    text = recipe_toml(recipe_for(checkpoint))
    for line in ('weights = "checkpoint"', "seed = 0", 'dtype = "float32"', "max_images = 3", "text_tokens = 8"):
        assert line in text


def test_a_designed_recipe_says_every_default_of_its_methods():
    made, _ = planned(load_recipe("mini_full", ['compress=[{method = "adsc", drops = [{layer = 2, keep = 9}]}]']))
    text = recipe_toml(made.recipe)
    for line in ('pattern = "stride"', "phase = 0.0", 'positions = "keep"'):
        assert line in text


def test_naming_a_checkpoint_asks_for_its_weights():
    recipe = override(load_recipe("mini_adsc"), model="some/where")
    assert (recipe.model.checkpoint, recipe.model.weights) == ("some/where", "checkpoint")


def test_random_weights_of_a_named_checkpoint_stay_random():
    recipe = override(load_recipe("llava15_adsc"), model="some/where", weights="random", num_layers=8)
    assert (recipe.model.checkpoint, recipe.model.weights, recipe.model.num_layers) == ("some/where", "random", 8)


ADAPTED = parsed(model={**MODEL, "adapter": "tuned"})


@pytest.mark.parametrize("options", [{"model": "some/where"}, {"weights": "random"}], ids=["model", "random weights"])
def test_other_weights_are_taken_without_the_adapter_of_the_recipe(options: dict[str, str]):
    assert override(ADAPTED, **options).model.adapter is None


@pytest.mark.parametrize("options", [{"model": "some/where"}, {"weights": "random"}], ids=["model", "random weights"])
def test_other_weights_are_taken_with_the_adapter_that_is_given(options: dict[str, str]):
    assert override(ADAPTED, adapter="mine", **options).model.adapter == "mine"


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"weights": "checkpoint"}], ids=["precision", "weights"])
def test_the_weights_of_the_recipe_keep_its_adapter(options: dict[str, str]):
    assert override(ADAPTED, **options).model.adapter == "tuned"


def test_an_override_without_values_changes_nothing():
    assert override(load_recipe("llava15_adsc")) == load_recipe("llava15_adsc")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_layers": 4}, '[model] num_layers = 4 cuts the model, which only weights = "random" allows'),
        ({"weights": "randon"}, "[model] weights = \"randon\" is not known; did you mean 'random'?"),
        ({"weights": "random", "num_layers": 0}, "[model] num_layers = 0 must be at least 1"),
        ({"dtype": "float16", "quantize": "int8"}, "[quantize] is for graphs that otherwise compute in float32, and"),
        ({"dtype": "float17"}, "[export] dtype = \"float17\" is not known; did you mean 'float16'?"),
    ],
)
def test_an_override_that_contradicts_the_recipe_is_refused(options: dict[str, object], text: str):
    with pytest.raises(RecipeError) as caught:
        override(load_recipe("llava15_adsc"), **options)  # pyright: ignore[reportArgumentType]
    assert str(caught.value).startswith(text)


def test_one_word_quantizes_all_graphs():
    quantize = override(load_recipe("llava15_adsc"), dtype="float32", quantize="int4").quantize
    assert (quantize.vision_encoder, quantize.embed_tokens, quantize.decoder) == ("int8", "int8", "int4")
    assert str(quantize) == "vision int8, embeddings int8, decoder int4"
    own = load_recipe("mini_adsc", ["quantize.decoder=int8", 'quantize.keep=["lm_head"]', "quantize.block_size=16"])
    changed = override(own, quantize="int4").quantize
    assert (changed.decoder, changed.keep, changed.block_size) == ("int4", ("lm_head",), 16)
    assert not override(own, quantize="none").quantize.is_active


def test_what_is_set_is_an_exception_from_the_one_word():
    settings = ("quantize.vision_encoder=int4", 'quantize.keep=["lm_head"]', "quantize.block_size=16")
    quantize = load_changed("mini_adsc", settings, quantize="int4").quantize
    assert str(quantize) == "vision int4, embeddings int8, decoder int4, but not lm_head"
    assert quantize.block_size == 16
    assert not load_changed("mini_adsc", ("quantize.decoder=none",)).quantize.is_active


def test_a_recipe_without_compression_is_complete():
    assert parsed().compress == ()
    assert parsed().session.max_text_tokens == 1024
