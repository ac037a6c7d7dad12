"""Tests of megatron/remoe/local."""
