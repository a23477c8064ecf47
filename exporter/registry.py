"""Finding what is registered by its file name: methods, families, engines.

One file defines one class; adding the file is the registration.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

from tokexport.errors import TokexportError, nearest

Plugin = TypeVar("Plugin")


def list_plugins(package: ModuleType) -> list[str]:
    """Return the names of the files in a package, with hyphens."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(package.__path__))


def load_plugin(
    package: ModuleType, base: type[Plugin], name: str, what: str, error: type[TokexportError]
) -> type[Plugin]:
    """Return the one subclass of ``base`` that the file ``name`` of a package defines.

    Raises:
        error: there is no such file; the text calls it ``what``.
    """
    names = list_plugins(package)
    if name not in names:
        raise error(f"there is no {what} {name!r}{nearest(name, names)}")
    module = importlib.import_module(f"{package.__name__}.{name.replace('-', '_')}")
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, base) and item.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define one {base.__name__}, not {found}"
    return found[0]
