"""Prepare Megatron for tools that run on the CPU."""

from megatron.remoe import cpu
from megatron.remoe.start import console, machine


def megatron_on_cpu() -> None:
    """Prepare for importing Megatron on the CPU, even if there is an accelerator."""
    console.hide_unhelpful_warnings()
    machine.disable_unavailable(on_cpu=True)
    cpu.install()
