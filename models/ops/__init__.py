"""The method's own operators, a folder each: plain PyTorch, and compiled kernels where they pay."""
