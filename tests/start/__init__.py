"""Tests of megatron/remoe/start."""
