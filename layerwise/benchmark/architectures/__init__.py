"""The models that the coverage benchmark judges, one file per library: their names, and how one is built and fed.

What a model reads is data of the subject here, where no library says it; layerwise itself has no code for any of them.
"""
