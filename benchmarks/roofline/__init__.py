"""What kernels reach of a plain copy, predicted from their machine code: no GPU is needed."""
