"""Exporters, one file each; they find their way into `layerwise.artifact.EXPORTERS` by themselves."""

from layerwise.verb import make_callable

make_callable(__name__)
