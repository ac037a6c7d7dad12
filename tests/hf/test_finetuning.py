"""Test fine-tuning with transformers' trainer: the program of docs/huggingface.md, and its callback."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, Trainer, TrainerControl, TrainerState, TrainingArguments

from megatron.core.safe_globals import register_safe_globals
from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.hf.models import make
from tests.training_runs import run
from tools.console.places import ROOT
from tools.text.corpora.dataset import byte_level_vocabulary

STEPS = 4


def program() -> str:
    """Return the documented program with few steps, rows in order and a log of each step, on CPUs."""
    code = (ROOT / "examples" / "finetune.py").read_text()
    steps = f"max_steps={STEPS}, train_sampling_strategy='sequential', use_cpu=True"
    for old, new in (
        ("max_steps=400", steps),
        ("logging_steps=10", "logging_steps=1, report_to='tensorboard'"),
        ("torch.cuda.is_available()", "False"),
    ):
        assert old in code
        code = code.replace(old, new)
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like an exported one, with a model in bfloat16 and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("exported")
    make("relu", vocab_size=257).to(torch.bfloat16).save_pretrained(folder)
    files = byte_level_vocabulary(tmp_path_factory.mktemp("bytes"))
    AutoTokenizer.from_pretrained(gpt2_tokenizer_folder(*files)).save_pretrained(folder)
    return folder


def test_the_documented_program(folder: Path, tmp_path: Path) -> None:
    """λ follows the controller's rule; two micro-batches and two ranks with one each have the same S and λ."""
    logs, norm = [], "model.norm.weight"
    for processes, code in ((1, program()), (2, program().replace("accumulation_steps=2", "accumulation_steps=1"))):
        file, new = tmp_path / "finetune.py", tmp_path / f"by_{processes}"
        file.write_text(code)
        run([*map(str, (folder, ROOT / "LICENSE", new))], processes, script=file)
        assert {path.name for path in folder.iterdir()} - {"README.md"} <= {path.name for path in new.iterdir()}
        state = json.loads((new / "trainer_state.json").read_text())
        log = [record for record in state["log_history"] if "loss" in record]
        scalars = EventAccumulator(str(next(new.glob("runs/*")))).Reload()
        shown = (scalars.Scalars(f"train/{name}") for name in ("sparsity", "l1_coefficient"))
        assert [len(log), *map(len, shown)] == [STEPS] * 3
        for before, after in pairwise(log):
            sign = 1 if before["sparsity"] < 0.75 else -1
            assert after["l1_coefficient"] == pytest.approx(before["l1_coefficient"] * 1.2**sign)
        last = json.loads((new / "config.json").read_text())["router_aux_loss_coef"]
        assert last == state["stateful_callbacks"]["SparsityCallback"]["attributes"]["coefficient"] != 0.05
        trained, source = (load_file(one / "model.safetensors")[norm] for one in (new, folder))
        assert trained.dtype == torch.float32 and (trained != source).all(), "bfloat16 would lose each step of 1e-4"
        logs.append([(record["sparsity"], record["l1_coefficient"]) for record in log])
    assert logs[0] == [pytest.approx(pair, abs=1e-4) for pair in logs[1]]


def train(
    folder: Path, model: RemoeForCausalLM, micro_batches: int = 1, wrapped: Any = None, **options: Any
) -> Trainer:
    """Train repeatedly on one sequence, and return the trainer."""
    row = torch.arange(32) % 61
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": micro_batches, "report_to": []}
    settings |= {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 3, "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), **(settings | options))
    data = [{"input_ids": row, "labels": row}] * 64
    trainer = Trainer(wrapped or model, arguments, train_dataset=data, callbacks=[model.sparsity_callback()])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if options.get("max_steps") == 4 else None)
    register_safe_globals()  # a resumed trainer removes NumPy's globals, which checkpoints of other tests need
    return trainer


def test_micro_batches_share_the_l1_term(tmp_path: Path) -> None:
    """Training with three equal micro-batches gives the same weights as with one."""
    one, three = (make("relu", router_aux_loss_coef=0.5) for _ in range(2))
    train(tmp_path, one)
    train(tmp_path, three, micro_batches=3)
    for expected, parameter in zip(one.parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)
    assert one.routing_counts is None and one(torch.arange(4)[None]).sparsity is None


def test_a_resumed_training_goes_on_with_its_coefficient(tmp_path: Path) -> None:
    whole = make("relu", router_aux_loss_coef=0.0)
    train(tmp_path, whole, max_steps=2, save_strategy="steps", save_steps=2)
    coefficient = whole.config.router_aux_loss_coef
    assert coefficient == pytest.approx(1e-8 * 1.2**2)
    resumed = make("relu", router_aux_loss_coef=0.0)
    log = train(tmp_path, resumed, max_steps=4).state.log_history
    assert [record["l1_coefficient"] for record in log if record["step"] == 3 and "loss" in record] == [coefficient]


def test_adapters_train_at_the_target_sparsity(tmp_path: Path) -> None:
    """The callback must use the model, not PEFT's wrapper: an attribute set on the wrapper has no effect."""
    from peft import LoraConfig, get_peft_model

    model = make("relu")
    before = model.config.router_aux_loss_coef
    log = train(tmp_path, model, wrapped=get_peft_model(model, LoraConfig(target_modules=["q_proj"]))).state.log_history
    assert all(0 < record["sparsity"] < 1 for record in log if "loss" in record)
    assert model.config.router_aux_loss_coef != before and model.routing_counts is None


def test_callbacks_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ReLU routing"):
        train(tmp_path, make("top-k"))
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        train(tmp_path, make("relu"), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="torchrun"):
        make("relu").sparsity_callback().on_train_begin(SimpleNamespace(n_gpu=2), TrainerState(), TrainerControl())
    with pytest.raises(ValueError, match="multiplier=1"):
        make("relu").sparsity_callback(1.0)


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    """Re-entrant checkpointing would lose the L1 term's gradient. Without the term it is accepted."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant"):
        train(tmp_path, make("relu"), **options)
    without_term = make("relu", router_aux_loss_coef=0.0, output_router_logits=True).train()
    without_term.gradient_checkpointing_enable(options["gradient_checkpointing_kwargs"])
    ids = torch.arange(8)[None]
    without_term(ids, labels=ids).loss.backward()


def test_the_coefficient_has_bounds_and_stays_at_the_target() -> None:
    model = make("relu", router_aux_loss_coef=0.0)
    callback = model.sparsity_callback()
    callback.on_train_begin(SimpleNamespace(n_gpu=0), TrainerState(), TrainerControl(), model=model)
    for active, coefficient in ((0, 1e-8), (8, 1.2e-8), (2, 1.2e-8)):  # of 8 pairs; the target is 2
        callback.model.routing_counts += torch.tensor([active, 8])
        callback.on_step_end(None, None, None)
        assert model.config.router_aux_loss_coef == pytest.approx(coefficient)
    callback.coefficient = 900.0
    callback.model.routing_counts += torch.tensor([8, 8])
    callback.on_step_end(None, None, None)
    assert model.config.router_aux_loss_coef == 1e3
    with pytest.raises(ValueError, match="TRL"):
        callback.on_step_end(None, None, None)
