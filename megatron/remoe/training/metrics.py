"""Log sparsity, λ, expert load and flips: Megatron's line, TensorBoard, Weights & Biases, and the run's log."""

import argparse
from dataclasses import asdict
from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.remoe.baselines.pairs import PairCounter
from megatron.remoe.patches.log_lines import run_logger
from megatron.remoe.routing.controller import SparsityController
from megatron.remoe.routing.counts import RoutingSummary
from megatron.remoe.training.flips import FlipMeter

AGAINST_SAMPLES = ("moe_relu/sparsity", "moe_relu/l1_reg_coeff")  # as Megatron does with the loss


class ReMoEMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker with the figures of the sparsity controller and the measured flips in its report.

    Megatron's loop asks for a report after every step and prints it at log intervals. Figures are fetched from the
    device only if they are written.
    """

    def __init__(self, args: argparse.Namespace, counter: SparsityController | PairCounter | None = None) -> None:
        super().__init__()
        self.flips: FlipMeter | None = None
        self._args, self._counter, self._first = args, counter, True

    def totals(self) -> dict[str, int]:
        """Return the running sums of computed pairs and tokens, or nothing for top-k; waits for the device."""
        return self._counter.totals() if self._counter is not None else {}

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
        is_printed = self._first or iteration % self._args.log_interval == 0
        is_recorded = iteration % self._args.tensorboard_log_interval == 0 and (writer or wandb_writer)
        self._first = False
        of_line: dict[str, Any] = {}
        if self.flips is not None and (flips := self.flips.after_update(iteration)) is not None:
            run_logger().info({"kind": "flips", "iteration": iteration, **flips})
            of_line = {f"flip_{name}": flips[name] for name in ("rate", "count")}
            self._record({f"moe/{name}": value for name, value in of_line.items()}, iteration, writer, wandb_writer)
            text += "".join(f" {name.replace('_', ' ')}: {value:.6f} |" for name, value in of_line.items())
            of_line["changed_tokens"] = flips["changed_tokens"]
        if isinstance(self._counter, SparsityController) and (is_printed or is_recorded):
            summary = self._counter.summary()
            if summary is not None:
                if is_recorded:
                    self._record(_scalars(summary, per_layer_logging), iteration, writer, wandb_writer)
                text += _log_text(summary)
                of_line |= _run_log_record(summary)
        if is_printed and (of_line := of_line | self.totals()):
            run_logger().info(of_line)
        return text

    def _record(self, scalars: dict[str, float], iteration: int, writer: Any, wandb_writer: Any) -> None:
        """Write scalars to TensorBoard and Weights & Biases; either may be None."""
        for name, value in scalars.items():
            if writer is not None:
                writer.add_scalar(name, value, iteration)
                if name in AGAINST_SAMPLES:
                    writer.add_scalar(f"{name} vs samples", value, self._args.consumed_train_samples)
        if wandb_writer is not None:
            wandb_writer.log(scalars, iteration)


def _log_text(summary: RoutingSummary) -> str:
    lowest, highest = summary.lowest_layer_sparsity, summary.highest_layer_sparsity
    guarded = ",".join(map(str, summary.guarded_layers))
    return (
        f" sparsity: {summary.sparsity:.6f} | target sparsity: {summary.target_sparsity:.6f} |"
        f" l1 coefficient: {summary.l1_coefficient:.6E} | l1 loss: {summary.l1_loss:.6E} |"
        f" lowest layer sparsity: {lowest:.6f} | highest layer sparsity: {highest:.6f} |"
    ) + (f" guarded layers: {guarded} |" if guarded else "")


def _run_log_record(summary: RoutingSummary) -> dict[str, Any]:
    figures = asdict(summary)
    loads = figures.pop("expert_load")
    return figures | {
        "layer_l1_loss": {number: float(f"{loss:.6g}") for number, loss in summary.layer_l1_loss.items()},
        "layer_sparsity": {number: round(sparsity, 6) for number, sparsity in summary.layer_sparsity.items()},
        "tokens_per_expert": {number: [round(load, 5) for load in row] for number, row in loads.items()},
    }


def _scalars(summary: RoutingSummary, per_layer: bool) -> dict[str, float]:
    scalars = {
        "sparsity": summary.sparsity,
        "sparsity_target": summary.target_sparsity,
        "l1_reg_coeff": summary.l1_coefficient,
        "l1_reg_loss": summary.l1_loss,
        "sparsity_min_layer": summary.lowest_layer_sparsity,
        "sparsity_max_layer": summary.highest_layer_sparsity,
        "guarded_layers": len(summary.guarded_layers),
    }
    for number, sparsity in summary.layer_sparsity.items() if per_layer else ():
        scalars[f"sparsity_layer_{number}"] = sparsity
        scalars[f"l1_reg_loss_layer_{number}"] = summary.layer_l1_loss[number]
        for expert, load in enumerate(summary.expert_load[number]):
            scalars[f"tokens_per_expert_layer_{number}_expert_{expert}"] = load
    return {f"moe_relu/{name}": value for name, value in scalars.items()}
