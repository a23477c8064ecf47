"""Keeping ``transformers`` from drawing on stderr, where progress is shown in one way."""

import contextlib
from collections.abc import Generator

from transformers.utils import logging


@contextlib.contextmanager
def without_progress_bars() -> Generator[None]:
    """Read and write weights without the progress bars of ``transformers``."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
