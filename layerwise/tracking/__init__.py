"""The leaderboard database: one row per verified compression, its lineage, and rankings that do not mix what differs.

SQLite by default, PostgreSQL by URL; one code path. Nothing here imports torch, and pandas only when a frame is asked for.
"""

from __future__ import annotations

from layerwise.tracking.database import open_database
from layerwise.tracking.models import DOMAINS
from layerwise.tracking.schema import upgrade
from layerwise.tracking.tracker import PerformanceTracker

__all__ = ["DOMAINS", "PerformanceTracker", "open_database", "upgrade"]
