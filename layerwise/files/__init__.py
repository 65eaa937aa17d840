"""Safe writing: atomic files and folders, manifests, locks, and errors of the disk in words. Linux and macOS; no torch.

Decision: a reader finds the old version, the new version or nothing, never a part of one. A file is written beside its
final name, synced, renamed, and the folder is synced too; a folder is filled beside its final name and gets its
``manifest.json`` (SHA-256 of everything) last.
"""

from __future__ import annotations

from layerwise.files.atomic import disk_errors, need_space, staged_file, write_atomic
from layerwise.files.folder import staged_folder
from layerwise.files.lock import output_lock
from layerwise.files.manifest import newest_intact, sha256_file, verify_manifest, write_manifest

__all__ = [
    "disk_errors",
    "need_space",
    "newest_intact",
    "output_lock",
    "sha256_file",
    "staged_file",
    "staged_folder",
    "verify_manifest",
    "write_atomic",
    "write_manifest",
]
