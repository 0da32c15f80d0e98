"""Time, memory and error of every backend on this machine: ``python -m llada_kernels.bench``."""
