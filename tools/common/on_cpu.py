"""Megatron for a tool's work on the CPU."""

from megatron.remoe import cpu
from megatron.remoe.preflight import console, machine


def megatron_on_cpu() -> None:
    """Let Megatron be imported behind this for the CPU, also where there is an accelerator."""
    console.hide_unhelpful_warnings()
    machine.disable_unavailable(on_cpu=True)
    cpu.install()
