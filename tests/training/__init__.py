"""Tests of megatron/remoe/training and the training entry."""
