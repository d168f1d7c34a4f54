"""align.yaml in, one typed and fully checked `Config` out; the other way round, a commented file to start from.

An unknown key is an error that names the nearest known one, and all faults are reported at once. The keys of TRL's
`DPOConfig` inside `dpo:` are checked where TRL is imported (`align.dpo.train`), not here: this module stays light.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from align.errors import UserError
from align.strict_yaml import BAD_YAML, parse_yaml, yaml_problem
from reward.pairs import PairSettings

CONFIG_NAME = "align.yaml"

# Keys that have another name now; the error for the old one says so.
RENAMED = {
    "critic.trust_sample": "critic.reliability_sample",
    "dpo.too_long": "dpo.on_too_long",
    "pairs.k": "pairs.top_k_pairs",
    "pairs.mix_earlier": "pairs.replay_fraction",
    "pairs.mix_order": "pairs.replay_order",
    "server.tries": "server.max_attempts",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Server(Section):
    """An OpenAI-compatible endpoint that serves a checkpoint; a URL alone is one, too."""

    url: str = Field(..., description="e.g. http://gpu1:8000 or https://host/openai/v1")
    model: str | None = Field(
        None,
        description=(
            "the name it is served under; {round} stands for the round that made the checkpoint, 0 for the first"
            " policy; empty: the checkpoint's path"
        ),
    )
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    check_model: bool = Field(True, description="false where the server does not list the model that it serves")

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must begin with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query:
            # A ValueError would be shown together with the value.
            raise UserError(
                f"the server's url on {parts.hostname} holds a user, a password or a query", fix="use api_key_env"
            )
        return url


def _server_of_url(value: Any) -> Any:
    return [{"url": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


Servers = Annotated[list[Server], BeforeValidator(_server_of_url)]


class ServerSettings(Section):
    """How servers are spoken to, where a stage names some (sample.servers, critic.servers, evaluate.servers)."""

    concurrency: int = Field(32, ge=1, description="requests in flight at a time, for each endpoint")
    timeout_s: float = Field(600.0, gt=0, description="request timeout")
    max_attempts: int = Field(6, ge=1, description="how often a request is sent at most, on whichever endpoints")
    backoff_s: float = Field(0.5, ge=0, description="pause before the second try; it doubles with every further one")
    cooldown_s: float = Field(15.0, gt=0, description="rest of an endpoint that failed, before it is checked again")
    wait_s: float = Field(
        0.0, ge=0, description="how long to wait, at the start or later, for servers when none is there with the model"
    )
    max_image_pixels: int = Field(4_000_000, ge=1, description="larger images are scaled down before they are sent")
    image_format: Literal["png", "jpeg"] = Field("png", description="how images travel; jpeg is smaller and loses")
    compare_prompts: bool = Field(
        True,
        description=(
            "compare the first prompts with what the checkpoint's own processor makes of them, and stop where they"
            " differ"
        ),
    )
    top_logprobs: int = Field(
        20, ge=1, description="alternatives per token that a critic's server is asked to show (vLLM: --max-logprobs)"
    )


EngineName = Literal["auto", "local", "vllm"]
ENGINE = (
    "what answers where no servers are named: local, vllm (started and stopped by the stage), or auto: vllm where it is"
    " installed, knows the family and a GPU is there"
)


class VllmSettings(Section):
    """vLLM servers that a stage starts on this machine and stops again (engine: vllm)."""

    tensor_parallel_size: int = Field(1, ge=1, description="GPUs per replica")
    num_replicas: int | None = Field(None, ge=1, description="servers per machine; empty: as many as the GPUs allow")
    max_model_len: int | None = Field(
        None, ge=1, description="most tokens of prompt and response together; empty: what fits the GPU's memory"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of each GPU's memory that a replica takes"
    )
    max_restarts: int = Field(2, ge=0, description="how often a replica that dies is restarted")
    start_timeout_s: float = Field(1800.0, gt=0, description="longest wait for replicas to answer")
    arguments: list[str] = Field(
        default_factory=list, description="further arguments of `vllm serve`, e.g. [--kv-cache-dtype, fp8]"
    )


class ModelSettings(Section):
    """How checkpoints are opened (policy, reference and local critics alike)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description=(
            "type of the weights; auto: bfloat16 on a GPU that has it, else float32; float32 where they are trained"
        ),
    )
    device: str = Field("auto", description="auto, cpu, cuda, mps, xpu or npu; one of several: cuda:N")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="attention outside the shared prefix"
    )
    processor: dict[str, Any] = Field(
        default_factory=dict, description="keyword settings of the policy's processor, e.g. {max_pixels: 571536}"
    )
    video_frames: int | None = Field(
        None, ge=1, description="frames of a video that are looked at; empty: as the policy's family does (8 or so)"
    )
    image_conversion: Literal["displayed", "plain"] = Field(
        "displayed",
        description="pictures to RGB as people see them (upright, 16 bits scaled, on white), or plain: as PIL converts",
    )
    allow_pickle: bool = Field(False, description="open .bin weights (unsafe unless you trust their author)")


class SampleSettings(Section):
    """Stage 1: responses of the current policy to every image question."""

    num_responses: int = Field(5, ge=1, le=256, description="K, responses per question")
    temperature: float = Field(0.7, ge=0, description="0 is greedy")
    top_p: float = Field(
        0.9, gt=0, le=1, description="nucleus sampling: keep the smallest set of tokens with this probability"
    )
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens; 0 keeps all")
    max_new_tokens: int = Field(1024, ge=1, description="a response longer than this is cut and marked 'length'")
    until_pair: bool = Field(
        False,
        description=(
            "draw further responses to questions without two different complete ones, until there are two or"
            " max_responses"
        ),
    )
    max_responses: int = Field(
        16, ge=2, le=256, description="for until_pair: most responses per question, the first ones included"
    )
    further_temperature: float | None = Field(
        None, gt=0, description="for until_pair: temperature of the further responses; empty: as the first ones"
    )
    questions_per_round: int | None = Field(
        None,
        ge=1,
        description=(
            "how many questions a round takes, in file order, without repeats between rounds until all are used; empty:"
            " all of them every round"
        ),
    )
    batch_size: int | None = Field(None, ge=1, description="questions at a time; empty: found by itself within memory")
    engine: EngineName = Field("auto", description=ENGINE)
    servers: Servers = Field(
        default_factory=list,
        description=(
            "endpoints that serve the policy, which is then not loaded here: URLs, or {url, model, api_key_env}"
        ),
    )


class CriticSettings(Section):
    """Stage 2: who judges the responses."""

    kind: str = Field(
        "pairwise",
        description=(
            "pairwise, pointwise, claims, verifier, scalar, panel, python, scores, ratings, or the controls random and"
            " length"
        ),
    )
    model: str | None = Field(None, description="checkpoint of the critic model")
    processor: dict[str, Any] = Field(default_factory=dict, description="keyword settings of the critic's processor")
    prompt: str | None = Field(
        None, description="name of a built-in prompt or path of your own; empty: the kind's default"
    )
    function: str | None = Field(
        None, description="for python: a function of question, images and responses, as in my_critic.py:judge"
    )
    file: Path | None = Field(
        None, description="for scores: a file of finished scores; for ratings: a file of people's preferences (JSONL)"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "further settings of the critic kind, e.g. {soft: true}; members of a panel may name a `model` of their own"
        ),
    )
    reliability_sample: int = Field(
        32, ge=0, description="questions judged again with a blank and a shuffled image, to see that the critic looks"
    )
    gates: dict[str, float] = Field(
        default_factory=dict,
        description="stop after scoring unless these hold, e.g. {max_position_bias: 0.3, min_image_dependence: 0.1}",
    )
    batch_size: int | None = Field(None, ge=1, description="questions at a time; empty: found by itself within memory")
    engine: EngineName = Field("auto", description=ENGINE)
    servers: Servers = Field(
        default_factory=list,
        description=(
            "endpoints that serve critic.model, which is then not loaded here: URLs, or {url, model, api_key_env}"
        ),
    )


class DpoSettings(BaseModel):
    """Stage 3: training. Besides these, every field of TRL's DPOConfig may stand here (learning_rate, beta, ...)."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    reference: Literal["round-start", "initial", "live"] = Field(
        "round-start",
        description=(
            "the reference policy: of this round's start (LLaVA-Critic), the first one, or a second model in memory"
        ),
    )
    freeze: list[str] = Field(
        default_factory=list,
        description=(
            "parts that are not trained: vision, projector, language, embeddings, head, or prefixes of parameter names"
        ),
    )
    projector_learning_rate_multiplier: float = Field(
        1.0, gt=0, description="learning rate of the projector relative to the rest (Valley2-DPO: 3)"
    )
    max_length: int | None = Field(
        None, ge=1, description="tokens of prompt and response together; empty: what the model's positions allow"
    )
    on_too_long: Literal["error", "drop"] = Field(
        "error", description="what to do with pairs that do not fit; nothing is ever truncated"
    )
    report_to: str | list[str] = Field(
        "tensorboard",
        description="experiment trackers: tensorboard, wandb, mlflow, a list of them, or none",
    )
    lora: dict[str, Any] | None = Field(
        None, description="peft LoraConfig fields; trained as an adapter and merged at the end of the round"
    )

    def trainer_fields(self) -> dict[str, Any]:
        """What goes to TRL's DPOConfig as it is."""
        return dict(self.model_extra or {})


class EvaluateSettings(Section):
    """Held-out questions, asked of the first policy and of every round's checkpoint."""

    questions: Path | None = Field(None, description="held-out questions (JSONL); empty: no evaluation")
    image_root: Path | None = Field(
        None, description="folder of their images; empty: image_root, else the folder of the file"
    )
    num_samples: int = Field(1, ge=1, description="sampled responses per question, beside the greedy one")
    temperature: float = Field(0.7, gt=0, description="of the sampled responses")
    max_new_tokens: int = Field(256, ge=1, description="longest response in tokens")
    limit: int | None = Field(None, ge=1, description="only the first so many questions")
    win_rate: bool = Field(
        True,
        description="where the critic is a model: also let it compare each round with the first policy and its parent",
    )
    kl: bool = Field(
        True,
        description=(
            "estimate the KL divergence from the first policy on the sampled responses; loads both models in turn"
        ),
    )
    stop_if_worse: bool = Field(
        False, description="end the run after a round that is worse than its parent by more than chance"
    )
    engine: EngineName = Field("auto", description=ENGINE)
    servers: Servers = Field(
        default_factory=list,
        description="endpoints that serve the round's checkpoint: URLs, or {url, model, api_key_env}",
    )
    first_policy_servers: Servers = Field(
        default_factory=list,
        description="endpoints that serve the first policy, for the KL where `servers` are named; empty: no KL then",
    )


class LaunchSettings(Section):
    """How many processes work, on how many machines, and how they share the model while it is trained."""

    num_processes: int = Field(1, ge=1, description="processes on this machine, one per GPU")
    strategy: Literal["ddp", "zero2", "zero3", "fsdp2"] = Field(
        "ddp", description="how the trained model is spread over the processes"
    )
    num_machines: int = Field(1, ge=1, description="machines that run this same command")
    machine_rank: int = Field(0, ge=0, description="which of them this one is, from 0 (usually by --set)")
    main_process_ip: str | None = Field(None, description="address of the machine with rank 0")
    main_process_port: int | None = Field(
        None, ge=1, le=65535, description="port there; empty: a free one, or 29500 with several machines"
    )
    accelerate_config: Path | None = Field(
        None, description="a file of `accelerate config` that decides all of this instead"
    )


class SaveSettings(Section):
    """How trained checkpoints are written."""

    code: Literal["parent", "toolkit", "both"] = Field(
        "parent",
        description=(
            "modelling files for trust_remote_code of our families: parent's own where it brought some, or the"
            " toolkit's"
        ),
    )


class Config(Section):
    """The whole of align.yaml."""

    name: str = Field("run", pattern=r"^[\w.-]*\w[\w.-]*$", description="the run's name; its folder is run_root/name")
    run_root: Path = Field(Path("runs"), description="where runs are kept")
    policy: str = Field(..., description="checkpoint to start from: a folder or a hub id")
    pairs_file: Path | None = Field(
        None,
        description=(
            "existing preference pairs (off-policy, JSONL): round 1 trains on them, nothing is sampled or scored"
        ),
    )
    questions: Path | None = Field(
        None, description="image questions (JSONL: id, question, images, answer); may be empty with pairs_file"
    )
    image_root: Path | None = Field(
        None, description="folder that all images lie in; empty: the folder of the questions (or pairs) file"
    )
    max_image_pixels: int = Field(100_000_000, ge=1, description="larger images are refused")
    rounds: int = Field(3, ge=1, description="rounds of sample, score and dpo")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything random")
    shared_prefix: Literal["auto", "on", "off"] = Field(
        "auto", description="encode each question once; auto: where the first batch proves it exact"
    )
    model: ModelSettings = Field(default_factory=ModelSettings, description="how checkpoints are opened")
    sample: SampleSettings = Field(default_factory=SampleSettings, description="responses")
    critic: CriticSettings = Field(default_factory=CriticSettings, description="judgement")
    pairs: PairSettings = Field(default_factory=PairSettings, description="preference pairs")
    dpo: DpoSettings = Field(default_factory=DpoSettings, description="training")
    save: SaveSettings = Field(default_factory=SaveSettings, description="checkpoints")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="held-out numbers")
    launch: LaunchSettings = Field(default_factory=LaunchSettings, description="processes")
    server: ServerSettings = Field(default_factory=ServerSettings, description="how servers are spoken to")
    vllm: VllmSettings = Field(default_factory=VllmSettings, description="vLLM servers that stages start themselves")

    @field_validator("shared_prefix", mode="before")
    @classmethod
    def _not_a_truth_value(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `on` or `off` so.
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("questions")
    @classmethod
    def _has_data(cls, questions: Path | None, info: ValidationInfo) -> Path | None:
        if questions is None and info.data.get("pairs_file") is None:
            raise ValueError("required, unless pairs_file is given")
        return questions

    @field_validator("rounds")
    @classmethod
    def _can_be_fed(cls, rounds: int, info: ValidationInfo) -> int:
        if rounds > 1 and info.data.get("questions", Path()) is None:
            raise ValueError("pairs_file without questions is enough for 1 round")
        return rounds

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.run_root / self.name

    @property
    def question_images(self) -> Path:
        """The folder that images of questions and pairs lie in."""
        data = self.questions or self.pairs_file
        assert data is not None
        return self.image_root or data.parent

    @property
    def evaluation_images(self) -> Path:
        """The folder that images of held-out questions lie in."""
        if self.evaluate.image_root is not None:
            return self.evaluate.image_root
        return self.image_root or (self.evaluate.questions.parent if self.evaluate.questions else Path())


def find_config(explicit: Path | None) -> Path:
    """The configuration file: the one named, else align.yaml in the current folder."""
    path = explicit if explicit is not None else Path(CONFIG_NAME)
    if path.is_dir():
        path = path / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            "no such configuration file", where=str(path), fix="write one with `align init`, or name it with --config"
        )
    return path


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and check a configuration; relative paths in it count from its own folder.

    Raises:
        UserError: bad YAML, unknown keys (with the nearest known one), wrong values: all of them at once.
    """
    path = Path(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=str(path)) from None
    except BAD_YAML as error:
        raise UserError(f"not valid YAML: {yaml_problem(error)}", where=str(path)) from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"expected keys and values, found {type(data).__name__}", where=str(path))
    for override in overrides or []:
        _apply_override(data, override)
    return build_config(data, base=path.resolve().parent, where=str(path))


def checkpoint_config(checkpoint: str, overrides: list[str] | None = None) -> Config:
    """The defaults with overrides, for a checkpoint by itself: a run's own keys (questions, critic)
    mean nothing in it."""
    data: dict[str, Any] = {"policy": checkpoint, "questions": os.devnull}
    for override in overrides or []:
        _apply_override(data, override)
    return build_config(data, base=Path.cwd(), where="--set")


def build_config(data: dict[str, Any], *, base: Path, where: str = CONFIG_NAME) -> Config:
    """A checked Config from plain data; relative paths become absolute under `base`."""
    renamed = [f"{old}: is called {new} now" for old, new in RENAMED.items() if _stands_in(data, old)]
    if renamed:
        problems = "\n".join(f"  - {line}" for line in renamed)
        raise UserError(f"the configuration has keys of an earlier version:\n{problems}", where=where)
    try:
        config = Config.model_validate(_without_empty(data))
    except ValidationError as error:
        problems = "\n".join(f"  - {line}" for line in _problems(error))
        raise UserError(f"the configuration has faults:\n{problems}", where=where) from None
    config.run_root = base / config.run_root
    config.questions = base / config.questions if config.questions else None
    config.pairs_file = base / config.pairs_file if config.pairs_file else None
    config.image_root = base / config.image_root if config.image_root else None
    config.policy = _local_or_hub(config.policy, base)
    _resolve_critic(config.critic, base)
    if config.evaluate.questions:
        config.evaluate.questions = base / config.evaluate.questions
    if config.evaluate.image_root:
        config.evaluate.image_root = base / config.evaluate.image_root
    if config.launch.accelerate_config:
        config.launch.accelerate_config = base / config.launch.accelerate_config
    return config


def dump_config(config: Config) -> str:
    """The configuration as YAML, complete and without comments."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def commented_config(values: dict[str, Any] | None = None) -> str:
    """A complete align.yaml with every key explained; `values` (nested) stand in for the defaults."""
    lines = [
        "# align.yaml: one run of sample -> score -> dpo, round after round.",
        "# Relative paths count from this file's folder.",
        "",
    ]
    lines += _section_lines(Config, values or {}, indent=0)
    return "\n".join(lines) + "\n"


def _section_lines(model: type[BaseModel], values: dict[str, Any], indent: int) -> list[str]:
    pad = "  " * indent
    lines: list[str] = []
    for key, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += ["", f"{pad}# {(section.__doc__ or '').strip().splitlines()[0]}", f"{pad}{key}:"]
            lines += _section_lines(section, values.get(key, {}), indent + 1)
            continue
        value = values.get(key, "" if field.is_required() else field.get_default(call_default_factory=True))
        lines += [f"{pad}# {field.description}{_choices(section)}", f"{pad}{key}: {_scalar(value)}"]
    extra = {key: value for key, value in values.items() if key not in model.model_fields}
    lines += [f"{pad}{key}: {_scalar(value)}" for key, value in extra.items()]
    return lines


def _choices(annotation: Any) -> str:
    values = get_args(annotation)
    return f" [{' | '.join(values)}]" if values and all(isinstance(value, str) for value in values) else ""


def _scalar(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, Path):
        value = str(value)
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
        .strip()
        .removesuffix("...")
        .strip()
    )


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set expects key=value, found {override!r}", fix="for example --set dpo.learning_rate=5e-7")
    try:
        value = parse_yaml(text)
    except BAD_YAML as error:
        raise UserError(f"--set {key}: the value is not valid YAML ({yaml_problem(error)})") from None
    *parents, last = key.strip().split(".")
    node = data
    for part in parents:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(f"--set {key}: {part!r} is a value, not a section")
    node[last] = value


def _without_empty(data: dict[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """An empty value means the default, so that a key can stand in the file with its comment and nothing after it.

    Only the keys of the configuration itself: inside of settings that are handed on (`processor`, `options`) an empty
    value is a value.
    """
    kept = {}
    for key, value in data.items():
        field = model.model_fields.get(key)
        section = field.annotation if field is not None else None
        if value is None:
            continue
        if isinstance(value, dict) and isinstance(section, type) and issubclass(section, BaseModel):
            value = _without_empty(value, section)
        kept[key] = value
    return kept


def _stands_in(data: Any, key: str) -> bool:
    """
    >>> _stands_in({"dpo": {"beta": 0.1}}, "dpo.beta"), _stands_in({"dpo": None}, "dpo.beta")
    (True, False)
    """
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        key = ".".join(path)
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(path[-1], _known_keys(path[:-1]), n=1, cutoff=0.5)
            lines.append(f"{key}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else ""))
        elif fault["type"] == "missing":
            lines.append(f"{key}: required, but not given")
        else:
            problem = fault["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {problem}, found {fault['input']!r}" if key else problem)
    return lines


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _resolve_critic(critic: CriticSettings, base: Path) -> None:
    """Make the places that the critic's settings name absolute: its own, and those of a panel's members."""
    own = {name: getattr(critic, name) for name in ("model", "prompt", "function", "file")}
    for name, value in _resolved_places(own, base).items():
        setattr(critic, name, value)
    options = _resolved_places(critic.options, base)
    if isinstance(options.get("critics"), dict):
        options["critics"] = {
            name: _resolved_places(member, base) if isinstance(member, dict) else member
            for name, member in options["critics"].items()
        }
    critic.options = options


def _resolved_places(settings: dict[str, Any], base: Path) -> dict[str, Any]:
    """Settings with the model, prompts, function and file that they name as absolute paths."""
    found = dict(settings)
    for name, value in settings.items():
        if not isinstance(value, str | Path):
            continue
        if name == "model":
            found[name] = _local_or_hub(str(value), base)
        elif name in ("prompt", "split_prompt") and (base / value).is_file():
            found[name] = str(base / value)
        elif name == "function":
            found[name] = str(base / os.path.expanduser(value))
        elif name == "file":
            found[name] = type(value)(base / os.path.expanduser(value))
    return found


def _local_or_hub(reference: str, base: Path) -> str:
    """A path under `base` when there is one, else the reference as it was (a hub id)."""
    local = base / os.path.expanduser(reference)
    looks_local = local.exists() or reference.startswith((".", "/", "~")) or reference.count("/") != 1
    return str(local) if looks_local else reference
