"""How raw rows become tensors, one file per modality.

Rows use the names text, text_pair, target, answer, input_ids, image, audio, x and label: see `layerwise.readers.columns`.
"""
