"""Evaluate whole data sets in micro-batches of the usual size; keep data loaders from drawing random numbers."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.remoe.patches.patch import patch, replace
from megatron.training import get_args, training
from megatron.training.datasets.data_samplers import MegatronFullValidationSampler


@patch(
    changes={
        "training.datasets.data_samplers:MegatronFullValidationSampler": "f60dd489",
        "training.training:build_train_valid_test_data_iterators": "d12ed278",
        "core.datasets.blended_dataset:BlendedDataset.__getitem__": "ab4036c7",
    },
    provides="--full-validation with tensor or pipeline parallelism, and in fewer steps",
    ends="the sampler returns micro-batches of --eval-micro-batch-size",
    is_needed=True,
)
def fill_validation_batches() -> None:
    """Return each sequence once, in full micro-batches.

    Megatron's sampler returns one sequence at a time. Other tensor and pipeline ranks wait for a whole micro-batch and
    fail. Each step takes as many sequences as a global batch has micro-batches, so the set is evaluated that many
    times. A pipeline stage without data fails too, because its number of steps is None.

    The last global batch is filled up with None, for which a data set returns a sequence whose loss does not count.
    `args.validation_samples` is set to the number of sequences of each set.
    """

    @replace(training, "build_train_valid_test_data_iterators")
    def build(stock: Any, *arguments: Any, **options: Any) -> Any:
        args = get_args()
        args.validation_samples = []
        iterators = stock(*arguments, **options)
        if args.full_validation and args.multiple_validation_sets:
            args.eval_iters = [steps or 0 for steps in args.eval_iters]
            # Rank 0 loads data; others may have no sets, or not know their sizes.
            sizes = torch.tensor(args.validation_samples or args.eval_iters, device=torch.cuda.current_device())
            torch.distributed.broadcast(sizes, 0)
            args.validation_samples = sizes.tolist()
        return iterators

    @replace(MegatronFullValidationSampler, "__init__")
    def start(stock: Any, sampler: Any, total_samples: int, *others: Any, **options: Any) -> None:
        stock(sampler, total_samples, *others, **options)
        get_args().validation_samples.append(total_samples)

    @replace(BlendedDataset, "__getitem__")
    def sample(stock: Any, blend: BlendedDataset, index: int | None) -> Any:
        fields = stock(blend, index or 0)
        return fields if index is not None else fields | {"loss_mask": 0 * fields["loss_mask"]}  # as GPTDataset does

    @replace(MegatronFullValidationSampler, "__len__")
    def count_steps(_stock: Any, sampler: Any) -> int:
        return math.ceil(sampler.total_samples / get_args().eval_global_batch_size)

    @replace(MegatronFullValidationSampler, "__iter__")
    def micro_batches(_stock: Any, sampler: Any) -> Iterator[list[int | None]]:
        args, size = get_args(), get_args().eval_micro_batch_size
        added = len(sampler) * args.eval_global_batch_size - sampler.total_samples
        order = [*range(sampler.total_samples), *[None] * added]
        for start in range(sampler.data_parallel_rank * size, len(order), sampler.data_parallel_size * size):
            yield order[start : start + size]


@patch(
    changes={"training.training:build_pretraining_data_loader": "1f53bc68"},
    provides="the same dropout after a stop on CPUs; a finished run that evaluates again",
    ends="data loaders have their own generators",
    is_needed=True,
)
def seed_data_loaders() -> None:
    """Let data loaders draw their seeds from their own generators. On a CPU, dropout draws from PyTorch's default."""

    @replace(training, "build_pretraining_data_loader")
    def build(stock: Any, dataset: Any, consumed_samples: int) -> Any:
        args = get_args()
        reads_none = args.skip_train or args.iteration >= args.train_iters
        if args.dataloader_type == "single" and dataset is not None and reads_none:
            # A finished run reads no training data; Megatron's sampler fails if a blend has none left.
            consumed_samples = min(consumed_samples, len(dataset) - 1)
        loader = stock(dataset, consumed_samples)
        if loader is not dataset:  # not with --dataloader-type external
            loader.generator = torch.Generator().manual_seed(args.seed + consumed_samples)
        return loader
