"""A linear head by products of the matrix library and any row loss, a chunk of rows at a time.

Nothing of size ``[B, C]`` exists beyond a chunk.
"""
