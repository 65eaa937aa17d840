"""Known harmless lines of other libraries, kept off the user's terminal. No torch here."""

from __future__ import annotations

import logging


class _KnownNoise(logging.Filter):
    """Drops one line only: torch's advice to torchao's authors on how to register an Enum, logged when torchao is imported.

    It changes no number, and a user who reads it would look for a fault of their own. transformers imports torchao by itself,
    so it would come with any of its models wherever torchao is installed.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return "Calling register_constant() on Enum subclasses is deprecated" not in str(record.msg)


def silence_import_noise() -> None:
    """To be called before torchao or transformers is imported; calling it again does nothing."""
    logger = logging.getLogger("torch.utils._pytree")
    if not any(isinstance(f, _KnownNoise) for f in logger.filters):
        logger.addFilter(_KnownNoise())
