"""Companions that watch or extend a run. This version ships none; floor 3 of docs/architecture.md is where they will live."""
