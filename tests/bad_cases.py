"""The corpus of what people get wrong: configurations, data files and checkpoints,
each with the message that it must give.

A case changes a project that works (`tests.stage_runs.make_project`): `settings` are dotted keys of align.yaml, `files`
are written over the project's (text, bytes, or None to remove one). `stage` is where the run itself must stop: `config`
when align.yaml is read, else the stage. Both there and in `align check` the message must hold `says`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tests.tiny_models import llava_onevision_config


@dataclass(frozen=True)
class Bad:
    name: str
    stage: str
    says: str
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | bytes | None] = field(default_factory=dict)


# A chat template that goes on without an end, one that fails, and one that forgets the images.
ENDLESS, UNDEFINED, BLIND = (
    "{% for message in messages %}",
    "{{ nothing.of.that }}",
    "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
)
MODEL_CRITIC = {"critic.kind": "pairwise", "critic.model": "./critic"}


def text_config(**changes: Any) -> str:
    """The policy's config.json with another language model."""
    config = llava_onevision_config().to_dict() | {"architectures": ["LlavaOnevisionForConditionalGeneration"]}
    return json.dumps(config | {"text_config": config["text_config"] | changes})


def line(**keys: Any) -> str:
    return json.dumps(keys) + "\n"


def question(**changes: Any) -> str:
    return line(**({"id": "q0", "question": "What?", "images": ["images/0.png"]} | changes))


def pair(**changes: Any) -> str:
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    chosen, rejected = ([{"role": "assistant", "content": word}] for word in ("a cat", "a dog"))
    given = {"id": "p0", "images": ["images/0.png"], "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return line(**(given | changes))


def _config(name: str, says: str, /, **settings: Any) -> Bad:
    """A fault that is seen as soon as align.yaml is read; `__` in a keyword stands for a dot."""
    return Bad(name, "config", says, {key.replace("__", "."): value for key, value in settings.items()})


def _questions(name: str, says: str, text: str | bytes | None) -> Bad:
    return Bad(name, "sample", says, files={"questions.jsonl": text})


def _held_out(name: str, says: str, text: str | None) -> Bad:
    return Bad(name, "evaluate", says, files={"eval.jsonl": text})


def _pairs(name: str, says: str, text: str | bytes | None) -> Bad:
    settings = {"pairs_file": "pairs.jsonl", "questions": None, "rounds": 1, "evaluate.questions": None}
    return Bad(name, "pairs", says, settings, {"pairs.jsonl": text})


CONFIGURATIONS = [
    Bad("yaml that is none", "config", r"not valid YAML.*line 2", files={"align.yaml": "policy: a\n\t- b: [\n"}),
    Bad("a key twice", "config", r"the key 'policy' is duplicated", files={"align.yaml": "policy: a\npolicy: b\n"}),
    Bad("a list for keys", "config", r"expected keys and values, found list", files={"align.yaml": "- policy\n"}),
    Bad("not UTF-8", "config", r"not UTF-8 text", files={"align.yaml": b"policy: \xff\xfe\n"}),
    Bad("an empty file", "config", r"policy: required", files={"align.yaml": ""}),
    Bad("no configuration", "config", r"no such configuration file", files={"align.yaml": None}),
    Bad("neither questions nor pairs", "config", r"questions: required, unless pairs_file", {"questions": None}),
    _config("a misspelt key", r"polcy: unknown key \(did you mean 'policy'", polcy="x"),
    _config(
        "a misspelt key in a section", r"sample\.num_response: unknown key .*num_responses", sample__num_response=3
    ),
    _config("a section that is a value", r"critic: ", critic="pairwise"),
    _config("a bad name", r"name: .*found 'a/b'", name="a/b"),
    _config("no rounds", r"rounds: .*greater than or equal to 1", rounds=0),
    _config("rounds that are no number", r"rounds: .*valid integer.*'three'", rounds="three"),
    _config("a negative temperature", r"sample\.temperature: .*greater than or equal to 0", sample__temperature=-1),
    _config("top_p above one", r"sample\.top_p: .*less than or equal to 1", sample__top_p=1.5),
    _config("no responses", r"sample\.num_responses: .*greater than or equal to 1", sample__num_responses=0),
    _config("an unknown dtype", r"model\.dtype: .*'float8'", model__dtype="float8"),
    _config("an unknown attention", r"model\.attention: ", model__attention="fast"),
    _config("an unknown strategy of pairs", r"pairs\.strategy: ", pairs__strategy="best"),
    _config("an unknown strategy of launch", r"launch\.strategy: .*'zero9'", launch__strategy="zero9"),
    _config("an unknown reference", r"dpo\.reference: ", dpo__reference="latest"),
    _config("a negative margin", r"pairs\.min_margin: ", pairs__min_margin=-0.1),
    _config("too long by an unknown rule", r"dpo\.on_too_long: ", dpo__on_too_long="truncate"),
    _config(
        "a server without a scheme", r"sample\.servers\.0\.url: must begin with http", sample__servers=["gpu1:8000"]
    ),
    _config("a password in a url", r"holds a user, a password", sample__servers=["http://me:secret@gpu1:8000"]),
    _config("a timeout of nothing", r"server\.timeout_s: ", server__timeout_s=0),
    _config("a port that is none", r"launch\.main_process_port: ", launch__main_process_port=70000),
    Bad("one response", "sample", r"a preference needs two responses", {"sample.num_responses": 1}),
    Bad("an unknown critic", "score", r"critic.*'pairwize'|pairwize", {"critic.kind": "pairwize"}),
    Bad("a critic without a model", "score", r"the pairwise critic needs a model", {"critic.kind": "pairwise"}),
    Bad(
        "an unknown option of the critic",
        "score",
        r"bogus",
        {"critic.kind": "pairwise", "critic.model": "./critic", "critic.options": {"bogus": 1}},
    ),
    Bad(
        "a prompt that is not there",
        "score",
        r"no_such_prompt",
        {"critic.kind": "pairwise", "critic.model": "./critic", "critic.prompt": "no_such_prompt"},
    ),
    Bad(
        "a prompt without its slots",
        "score",
        r"prompt\.md",
        {"critic.kind": "pairwise", "critic.model": "./critic", "critic.prompt": "prompt.md"},
        {"prompt.md": "Which is better?\n"},
    ),
    Bad("an unknown gate", "score", r"max_bias", {"critic.gates": {"max_bias": 0.3}}),
    Bad("a critic that is not there", "score", r"no such", {"critic.kind": "pairwise", "critic.model": "./nobody"}),
    Bad("an unknown field of TRL's", "dpo", r"dpo\.learnin_rate: unknown key .*learning_rate", {"dpo.learnin_rate": 1}),
    Bad("warm-up by its old name", "dpo", r"warmup_steps takes a ratio", {"dpo.warmup_ratio": 0.1}),
    Bad("a field of the toolkit's", "dpo", r"dpo\.output_dir cannot be set", {"dpo.output_dir": "x"}),
    Bad("code of a stranger's", "dpo", r"dpo\.trust_remote_code cannot be set", {"dpo.trust_remote_code": True}),
    Bad("a scheduler that is none", "dpo", r"TRL refuses .*cosinus", {"dpo.lr_scheduler_type": "cosinus"}),
    Bad("an optimiser that is none", "dpo", r"TRL refuses .*adamm", {"dpo.optim": "adamm"}),
    Bad("a part that is none", "dpo", r"no part 'vison'.*vision", {"dpo.freeze": ["vison"]}),
    Bad("everything frozen", "dpo", r"leaves nothing to train", {"dpo.freeze": ["vision", "projector", "language"]}),
    Bad(
        "LoRA in a frozen part",
        "dpo",
        r"dpo\.lora trains .*multi_modal_projector.* inside of a part",
        {
            "dpo.freeze": ["projector"],
            "dpo.lora": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]},
        },
    ),
    Bad("a field of LoRA's that is none", "dpo", r"dpo\.lora: .*rank", {"dpo.lora": {"rank": 4}}),
    Bad("a device that is none", "dpo", r"model\.device 'gpu' is no device", {"model.device": "gpu"}),
    Bad("a setting of no processor", "dpo", r"has no setting 'max_pixls'", {"model.processor": {"max_pixls": 9}}),
    Bad("machines without an address", "launch", r"main_process_ip is empty", {"launch.num_machines": 2}),
    _config("a concurrency of nothing", r"server\.concurrency: ", server__concurrency=0),
    Bad("a loss that is none", "dpo", r"dpo\.loss_type: 'dpo2' is none of TRL's losses", {"dpo.loss_type": "dpo2"}),
    Bad("a beta below zero", "dpo", r"dpo\.beta: expected a number of at least 0, found -0\.1", {"dpo.beta": -0.1}),
    Bad("a learning rate in words", "dpo", r"dpo\.learning_rate: .*found 'fast'", {"dpo.learning_rate": "fast"}),
    Bad("a batch of nothing", "dpo", r"per_device_train_batch_size: .*found 0", {"dpo.per_device_train_batch_size": 0}),
    Bad(
        "no accumulation at all",
        "dpo",
        r"gradient_accumulation_steps: .*found 0",
        {"dpo.gradient_accumulation_steps": 0},
    ),
    Bad("no epochs", "dpo", r"num_train_epochs: expected more than 0", {"dpo.num_train_epochs": 0}),
    Bad(
        "LoRA on nothing",
        "dpo",
        r"dpo\.lora: .*nowhere.*not found",
        {"dpo.lora": {"r": 4, "target_modules": ["nowhere"]}},
    ),
    Bad(
        "LoRA without a rank",
        "dpo",
        r"dpo\.lora: .*positive integer",
        {"dpo.lora": {"r": 0, "target_modules": ["q_proj"]}},
    ),
    Bad(
        "four bits without a GPU",
        "dpo",
        r"dpo\.lora\.quantize needs a CUDA GPU",
        {"dpo.lora": {"r": 4, "target_modules": ["q_proj"], "quantize": "nf4"}},
    ),
    Bad("four bits of no kind", "dpo", r"dpo\.lora\.quantize is 'int3'", {"dpo.lora": {"r": 4, "quantize": "int3"}}),
    Bad(
        "a rate for a frozen projector",
        "dpo",
        r"no projector is trained",
        {"dpo.freeze": ["projector"], "dpo.projector_learning_rate_multiplier": 3},
    ),
    Bad(
        "a limit below every prompt",
        "dpo",
        r"do not fit in 10 tokens, and nothing is truncated",
        {"dpo.max_length": 10},
    ),
    Bad("an attention that is not installed", "dpo", r"FlashAttention2", {"model.attention": "flash_attention_2"}),
    Bad("greedy samples", "sample", r"sample\.temperature is 0", {"sample.temperature": 0}),
    Bad(
        "a verifier without answers",
        "score",
        r"no reference answer",
        {"critic.kind": "verifier"},
        {"questions.jsonl": question()},
    ),
    Bad(
        "a reward model that is a folder of pictures",
        "score",
        r"no model files in the folder",
        {"critic.kind": "scalar", "critic.model": "./images"},
    ),
    Bad("a server that is down", "sample", r"no server answers", {"sample.servers": ["http://127.0.0.1:9"]}),
    Bad(
        "a critic's server that is down",
        "score",
        r"no server answers",
        MODEL_CRITIC | {"critic.servers": ["http://127.0.0.1:9"]},
    ),
    Bad("a run root that is a file", "sample", r"questions\.jsonl.*set run_root", {"run_root": "questions.jsonl"}),
    Bad(
        "a launch file that is no YAML",
        "launch",
        r"acc\.yaml: not valid YAML",
        {"launch.accelerate_config": "acc.yaml"},
        {"acc.yaml": "a: [\n"},
    ),
    Bad(
        "a launch file that is not there",
        "launch",
        r"no such accelerate configuration",
        {"launch.accelerate_config": "acc.yaml"},
    ),
]

POLICIES = [
    Bad("no policy", "sample", r"there is no such", {"policy": "./nobody"}),
    Bad("a policy without config", "dpo", r"found no config\.json", files={"policy/config.json": None}),
    Bad("a config that is no JSON", "dpo", r"config\.json", files={"policy/config.json": "{"}),
    Bad(
        "a model without eyes",
        "dpo",
        r"expected the architecture of a vision-language model, found 'BertModel'",
        files={"policy/config.json": '{"architectures": ["BertModel"], "model_type": "bert"}'},
    ),
    Bad(
        "an adapter",
        "dpo",
        r"found a LoRA adapter",
        files={"policy/config.json": None, "policy/adapter_config.json": "{}"},
    ),
    Bad(
        "no weights",
        "dpo",
        r"expected weights \(model\.safetensors\), found none",
        files={"policy/model.safetensors": None},
    ),
    Bad("no tokenizer", "sample", r"the processor cannot be opened", files={"policy/tokenizer.json": None}),
    Bad("a torn tokenizer", "sample", r"the processor cannot be opened", files={"policy/tokenizer.json": '{"a":'}),
    Bad(
        "a tokenizer that does not know its padding",
        "sample",
        r"cannot be encoded: .*padding token",
        files={"policy/tokenizer_config.json": None},
    ),
    Bad(
        "no image processor", "sample", r"the processor cannot be opened", files={"policy/processor_config.json": None}
    ),
    Bad("no chat template", "sample", r"the chat template cannot be used", files={"policy/chat_template.jinja": None}),
    Bad(
        "an endless template", "dpo", r"the chat template cannot be used", files={"policy/chat_template.jinja": ENDLESS}
    ),
    Bad("a template that fails", "sample", r"'nothing' is undefined", files={"policy/chat_template.jinja": UNDEFINED}),
    Bad("a blind template", "sample", r"writes nothing where an image", files={"policy/chat_template.jinja": BLIND}),
    Bad("a mute template", "sample", r"does not write the question", files={"policy/chat_template.jinja": "hello"}),
    Bad(
        "a critic's template that fails",
        "score",
        r"'nothing' is undefined",
        MODEL_CRITIC,
        {"critic/chat_template.jinja": UNDEFINED},
    ),
    Bad("a critic's cut weights", "score", r"cut or foreign", MODEL_CRITIC, {"critic/model.safetensors": b"12345678"}),
    Bad(
        "a config of a wider model",
        "dpo",
        r"have other shapes than config\.json says.*\(264, 32\) in the file, \(264, 64\) expected",
        files={"policy/config.json": text_config(hidden_size=64)},
    ),
    Bad(
        "a config of a deeper model",
        "dpo",
        r"weights are not in the checkpoint.*layers\.2",
        files={"policy/config.json": text_config(num_hidden_layers=4, layer_types=None)},
    ),
    Bad(
        "a config of a smaller vocabulary",
        "dpo",
        r"the checkpoint cannot be opened",
        files={"policy/config.json": text_config(vocab_size=100)},
    ),
    Bad("cut weights", "dpo", r"cut or foreign", files={"policy/model.safetensors": b"\x10\x27\0\0\0\0\0\0{"}),
    Bad(
        "pickled weights",
        "dpo",
        r"the weights are pickled",
        files={"policy/model.safetensors": None, "policy/pytorch_model.bin": b"x"},
    ),
    Bad(
        "a missing shard",
        "dpo",
        r"weight files, 1 are missing: b\.safetensors",
        files={
            "policy/model.safetensors": None,
            "policy/model.safetensors.index.json": '{"weight_map": {"x": "b.safetensors"}}',
        },
    ),
]

DATA = [
    _questions("no questions file", r"questions\.jsonl: no such file", None),
    _questions("an empty questions file", r"no questions in the file", ""),
    _questions("a torn line", r"questions\.jsonl:2: not valid JSON", question() + '{"id": "q1", "ques'),
    _questions("a list in a line", r"questions\.jsonl:1: expected a JSON object, found list", "[1]\n"),
    _questions("a misspelt column", r"questions\.jsonl:1: .*'image' \(did you mean 'images'", question(image="x")),
    _questions("no id", r"id: Field required", line(question="What?")),
    _questions("an empty id", r"questions\.jsonl:1: .*id: ", question(id="")),
    _questions("an id twice", r"the id 'q0' is duplicated", question() + question()),
    _questions("an empty question", r"the question is empty", question(question=" <image> ")),
    _questions("tags without images", r"names 2 <image> but there are 1 images", question(question="<image><image>?")),
    _questions("images that are a text", r"questions\.jsonl:1: .*images: ", question(images="images/0.png")),
    _questions("an image that is not there", r"there is no image 'images/no\.png'", question(images=["images/no.png"])),
    _questions("an image from the net", r"is not a file", question(images=["https://example.org/a.png"])),
    _questions("an image in the line", r"is not a file", question(images=["data:image/png;base64,AAAA"])),
    _questions("an image outside", r"lies outside the image root", question(images=["../secret.png"])),
    _questions("a role that is none", r"history\.0\.role: ", question(history=[{"role": "bot", "content": "Hi"}])),
    _questions("not UTF-8 data", r"questions\.jsonl.*(UTF-8|not valid JSON|not a valid)", b'{"id": "\xff"}\n'),
    Bad("an image that is none", "sample", r"is not a readable image", files={"images/0.png": b"GIF, honestly"}),
    Bad("an empty image", "sample", r"is not a readable image", files={"images/0.png": b""}),
    Bad("an image too large", "sample", r"pixels, more than 100", {"max_image_pixels": 100}),
    Bad("the wrong image root", "sample", r"there is no image", {"image_root": "elsewhere"}),
    _held_out("a held-out id twice", r"the id 'e' is duplicated", question(id="e") + question(id="e", question="Who?")),
    _held_out("no held-out file", r"eval\.jsonl: no such file", None),
    _held_out("an empty held-out file", r"no questions in the file", ""),
    _held_out("a bad held-out line", r"eval\.jsonl:1: not a valid Question", line(id="e")),
    _held_out("held out and trained on", r"held-out questions are also trained on", question(question="What is 0?")),
    _pairs("no pairs file", r"no such file", None),
    _pairs("an empty pairs file", r"pairs\.jsonl", ""),
    _pairs("chosen that equals rejected", r"chosen equals rejected|no valid pair", pair(rejected=[{"role": "assistant", "content": "a cat"}])),
    _pairs("an empty prompt", r"prompt is empty|no valid pair", pair(prompt=[])),
    _pairs("an empty response", r"empty response", pair(chosen=[{"role": "assistant", "content": ""}])),
    _pairs("images that the prompt lacks", r"image parts and images differ", pair(images=["images/0.png"] * 2)),
    _pairs("a pair without its image", r"image cannot be read", pair(images=["images/no.png"])),
    _pairs("columns of another format", r"no valid pair|unknown key 'question'", line(question="What?", chosen="a", rejected="b")),
]  # fmt: skip

CASES = [*CONFIGURATIONS, *POLICIES, *DATA]
