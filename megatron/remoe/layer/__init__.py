"""Megatron's MoE layer for a number of experts that varies from token to token. Read layer.py first."""
