"""Tests of megatron/remoe/data and preprocessing."""
