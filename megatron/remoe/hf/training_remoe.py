"""Hold the sparsity at its target in fine-tuning with transformers' `Trainer`, as training with Megatron does."""

from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback

SMALLEST, LARGEST = 1e-8, 1e3  # bounds of λ: the default of λ₀ and the upper bound in training with Megatron


class SparsityCallback(TrainerCallback, ExportableState):
    """Move λ after every optimizer step: λ ← λ · α^sign(target − S), with target = 1 − k/E (section 3.3).

    λ stays from 1e-8 to 1e3. A long run can end with S above the target and λ close to 0. Without the lower bound, λ
    would take hundreds of steps to return.

    S is counted over all layers, micro-batches and ranks of the step. λ is `config.router_aux_loss_coef`, so it is
    saved with the model; the trainer's checkpoints store it too. Logs include `sparsity` and `l1_coefficient`.
    """

    def __init__(self, multiplier: float = 1.2) -> None:
        """
        Args:
            multiplier: α, above 1.

        Raises:
            ValueError: `multiplier` is not above 1.
        """
        if not multiplier > 1.0:
            raise ValueError(f"multiplier={multiplier}: must be above 1 (1.2 in training).")
        self.multiplier = multiplier
        self.coefficient = 0.0
        self.figures: dict[str, float] = {}
        self.model: Any = None

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the state for the trainer's checkpoint."""
        return {"args": {"multiplier": self.multiplier}, "attributes": {"coefficient": self.coefficient}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start counting, and restore λ if the trainer resumes from a checkpoint.

        Raises:
            ValueError: a process has several GPUs, or the model has no experts with ReLU routing.
        """
        if args.n_gpu > 1:  # the trainer would use nn.DataParallel, whose copies of the model lose counts and logits
            raise ValueError("SparsityCallback needs one process per GPU. Start with torchrun --nproc-per-node N.")
        # Look at classes: PEFT's wrapper also has the attributes of its model, but setting them there has no effect.
        routers = (part for part in model.modules() if hasattr(type(part), "routing_counts"))
        self.model = next(routers, None)
        if self.model is None or not (self.model.config.moe_relu_routing and self.model.config.num_experts):
            raise ValueError("SparsityCallback needs a model with ReLU routing. Leave it out for other models.")
        config = self.model.config
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("coefficient")
        config.router_aux_loss_coef = self.coefficient = max(saved or config.router_aux_loss_coef, SMALLEST)
        self.model.routing_counts = torch.zeros(2, dtype=torch.int64, device=self.model.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up the counts of all ranks, and move λ. Raise a ValueError if the trainer does not call the model."""
        counts, config = self.model.routing_counts, self.model.config
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        active, pairs = counts.tolist()
        if not pairs:
            raise ValueError("SparsityCallback saw no forward pass: TRL's trainers compute the loss without the model.")
        counts.zero_()
        self.figures = {"sparsity": 1.0 - active / pairs, "l1_coefficient": self.coefficient}
        # target − S has the sign of active − k · tokens.
        distance = active * config.num_experts - config.mean_experts_per_token * pairs
        if distance:
            factor = self.multiplier if distance > 0 else 1.0 / self.multiplier
            config.router_aux_loss_coef = self.coefficient = min(max(self.coefficient * factor, SMALLEST), LARGEST)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add S and λ of the last step to trainer_state.json and, for later callbacks, to the logs."""
        if logs is not None and "loss" in logs:
            logs.update(self.figures)
            state.log_history[-1].update(self.figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self.model.routing_counts = None
