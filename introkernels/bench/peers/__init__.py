"""Other packages that compute what an operator does, one file for each.

``pip install 'introkernels[peers]'`` brings those that run on a CPU. torchdistill asks for
torchvision, which its loss does not need: ``pip install --no-deps torchdistill``. Those for GPUs
bring what they were built for: ``pip install liger-kernel cut-cross-entropy fla-core[cuda]``.

A peer is imported when it is first called, never before; one that is not installed is recorded as
unavailable. What its adapter adds around it, so that it computes the operator and nothing else, is
in the contender's ``made_equal``; the check against the float64 definition decides.
"""
