"""`python -m introkernels` is the command `introkernels`."""

from introkernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
