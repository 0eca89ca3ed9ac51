"""The CPU backend: C++ with vector units and threads, called through ctypes.

Streams in float32 or bfloat16, coefficients in float32, n up to 16. Sums over tokens are cut into
slices that depend on the number of tokens alone, so a result does not depend on the threads.
"""

import torch

DTYPES = (torch.float32, torch.bfloat16)

MAX_STREAMS = 16
