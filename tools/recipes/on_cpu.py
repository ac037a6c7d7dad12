"""Prepare Megatron for tools that run on the CPU."""

import warnings

from megatron.remoe import cpu
from megatron.remoe.start import machine, unhelpful_warnings


def megatron_on_cpu() -> None:
    """Prepare for importing Megatron on the CPU, even if there is an accelerator."""
    unhelpful_warnings.hide_unhelpful_warnings()
    # This warning is advice for training, but these tools open trained models.
    warnings.filterwarnings("ignore", message="Using a large number of experts")
    machine.disable_unavailable(on_cpu=True)
    cpu.install()
