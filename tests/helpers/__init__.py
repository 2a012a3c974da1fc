"""What the tests share: backends under test, case builders, the oracles and their tolerances."""
