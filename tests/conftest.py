"""Kernel tests run on the GPU if there is one, else in Triton's interpreter.

Triton decides when it is first imported, which inductor's tests do too: so it is set here, before any test module.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
