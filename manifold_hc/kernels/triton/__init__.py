"""The Triton backend: fused forward and backward kernels for CUDA and ROCm devices.

Nothing else imports triton.
Under `TRITON_INTERPRET=1`, set before triton's first import, they run on CPU tensors too. Where one
number decides on a whole mask, it is tl.where: Triton 3.9's interpreter makes integers of `&`.
"""
