"""Sparsity, λ and expert load in Megatron's log line, TensorBoard and Weights & Biases."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.remoe.routing.controller import RoutingSummary, SparsityController

AGAINST_SAMPLES = ("moe_relu/sparsity", "moe_relu/l1_reg_coeff")  # as Megatron does with the loss


class ReMoEMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, whose report also tells what the sparsity controller saw.

    Megatron's loop asks for a report after every step and prints it at log intervals; figures are fetched from the
    device only where they are written.
    """

    def __init__(
        self,
        controller: SparsityController,
        log_interval: int,
        tensorboard_log_interval: int,
        consumed_samples: Callable[[], int],
    ) -> None:
        super().__init__()
        self._consumed_samples = consumed_samples
        self._controller = controller
        self._log_interval = log_interval
        self._tensorboard_log_interval = tensorboard_log_interval
        self._first = True

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer: Any = None,
        wandb_writer: Any = None,
        per_layer_logging: bool = False,
        **kwargs: Any,
    ) -> str:
        """Megatron's report with the routing's figures appended (see `MoEMetricsTracker.report`)."""
        text = super().report(
            loss_scale, iteration, writer, wandb_writer, per_layer_logging=per_layer_logging, **kwargs
        )
        printed = self._first or iteration % self._log_interval == 0
        recorded = iteration % self._tensorboard_log_interval == 0 and (writer or wandb_writer)
        self._first = False
        if not (printed or recorded):
            return text
        summary = self._controller.summary()
        if summary is None:
            return text
        if recorded:
            scalars = _scalars(summary, per_layer_logging)
            for name, value in scalars.items():
                if writer is not None:
                    writer.add_scalar(name, value, iteration)
                    if name in AGAINST_SAMPLES:
                        writer.add_scalar(f"{name} vs samples", value, self._consumed_samples())
            if wandb_writer is not None:
                wandb_writer.log(scalars, iteration)
        return text + _log_text(summary)


def _log_text(summary: RoutingSummary) -> str:
    layers = summary.layer_sparsity.values()
    guarded = ",".join(map(str, summary.guarded_layers))
    return (
        f" sparsity: {summary.sparsity:.6f} | target sparsity: {summary.target_sparsity:.6f} |"
        f" l1 coefficient: {summary.l1_coefficient:.6E} | l1 loss: {summary.l1_loss:.6E} |"
        f" lowest layer sparsity: {min(layers, default=1.0):.6f} |"
        f" highest layer sparsity: {max(layers, default=1.0):.6f} |"
    ) + (f" guarded layers: {guarded} |" if guarded else "")


def _scalars(summary: RoutingSummary, per_layer: bool) -> dict[str, float]:
    layers = summary.layer_sparsity
    scalars = {
        "moe_relu/sparsity": summary.sparsity,
        "moe_relu/sparsity_target": summary.target_sparsity,
        "moe_relu/l1_reg_coeff": summary.l1_coefficient,
        "moe_relu/l1_reg_loss": summary.l1_loss,
        "moe_relu/sparsity_min_layer": min(layers.values(), default=1.0),
        "moe_relu/sparsity_max_layer": max(layers.values(), default=1.0),
        "moe_relu/guarded_layers": len(summary.guarded_layers),
    }
    if per_layer:
        for number, sparsity in layers.items():
            scalars[f"moe_relu/sparsity_layer_{number}"] = sparsity
            for expert, load in enumerate(summary.expert_load[number]):
                scalars[f"moe_relu/tokens_per_expert_layer_{number}_expert_{expert}"] = load
    return scalars
