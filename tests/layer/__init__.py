"""Tests of megatron/remoe/layer."""
