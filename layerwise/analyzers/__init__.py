"""Importance measures, one file each, registered under their public name. Definitions: docs/analyzers.md."""
