"""The Triton backend: fused forward and backward kernels for CUDA and ROCm devices.

No other package imports triton. Under `TRITON_INTERPRET=1`, set before triton's first import, the
kernels run on CPU tensors too. Where one number decides on a whole mask, the code uses tl.where:
Triton 3.9's interpreter makes integers of `&`.
"""
