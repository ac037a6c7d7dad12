"""Tests of megatron/remoe/moe."""
