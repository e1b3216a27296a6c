"""Fine-tune a split model with PEFT in a plain training loop, without a trainer.

bin/zsl-trunkd --port 5555                                        # in one terminal
.venv/bin/python examples/plain_loop.py --server 127.0.0.1:5555   # in another
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model

import zsl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", default="127.0.0.1:5555", metavar="HOST:PORT", help="address of the daemon")
options = parser.parse_args()

STEPS, ROWS, TOKENS = 10, 2, 128

torch.manual_seed(0)
trunk = zsl.RemoteTrunk(options.server)
# A real GPT2LMHeadModel. The daemon reports the trunk's layers; the adapter is on the others.
base = zsl.load_client("random:gpt2", trunk, layers="client")
model = get_peft_model(
    base, LoraConfig(r=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
)
model.train()
print(trunk)

# A repeated random sentence, which the model can learn. Token ids and labels stay in this process.
sentence = torch.randint(50257, (16,))
batch = sentence.repeat(ROWS, TOKENS // 16)

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for step in range(1, STEPS + 1):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()  # through the trunk: its vector-Jacobian product comes from the daemon
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

zsl.save_adapter(model, "runs/plain_loop/adapter")  # loads on the whole model with PeftModel.from_pretrained
print("saved runs/plain_loop/adapter")
trunk.close()
