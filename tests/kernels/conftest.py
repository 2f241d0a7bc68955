"""Kernel tests run on the GPU if there is one, else in Triton's interpreter, chosen before kernels load."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
