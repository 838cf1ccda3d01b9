"""Data: tokenizers and vocabularies, sources and mixtures, packing and filters, prepared shards and
the training loader.

Modules that need seqio or tensorflow-datasets (`vocabulary`, `tfds_builders`, and
`mixtures.register`) are not imported by the others.
"""
