"""Triton kernels of megalong, one op per file, each beside its reference in plain PyTorch. Imports nothing of megalong.

The package itself imports no Triton: a machine without it can still import `megalong_kernels`, not its ops.
"""
