"""Tests of megatron/remoe/routing."""
