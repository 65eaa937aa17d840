"""Where models come from, one file per kind: ``timm:NAME``, ``hf:ID_OR_DIR``, ``FILE.py:FACTORY``, ``py:MODULE:FACTORY``."""
