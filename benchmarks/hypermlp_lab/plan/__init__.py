"""What training a model of some size asks of each of many GPUs, before any of them is rented."""
