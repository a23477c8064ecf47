"""Finding recipes, reading them, and changing single values with ``--set``."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from tokexport.errors import RecipeError, nearest
from tokexport.recipes.schema import (
    Bits,
    CompressTable,
    ExportTable,
    ModelTable,
    PlanTable,
    QuantizeTable,
    Recipe,
    SessionTable,
)
from tokexport.recipes.tables import parse_table, table_of

DEFAULT_RECIPE = "mini_adsc"


def list_recipes() -> list[str]:
    """Return the names of the recipes that ship with tokexport."""
    folder = resources.files("tokexport.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or by path, then apply ``key=value`` settings.

    Args:
        name_or_path: the name of a recipe that ships, or the path of a TOML file.
        settings: e.g. ``export.dtype="float16"`` or ``compress.0.phase=0.5``; values are TOML, and
            what is not TOML is taken as a string.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key or a wrong value.
    """
    source, table = _read(name_or_path)
    table = _inherit(source, table, seen=())
    for setting in settings:
        table = _set(table, setting)
    return parse_recipe(source.name, table)


def load_changed(name_or_path: str, settings: Sequence[str] = (), **changes: Any) -> Recipe:
    """Read a recipe and change it as ``key=value`` settings and the arguments of ``override`` say.

    ``quantize`` is for all graphs at once, so what is set of ``[quantize]`` is an exception from it.

    Raises:
        RecipeError: as ``load_recipe`` and ``override``.
    """
    exceptions = [key for key in settings if changes.get("quantize") and key.lstrip().startswith("quantize.")]
    recipe = override(load_recipe(name_or_path, [key for key in settings if key not in exceptions]), **changes)
    table = recipe_table(recipe)
    for setting in exceptions:
        table = _set(table, setting)
    return parse_recipe(recipe.name, table)


def parse_recipe(name: str, table: Mapping[str, Any]) -> Recipe:
    """Make a recipe from its tables."""
    sections = {
        "model": ModelTable,
        "export": ExportTable,
        "quantize": QuantizeTable,
        "session": SessionTable,
        "plan": PlanTable,
    }
    known = ["name", "description", "compress", *sections]
    for key in table:
        if key not in known:
            raise RecipeError(f"recipe {name} has no table {key!r}{nearest(key, known)}")
    if "model" not in table:
        raise RecipeError(f"recipe {name} needs a table [model] with family and checkpoint")
    parsed: dict[str, Any] = {key: parse_table(cls, table.get(key, {}), f"[{key}]") for key, cls in sections.items()}
    return Recipe(
        name=str(table.get("name", name)),
        description=str(table.get("description", "")),
        compress=_parse_compress(table.get("compress", [])),
        **parsed,
    )


def override(
    recipe: Recipe,
    *,
    model: str | None = None,
    weights: str | None = None,
    num_layers: int | None = None,
    adapter: str | None = None,
    compressor: str | None = None,
    dtype: str | None = None,
    quantize: Bits | None = None,
) -> Recipe:
    """Return the recipe with the options of the command line; None leaves what it says.

    Other weights than the recipe's are taken without its adapter, which was trained on the recipe's.

    Raises:
        RecipeError: a value is not known, or two contradict each other.
    """
    if model is not None and weights is None:
        weights = "checkpoint"  # who names a checkpoint wants its weights, also where the recipe's are random
    table = table_of(recipe)
    if model is not None:
        table["model"]["architecture"] = {}  # it describes the recipe's checkpoint, not this one
    if model is not None or weights == "random":
        table["model"].pop("adapter", None)
    changes = {"checkpoint": model, "weights": weights, "num_layers": num_layers, "adapter": adapter}
    table["model"] |= {key: value for key, value in changes.items() if value is not None}
    if dtype is not None:
        table["export"]["dtype"] = dtype
    parsed: dict[str, Any] = {
        key: parse_table(cls, table[key], f"[{key}]") for key, cls in (("model", ModelTable), ("export", ExportTable))
    }
    recipe = recipe if compressor is None else with_compressor(recipe, compressor)
    if quantize is not None:
        told = {} if quantize == "none" else {"keep": recipe.quantize.keep, "block_size": recipe.quantize.block_size}
        parsed["quantize"] = replace(QuantizeTable.for_bits(quantize), **told)
    return replace(recipe, **parsed)


def with_compressor(recipe: Recipe, compressor: str) -> Recipe:
    """Return the recipe with other weights for the one method that has some.

    Raises:
        RecipeError: none or several have weights.
    """
    learning = [step for step in recipe.compress if "weights" in step.options]
    if len(learning) != 1:
        raise RecipeError(
            f"--compressor {compressor} is for one method with weights, and recipe {recipe.name} has {len(learning)}; "
            "choose another recipe, or say weights in its [[compress]] tables"
        )
    compress = tuple(
        replace(step, options={**step.options, "weights": compressor}) if step is learning[0] else step
        for step in recipe.compress
    )
    return replace(recipe, compress=compress)


def recipe_table(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain tables with every default filled in."""
    table = table_of(recipe)
    table["compress"] = [{"method": step.method, **table_of(step.options)} for step in recipe.compress]
    return table


def recipe_toml(recipe: Recipe) -> str:
    """Write a recipe as TOML with every default filled in."""
    return tomli_w.dumps(recipe_table(recipe))


def _parse_compress(steps: object) -> tuple[CompressTable, ...]:
    if not isinstance(steps, list):
        raise RecipeError("compress must be an array of tables; write [[compress]] with two pairs of brackets")
    parsed: list[CompressTable] = []
    for index, step in enumerate(steps):
        if not isinstance(step, Mapping) or not isinstance(step.get("method"), str):
            raise RecipeError(f'[[compress]] number {index} needs a method, e.g. method = "adsc"')
        options = {key: value for key, value in step.items() if key != "method"}
        parsed.append(CompressTable(method=step["method"], options=options))
    return tuple(parsed)


@dataclass(frozen=True)
class _Source:
    """Where a recipe was read: its name, what tells it from others, and where its neighbours are."""

    name: str
    identity: str
    folder: Path | None


def _read(name_or_path: str, folder: Path | None = None) -> tuple[_Source, dict[str, Any]]:
    """Read a recipe by name, or by a path that is relative to ``folder``."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.parent != Path():
        path = path if folder is None else folder / path
        if not path.is_file():
            raise RecipeError(
                f"there is no recipe file {path}; give a path that exists, or a name from 'tokexport list'"
            )
        return _Source(path.stem, str(path.resolve()), path.parent), _loads(path.read_bytes(), str(path))
    if name_or_path not in list_recipes():
        raise RecipeError(f"there is no recipe {name_or_path!r}{nearest(name_or_path, list_recipes())}")
    content = (resources.files("tokexport.recipes") / f"{name_or_path}.toml").read_bytes()
    return _Source(name_or_path, name_or_path, None), _loads(content, name_or_path)


def _loads(content: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {where} is not valid TOML: {error}") from error


def _inherit(source: _Source, table: dict[str, Any], seen: tuple[_Source, ...]) -> dict[str, Any]:
    base_name = table.pop("extends", None)
    if base_name is None:
        return table
    base_source, base = _read(str(base_name), source.folder)
    chain = (*seen, source)
    if base_source.identity in {entry.identity for entry in chain}:
        path = " -> ".join(entry.name for entry in (*chain, base_source))
        raise RecipeError(f"recipe {source.name} extends itself: {path}; remove one extends")
    return merged(_inherit(base_source, base, chain), table)


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``change`` laid over it, table by table."""
    result = dict(base)
    for key, value in change.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _set(table: dict[str, Any], setting: str) -> dict[str, Any]:
    path, separator, text = setting.partition("=")
    if not separator or not path.strip():
        raise RecipeError(f"--set {setting} must look like key=value, e.g. export.dtype=float16")
    keys = path.strip().split(".")
    return _replaced(table, keys, _toml_value(text.strip()), path.strip())


def _replaced(node: Any, keys: Sequence[str], value: object, path: str) -> Any:
    """Return ``node`` with the value at ``keys`` replaced, sharing nothing with the original."""
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not head.isdecimal() or int(head) >= len(node):
            raise RecipeError(f"--set {path}: {head!r} is no index of a list with {len(node)} entries (counted from 0)")
        return [_replaced(old, rest, value, path) if at == int(head) else old for at, old in enumerate(node)]
    if isinstance(node, Mapping):
        return {**node, head: _replaced(node.get(head, {}), rest, value, path)}
    raise RecipeError(f"--set {path}: {head!r} lies below the plain value {node!r}")


def _toml_value(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if len(table) > 1:
        raise RecipeError(f"--set takes one value, not the lines {text!r}")
    return table["value"]
