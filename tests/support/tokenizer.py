"""A tokenizer for the tiny models: a word, a token. With a chat template that marks what the assistant says."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .models import VOCABULARY

SPECIAL = ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<unk>"]
_TURN = "{{ ' <|' + message.role + '|> ' }}"
_SAID = "{{ message.content + ' <|end|>' }}"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{_TURN}{{% if message.role == 'assistant' %}}{{% generation %}}{_SAID}{{% endgeneration %}}"
    f"{{% else %}}{_SAID}{{% endif %}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|> ' }}{% endif %}"
)


def words(*numbers: int) -> str:
    """A text of known words."""
    return " ".join(f"w{number % (VOCABULARY - len(SPECIAL))}" for number in numbers)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The words `w0`, `w1`, … and a few special tokens; any other word is `<unk>`."""
    every = [*SPECIAL, *(f"w{number}" for number in range(VOCABULARY - len(SPECIAL)))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(every)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
