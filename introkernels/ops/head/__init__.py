"""A linear head on a GPU: products of the matrix library and a row loss, a chunk of rows at a time.

Nothing of size ``[B, C]`` exists beyond a chunk.
"""
