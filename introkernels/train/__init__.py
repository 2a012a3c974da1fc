"""Reference training: methods, one reproducible engine, and a report. Needs the `train` extra."""
