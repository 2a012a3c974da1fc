"""The operators that are measured: their inputs, their eager forms, and what has to be moved."""
