"""Tests of megatron/remoe/kernels, through Triton's interpreter where there is no GPU."""
