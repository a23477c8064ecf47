"""What there is to choose from, and what of it this machine can run."""

from dataclasses import asdict
from typing import Any

from tokexport.engines.backend import list_backends, load_backend
from tokexport.engines.environment import describe_environment
from tokexport.engines.machine import measure_machine
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.family import list_families, load_family
from tokexport.exporter.method import list_methods, method_summary
from tokexport.recipes.load import list_recipes, load_recipe


def list_everything() -> dict[str, dict[str, str]]:
    """Return recipes, methods, families and engines with one line of text each."""
    return {
        "recipes": {name: load_recipe(name).description for name in list_recipes()},
        "methods": {name: method_summary(name) for name in list_methods()},
        "families": {name: _first_line(load_family(name).__doc__) for name in list_families()},
        "engines": {entry["name"]: entry["reason"] or entry["text"] for entry in _engines()},
    }


def examine(precision: str = "float32") -> dict[str, Any]:
    """Return the environment, how fast it computes in a precision, and whether and why not engines can run here."""
    return {
        "environment": asdict(describe_environment()),
        "machine": _machine(precision),
        "engines": _engines(),
    }


def _machine(precision: str) -> dict[str, Any]:
    try:
        return vars(measure_machine(precision))
    except BackendUnavailableError as error:
        return {"reason": str(error)}


def _engines() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in list_backends():
        try:
            backend = load_backend(name)
            text, reason = _first_line(backend.__doc__), backend.state()
        except BackendUnavailableError as error:
            text, reason = "", str(error)
        found.append({"name": name, "available": not reason, "text": text, "reason": reason})
    return found


def _first_line(docstring: str | None) -> str:
    return (docstring or "").partition("\n")[0].rstrip(".")
