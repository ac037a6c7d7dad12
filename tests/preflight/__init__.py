"""Tests of megatron/remoe/preflight."""
