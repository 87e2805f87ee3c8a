"""The operator in C++ for CPUs: built by the system's compiler on first use. Knows tensors by their addresses."""
