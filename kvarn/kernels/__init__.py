"""Triton kernels over the packed store (kvarn/layout.py). One file a kernel and its launcher; kvarn/cuda.py calls them.

Tensors of a tile [G, D] are held as four *quarters* [G, D / 4] (channels i * D/4 + j): the planes of packed codes, and
the blocks of the Hadamard matrix, H_D = H_4 x H_(D/4).
"""
