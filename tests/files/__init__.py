"""Tests of megatron/remoe/files and preprocessing."""
