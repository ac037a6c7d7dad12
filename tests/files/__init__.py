"""Tests of megatron/remoe/files, through `remoe inspect`."""
