"""Bridges to other libraries and to other people's checkpoints, one small file each."""
