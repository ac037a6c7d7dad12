"""Sparsity, λ, expert load and flips in Megatron's log line, TensorBoard, Weights & Biases and the run's log."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.remoe.patches.log_lines import run_logger
from megatron.remoe.routing.controller import SparsityController
from megatron.remoe.routing.counts import RoutingSummary
from megatron.remoe.training.flips import FlipMeter

AGAINST_SAMPLES = ("moe_relu/sparsity", "moe_relu/l1_reg_coeff")  # as Megatron does with the loss


class ReMoEMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker, whose report also has the figures of the sparsity controller and the measured flips.

    Megatron's loop asks for a report after every step and prints it at log intervals. Figures are fetched from the
    device only when they are written.
    """

    def __init__(
        self,
        controller: SparsityController | None,
        log_interval: int,
        tensorboard_log_interval: int,
        consumed_samples: Callable[[], int],
    ) -> None:
        super().__init__()
        self._logger = run_logger()
        self._flips: FlipMeter | None = None
        self._consumed_samples = consumed_samples
        self._controller = controller
        self._log_interval = log_interval
        self._tensorboard_log_interval = tensorboard_log_interval
        self._first = True

    def measure_flips(self, meter: FlipMeter) -> None:
        """Report what `meter` finds too."""
        self._flips = meter

    def totals(self) -> dict[str, int]:
        """Return the controller's running sums, or nothing without a controller; waits for the device."""
        return self._controller.totals() if self._controller is not None else {}

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer: Any = None,
        wandb_writer: Any = None,
        per_layer_logging: bool = False,
        **kwargs: Any,
    ) -> str:
        """Return Megatron's report with the routing's figures appended (see `MoEMetricsTracker.report`)."""
        text = super().report(
            loss_scale, iteration, writer, wandb_writer, per_layer_logging=per_layer_logging, **kwargs
        )
        printed = self._first or iteration % self._log_interval == 0
        recorded = iteration % self._tensorboard_log_interval == 0 and (writer or wandb_writer)
        self._first = False
        of_line: dict[str, Any] = {}
        flips = self._flips.after_update(iteration) if self._flips is not None else None
        if flips is not None:
            self._logger.info({"kind": "flips", "iteration": iteration, **asdict(flips)})
            self._record({"moe/flip_rate": flips.rate, "moe/flip_count": flips.count}, iteration, writer, wandb_writer)
            text += f" flip rate: {flips.rate:.6f} | flip count: {flips.count:.6f} |"
            of_line = {"flip_rate": flips.rate, "flip_count": flips.count, "changed_tokens": flips.changed_tokens}
        if self._controller is not None and (printed or recorded):
            summary = self._controller.summary()
            if summary is not None:
                if recorded:
                    self._record(_scalars(summary, per_layer_logging), iteration, writer, wandb_writer)
                text += _log_text(summary)
                of_line |= _run_log_record(summary)
        if printed and of_line:
            self._logger.info(of_line)
        return text

    def _record(self, scalars: dict[str, float], iteration: int, writer: Any, wandb_writer: Any) -> None:
        """Write scalars to TensorBoard and Weights & Biases; either may be None."""
        for name, value in scalars.items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
                if name in AGAINST_SAMPLES:
                    writer.add_scalar(f"{name} vs samples", value, self._consumed_samples())
        if wandb_writer is not None:
            wandb_writer.log(scalars, iteration)


def _log_text(summary: RoutingSummary) -> str:
    layers = summary.layer_sparsity.values()
    guarded = ",".join(map(str, summary.guarded_layers))
    return (
        f" sparsity: {summary.sparsity:.6f} | target sparsity: {summary.target_sparsity:.6f} |"
        f" l1 coefficient: {summary.l1_coefficient:.6E} | l1 loss: {summary.l1_loss:.6E} |"
        f" lowest layer sparsity: {min(layers, default=1.0):.6f} |"
        f" highest layer sparsity: {max(layers, default=1.0):.6f} |"
    ) + (f" guarded layers: {guarded} |" if guarded else "")


def _run_log_record(summary: RoutingSummary) -> dict[str, Any]:
    figures, layers = asdict(summary), summary.layer_sparsity.values()
    loads = figures.pop("expert_load")
    figures["layer_l1_loss"] = {number: float(f"{loss:.6g}") for number, loss in summary.layer_l1_loss.items()}
    figures["layer_sparsity"] = {number: round(sparsity, 6) for number, sparsity in summary.layer_sparsity.items()}
    return figures | {
        "lowest_layer_sparsity": min(layers, default=1.0),
        "highest_layer_sparsity": max(layers, default=1.0),
        "tokens_per_expert": {number: [round(load, 5) for load in row] for number, row in loads.items()},
    }


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
            scalars[f"moe_relu/l1_reg_loss_layer_{number}"] = summary.layer_l1_loss[number]
            for expert, load in enumerate(summary.expert_load[number]):
                scalars[f"moe_relu/tokens_per_expert_layer_{number}_expert_{expert}"] = load
    return scalars
