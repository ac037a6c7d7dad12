"""FLOPs, for tools that look for them here."""

from ..recipes.flops import flops_per_sequence as flops_per_sequence
