"""Fine-tune an exported model on a text: python examples/finetune.py FOLDER TEXT NEW_FOLDER"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

if len(sys.argv) != 4:
    sys.exit(__doc__)
folder, text, new_folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)

ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
length = min(4096, model.config.max_position_embeddings)
rows = ids[: len(ids) // length * length].view(-1, length)
if not len(rows):
    sys.exit(f"{text}: has {len(ids)} tokens, and a row needs {length}. Give a longer text.")

trainer = Trainer(
    model,
    TrainingArguments(
        new_folder,
        max_steps=400,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        bf16=torch.cuda.is_available(),
        logging_steps=10,
    ),
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
)
if model.config.num_experts and model.config.moe_relu_routing:
    # First: TensorBoard and W&B read the logs to which this callback adds sparsity and l1_coefficient.
    trainer.callback_handler.callbacks.insert(0, model.sparsity_callback())
trainer.train()
trainer.save_model()
trainer.save_state()
tokenizer.save_pretrained(new_folder)
