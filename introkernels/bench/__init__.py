"""`introkernels bench`: every operator against what one would use instead of it.

A suite is data: cases (an operator at a shape, named for its use) times contenders. A contender is
checked against the float64 definition first, and timed only if it is right.
"""
