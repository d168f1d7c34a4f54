"""Sentences of the demo in, a word-level tokenizer out whose decoding gives back every one of them exactly.

A token is a word or a punctuation mark together with the space before it, so decoding is plain concatenation and
pieces of a sentence may be tokenised one by one.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from align.demo.questions import NUMBER_WORDS, PHRASINGS, TASKS, Task, say
from reward.prompt import load_prompt

UNKNOWN = "<unk>"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<im_start>",
    "<im_end>",
    "<vi_start>",
    "<vi_end>",
)
WORD = re.compile(r" ?(?:[A-Za-z]+|[0-9]|[^\sA-Za-z0-9])|\s")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentences(critic_prompt: Path) -> list[str]:
    """Every kind of text that a model of the demo reads or writes, with every word that may stand in it."""
    found = ["system\n", "user\n", "assistant\n", "You are a helpful assistant.", "Is 0 1 2 3 4 5 6 7 8 9", "Question"]
    for kind, phrasing in product(TASKS, (0, 1)):
        found += [PHRASINGS[kind][phrasing].replace("{asked}", "0")]
        for digits in ((3,), (3, 7, 2)):
            task = Task(kind, phrasing, digits, asked=3)
            found += [say(task, digits, number=n, present=p) for n in range(len(NUMBER_WORDS)) for p in (True, False)]
    prompt = load_prompt(critic_prompt, "pairwise")
    return found + list(prompt.literals) + list(prompt.options.values())


def build_tokenizer(critic_prompt: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of Valley-Eagle and ChatML as its chat template."""
    words = sorted({word for text in sentences(critic_prompt) for word in WORD.findall(text)})
    vocabulary = {token: index for index, token in enumerate([UNKNOWN, *SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(WORD.pattern), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="right",
    )
