"""What align.yaml may say: its sections, keys, types, defaults and limits, each with the words of its comment.

The keys of TRL's `DPOConfig` inside `dpo:` are checked where TRL is imported (`align.dpo.settings`), not here: this
package stays light.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator

from align.errors import UserError
from reward.pairs import PairSettings


class Section(BaseModel):
    # Built when first needed: `align --help` needs none of them.
    model_config = ConfigDict(extra="forbid", validate_default=True, defer_build=True, allow_inf_nan=False)


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


class ImagePreference(Section):
    """Image-conditional preference (mDPO, arXiv 2406.11839): the chosen response with its picture, and with less."""

    corruption: Literal["crop", "blank", "blur", "shuffle", "other"] = Field(
        "crop", description="what says less: a part of 0 to 20 %, grey, a blur, shuffled patches, another picture"
    )
    weight: float = Field(1.0, ge=0, description="of the conditional term, beside the loss")
    anchor: float = Field(1.0, ge=0, description="of the term that keeps the chosen response's reward above delta")
    delta: float = Field(0.0, description="the reward that the anchor wants of chosen responses")


class DpoSettings(BaseModel):
    """Stage 3: training. Besides these, every field of TRL's DPOConfig may stand here (learning_rate, beta, ...)."""

    model_config = ConfigDict(extra="allow", validate_default=True, defer_build=True, allow_inf_nan=False)

    reference: Literal["round-start", "initial", "live"] = Field(
        "round-start",
        description=(
            "the reference policy: of this round's start (LLaVA-Critic), the first one, or a second model in memory"
        ),
    )
    freeze: list[str] = Field(
        default_factory=list,
        description=(
            "parts that are not trained, with lora get no adapter: vision, projector, language, embeddings, head, or "
            "prefixes of parameter names"
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
    rows: Literal["pair", "question"] = Field(
        "pair",
        description="what is computed in one row: a pair, or a question with every response of its pairs once",
    )
    pair_weight: Literal["pair", "question"] = Field(
        "pair", description="what counts 1 in the mean of a step: every pair, or all pairs of a question together"
    )
    tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="tokens that a process computes at a time, padding included; empty: per_device_train_batch_size",
    )
    eval_steps: float | None = Field(
        None,
        gt=0,
        description="optimiser steps (below 1: share of the training) between two looks at held-out pairs; empty: none",
    )
    held_out: float = Field(
        0.1, gt=0, lt=1, description="share of the questions whose pairs are not trained on, with eval_steps"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="which state becomes the round's checkpoint: the last, or the best on held-out pairs"
    )
    keep_metric: Literal["loss", "margin", "accuracy"] = Field(
        "loss", description="of held-out pairs, that the best state is chosen by"
    )
    patience: int | None = Field(
        None, ge=1, description="end the training after so many looks without improvement; empty: never"
    )
    image_preference: ImagePreference | None = Field(
        None,
        description="hold the chosen response with its picture against the same with less of it: "
        "{corruption: crop, weight: 1.0, anchor: 1.0, delta: 0.0}; empty: not done",
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
    image_dependence: int = Field(
        128,
        ge=0,
        description="held-out questions asked again with a blank image and with another question's, "
        "to see that the policy looks",
    )
    gates: dict[str, float] = Field(
        default_factory=dict,
        description="end the run after a round unless these hold, "
        "e.g. {min_image_dependence: 0.5, min_image_dependence_change: -0.1}",
    )
    stop_if_worse: bool = Field(
        False, description="end the run after a round that is worse than its parent by more than chance"
    )
    select: Literal["last", "best"] = Field(
        "last", description="which checkpoint the next round starts from and the run results in: the last, or the best"
    )
    select_metric: Literal["auto", "sampled_accuracy", "greedy_accuracy", "win_rate", "hallucination"] = Field(
        "auto",
        description="held-out metric that select and stop_if_worse go by; auto: the first that is measured of "
        "sampled_accuracy, win_rate and hallucination",
    )
    patience: int | None = Field(
        None, ge=1, description="with select: best, end the run after so many rounds without a better one; empty: never"
    )
    decision_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of the held-out questions that gates, stop_if_worse, select and patience go by, none of "
        "which is in the reported numbers; without such a setting nothing is set apart",
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

    @field_validator("select", "stop_if_worse", "gates")
    @classmethod
    def _has_questions(cls, decides: Any, info: ValidationInfo) -> Any:
        if decides and decides != "last" and info.data.get("questions", Path()) is None:
            raise ValueError("needs held-out questions to decide by (evaluate.questions)")
        return decides

    @field_validator("patience")
    @classmethod
    def _waits_for_better(cls, patience: int | None, info: ValidationInfo) -> int | None:
        if patience is not None and info.data.get("select", "best") != "best":
            raise ValueError("needs evaluate.select: best")
        return patience

    @property
    def decides(self) -> bool:
        """Whether anything of a run is decided by held-out numbers, so that some questions are set apart for it."""
        return bool(self.gates) or self.stop_if_worse or self.select == "best"


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


class HubSettings(Section):
    """Checkpoints on the Hugging Face Hub while the run lasts; a push that fails is a warning and ends nothing."""

    repo: str | None = Field(None, description="owner/name of the repository; empty: nothing is pushed (align push)")
    each_round: bool = Field(True, description="every round, with a tag round-N each; false: the run's result alone")
    private: bool = Field(True, description="make the repository private, where it is not there yet")


class Source(Section):
    """One of several files of questions; a path alone is one, too."""

    file: Path = Field(..., description="image questions (JSONL)")
    name: str | None = Field(
        None, pattern=r"^[\w.-]*\w[\w.-]*$", description="in ids and counts; empty: the file's name without its ending"
    )
    weight: float = Field(
        1.0, gt=0, description="share of sample.questions_per_round, relative to the other sources without a limit"
    )
    limit: int | None = Field(None, ge=1, description="so many questions per round, whatever the weights")
    image_root: Path | None = Field(
        None, description="folder of its images; empty: that of the configuration, else the folder of the file"
    )

    @property
    def label(self) -> str:
        """What its questions are known by."""
        return self.name or self.file.stem


def _source_of_path(value: Any) -> Any:
    return {"file": value} if isinstance(value, str | Path) else value


Sources = list[Annotated[Source, BeforeValidator(_source_of_path)]]
# A list is several sources, anything else the path of one file.
Questions = Annotated[
    Annotated[Path, Tag("file")] | Annotated[Sources, Field(min_length=1), Tag("sources")],
    Discriminator(lambda value: "sources" if isinstance(value, list) else "file"),
]


class Config(Section):
    """The whole of align.yaml."""

    name: str = Field(
        "run", pattern=r"^[\w.-]*\w[\w.-]*$", max_length=100, description="the run's name; its folder is run_root/name"
    )
    run_root: Path = Field(Path("runs"), description="where runs are kept")
    policy: str = Field(..., description="checkpoint to start from: a folder or a hub id")
    pairs_file: Path | None = Field(
        None,
        description=(
            "existing preference pairs (off-policy, JSONL): round 1 trains on them, nothing is sampled or scored"
        ),
    )
    questions: Questions | None = Field(
        None,
        description=(
            "image questions (JSONL: id, question, images, answer), or a list of files: paths or"
            " {file, name, weight or limit, image_root}; may be empty with pairs_file"
        ),
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
    hub: HubSettings = Field(default_factory=HubSettings, description="pushes")
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
    def _has_data(cls, questions: Path | list[Source] | None, info: ValidationInfo) -> Path | list[Source] | None:
        if questions is None and info.data.get("pairs_file") is None:
            raise ValueError("required, unless pairs_file is given")
        labels = [source.label for source in questions] if isinstance(questions, list) else []
        if len(set(labels)) < len(labels):
            raise ValueError("two sources have the same name; give each a name of its own")
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
    def sources(self) -> list[Source]:
        """The files of questions; one for a path, none with pairs_file alone."""
        if self.questions is None:
            return []
        return self.questions if isinstance(self.questions, list) else [Source(file=self.questions)]

    def image_root_of(self, source: Source) -> Path:
        """The folder that a source's images lie in."""
        return source.image_root or self.image_root or source.file.parent

    @property
    def question_images(self) -> Path:
        """The folder that images of questions and pairs lie in; of several sources the one above all their roots."""
        if not self.sources:
            assert self.pairs_file is not None
            return self.image_root or self.pairs_file.parent
        if len(self.sources) == 1:
            return self.image_root_of(self.sources[0])
        return Path(os.path.commonpath([self.image_root_of(source).resolve() for source in self.sources]))

    @property
    def evaluation_images(self) -> Path:
        """The folder that images of held-out questions lie in."""
        if self.evaluate.image_root is not None:
            return self.evaluate.image_root
        return self.image_root or (self.evaluate.questions.parent if self.evaluate.questions else Path())
