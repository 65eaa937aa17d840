"""``python -m layerwise`` is the command ``layerwise``."""

from __future__ import annotations

from layerwise.cli import main

raise SystemExit(main())
