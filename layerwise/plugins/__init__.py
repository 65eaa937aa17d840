"""Companions that extend the library under the names that people ask for, one file each."""
