"""Triton kernels of the operator. They know tensors and Triton only, and can be read alone."""
