"""Log sparsity, λ and expert load to Megatron's line, TensorBoard, Weights & Biases and the run's log."""

import argparse
from dataclasses import asdict
from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.remoe.patches.log_lines import run_logger
from megatron.remoe.routing.controller import SparsityController
from megatron.remoe.routing.counts import RoutingSummary
from megatron.remoe.training.pairs import PairCounter
from megatron.training import print_rank_last

# The figures of a `RoutingSummary` in Megatron's line, each with its format.
PRINTED = {"sparsity": ".6f", "target_sparsity": ".6f", "l1_coefficient": ".6E", "l1_loss": ".6E"}
PRINTED |= {"lowest_layer_sparsity": ".6f", "highest_layer_sparsity": ".6f"}


class ReMoEMetricsTracker(MoEMetricsTracker):
    """Add the sparsity controller's figures to the report of Megatron's tracker.

    Megatron's loop asks for a report after every step and prints it at log intervals. Figures are fetched from the
    device only if they are written.
    """

    def __init__(self, args: argparse.Namespace, counter: SparsityController | PairCounter) -> None:
        super().__init__()
        self._args, self._counter, self._first = args, counter, True
        self._has_reached_target, self._has_warned = False, False

    def ensure_initialized(self, name: str, _num_layers: int, *others: Any) -> None:
        """Use the routers' number of layers. For a HybridModel, Megatron's loop gives the number of MoE layers."""
        super().ensure_initialized(name, self._args.num_layers + (self._args.mtp_num_layers or 0), *others)

    def totals(self) -> dict[str, int]:
        """Return the running sums of computed pairs and tokens. Waits for the device."""
        return self._counter.totals()

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
        record: dict[str, Any] = {}
        if isinstance(self._counter, SparsityController) and (is_printed or is_recorded):
            summary = self._counter.summary()
            if summary is not None:
                figures = asdict(summary)
                if is_recorded:
                    self._log_scalars(_scalars(figures, per_layer_logging), iteration, writer, wandb_writer)
                text += "".join(
                    f" {name.replace('_', ' ')}: {figures[name]:{form}} |" for name, form in PRINTED.items()
                )
                if summary.guarded_layers:
                    text += f" guarded layers: {','.join(map(str, summary.guarded_layers))} |"
                if is_printed:
                    self._warn_of_chunks(summary)
                record |= figures
        elif isinstance(self._counter, PairCounter) and is_printed:
            record["tokens_per_expert"] = self._counter.tokens_per_expert()
        if is_printed:
            run_logger().info(record | self.totals())
        return text

    def _warn_of_chunks(self, summary: RoutingSummary) -> None:
        """Print a line, once, about layers that work in chunks after S has reached its target."""
        layers = [number for number, chunks in summary.layer_chunks.items() if chunks > 1]
        if self._has_reached_target and layers and not self._has_warned:
            self._has_warned = True
            print_rank_last(
                f"Layers that work in chunks although S has reached its target: {', '.join(map(str, layers))}. "
                f"They have more than {self._args.moe_relu_activation_limit:g} x topk experts per token on a rank, and "
                "recompute their experts in every step. If memory allows, raise --moe-relu-activation-limit."
            )
        self._has_reached_target |= summary.sparsity >= summary.target_sparsity


def _scalars(figures: dict[str, Any], per_layer: bool) -> dict[str, float]:
    """Return the scalars of a `RoutingSummary`, under its names."""
    scalars = {name: figures[name] for name in PRINTED} | {"guarded_layers": len(figures["guarded_layers"])}
    for number, sparsity in figures["layer_sparsity"].items() if per_layer else ():
        scalars[f"sparsity_layer_{number}"] = sparsity
        scalars[f"l1_coefficient_layer_{number}"] = figures["layer_l1_coefficient"][number]
        scalars[f"l1_loss_layer_{number}"] = figures["layer_l1_loss"][number]
        scalars[f"chunks_layer_{number}"] = figures["layer_chunks"][number]
        for expert, share in enumerate(figures["tokens_per_expert"][number]):
            scalars[f"tokens_per_expert_layer_{number}_expert_{expert}"] = share
    return {f"moe_relu/{name}": value for name, value in scalars.items()}
