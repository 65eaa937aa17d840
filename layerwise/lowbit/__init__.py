"""Weights of a few bits: the grids, the packed form, how errors of rounding are corrected, and who needs how many bits."""
