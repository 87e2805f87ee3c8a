"""The application around the library: the command line, training of small language models, benchmarks."""
