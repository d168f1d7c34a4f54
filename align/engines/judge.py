"""The critic settings in, a critic that is ready to judge out: every model that it needs is opened once.

A panel's members share `critic.model`, unless one names a `model` (and `processor` settings) of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config import Config, Server
from align.errors import UserError, reward_faults
from align.log import log
from align.models.record_faults import CANNOT_READ, UnusableRecord, record_faults
from align.run.hashes import checkpoint_hash
from reward.critics import Critic, Item, Judgement, make_critic, needs, settings_of, uses_judge_model
from reward.judgement import all_unscored


@dataclass(frozen=True)
class MemberModel:
    """A checkpoint that a critic needs: what it is for (`judge_model` or `scorer`), and its processor's settings.

    Where there are `servers`, they have it, and `checkpoint` is at most the name of the model.
    """

    need: str
    checkpoint: str
    processor: dict[str, Any] = field(default_factory=dict)
    servers: tuple[Server, ...] = ()


@dataclass(frozen=True)
class CriticPlan:
    """What `make_critic` is called with, and the models that must be opened for it.

    `shared` serves the critic or all members of a panel without a model of their own; `own` are by member name.
    """

    kind: str
    options: dict[str, Any]
    shared: list[MemberModel]
    own: dict[str, MemberModel]

    @property
    def looks(self) -> bool:
        """Whether the critic asks a model, so that it can be tested whether it looks at the image."""
        return bool(self.shared or self.own)

    def identities(self) -> dict[str, str]:
        """What says which models these are, by what they are for: a checkpoint's hash, or a name on servers."""
        shared = {"critic": " and ".join(sorted(set(map(_identity, self.shared))))} if self.shared else {}
        return shared | {f"critic {name}": _identity(model) for name, model in self.own.items()}


def plan_critic(config: Config) -> CriticPlan:
    """Check the critic's settings and prompts before any weights are loaded.

    Raises:
        UserError: the kind, a setting or a prompt is not as it must be, or a model is missing.
    """
    kind, options = config.critic.kind, dict(config.critic.options)
    with reward_faults():
        known = settings_of(kind)
        if config.critic.prompt is not None and "prompt" in known:
            options["prompt"] = config.critic.prompt
        for name, value in (("function", config.critic.function), ("file", config.critic.file)):
            if value is not None:
                if name not in known:
                    raise UserError(
                        f"critic.{name} is set, and the {kind} critic takes none", fix=f"remove critic.{name}"
                    )
                options[name] = str(value)
        if kind == "random":
            options.setdefault("seed", config.seed)
        wanted: dict[str | None, str | None] = {None: needs(kind)}
        own: dict[str, MemberModel] = {}
        if kind == "panel":
            options, own, wanted = _members(options)
        needed = sorted({need for need in wanted.values() if need in ("judge_model", "scorer")})
        servers = tuple(config.critic.servers)
        served = {"judge_model"} if servers else set()
        if set(needed) - served and config.critic.model is None:
            who = [f"member {name}" for name, need in wanted.items() if name and need in needed]
            raise UserError(
                f"the {kind} critic needs a model" + (f" for {', '.join(who)}" if who else ""),
                fix="set critic.model to its checkpoint, or critic.servers to where it is served",
            )
        name = config.critic.model or ""
        shared = [
            MemberModel(need, name, config.critic.processor, servers if need in served else ()) for need in needed
        ]
        plan = CriticPlan(kind, options, shared, own)
        nobody = _Nobody()
        make_critic(kind, options, judge_model=nobody, scorer=nobody)
    return plan


def _members(
    options: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, MemberModel], dict[str | None, str | None]]:
    """A panel's options without its members' models, those models, and what members without one need."""
    uses_judge_model("panel", options)  # raises where the members are not settings by name
    members, own, wanted = {}, {}, {}
    for name, member in options["critics"].items():
        rest = {key: value for key, value in member.items() if key not in ("model", "processor")}
        need = needs(rest["kind"])
        if member.get("model") and need in ("judge_model", "scorer"):
            own[str(name)] = MemberModel(need, str(member["model"]), dict(member.get("processor") or {}))
        else:
            wanted[str(name)] = need
        members[str(name)] = rest
    return options | {"critics": members}, own, wanted  # type: ignore[return-value]


def open_critic(
    plan: CriticPlan, config: Config, open_image: Callable[[Any], Any], *, logs: Path | None = None
) -> tuple[Critic, Callable[[], dict[str, str]]]:
    """The critic with its models loaded, and a function that gives what they have to say for the manifest.

    `logs`: where servers that are started here write, a file without its ending; None starts none. Of several models
    each would need the GPUs that the others hold, so only a single one is hosted.
    """
    alone = len(plan.shared) + len(plan.own) == 1
    opened: dict[tuple[str, str, str], Any] = {}

    def get(model: MemberModel) -> Any:
        key = (model.need, model.checkpoint, json.dumps(model.processor, sort_keys=True))
        if key not in opened:
            opened[key] = _open(model, config, open_image, logs if alone else None)
        return opened[key]

    shared = {model.need: get(model) for model in plan.shared}
    own = {name: get(model) for name, model in plan.own.items()}
    with reward_faults():
        critic = make_critic(
            plan.kind,
            plan.options,
            judge_model=shared.get("judge_model"),
            scorer=shared.get("scorer"),
            judge_models={name: model for name, model in own.items() if plan.own[name].need == "judge_model"},
            scorers={name: model for name, model in own.items() if plan.own[name].need == "scorer"},
            open_image=open_image,
        )
    return critic, lambda: _notes(opened)


def _open(model: MemberModel, config: Config, open_image: Callable[[Any], Any], logs: Path | None) -> Any:
    if model.need == "scorer":
        from align.engines.reward_model import open_scorer

        return open_scorer(model.checkpoint, config.model, open_image=open_image, processor=model.processor)
    from align.engines.open import open_engine, open_hosted, open_servers

    if model.servers:
        return open_servers(
            model.servers,
            model.checkpoint or None,
            config.server,
            open_image=open_image,
            processor=model.processor,
        )
    engine = config.critic.engine if logs is not None else "local"
    hosted, why = open_hosted(
        config, model.checkpoint, model.processor, engine=engine, open_image=open_image, logs=logs
    )
    if hosted is not None:
        return hosted
    opened = open_engine(
        model.checkpoint,
        config.model,
        open_image=open_image,
        processor=model.processor,
        shared_prefix=config.shared_prefix,
        batch_size=config.critic.batch_size,
    )
    opened.notes["engine"] = why
    return opened


def _identity(model: MemberModel) -> str:
    if not model.servers:
        return checkpoint_hash(model.checkpoint)
    return "served: " + ", ".join(sorted({server.model or model.checkpoint for server in model.servers}))


def _notes(opened: Mapping[tuple[str, str, str], Any]) -> dict[str, str]:
    if len(opened) == 1:
        return dict(next(iter(opened.values())).notes)
    return {
        f"{key} ({checkpoint})": text
        for (_, checkpoint, _), engine in opened.items()
        for key, text in engine.notes.items()
    }


class _Nobody:
    """Stands where models will be while settings are checked; never asked."""

    def log_probs(self, prompts: Any) -> list[Any]:
        raise AssertionError("asked before the engine was opened")

    def generate(self, prompts: Any, *, max_new_tokens: int) -> list[list[str | None]]:
        raise AssertionError("asked before the engine was opened")

    def __call__(self, dialogues: Sequence[Any]) -> list[float | None]:
        raise AssertionError("asked before the reward model was opened")


def open_judged(open_image: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What opens the images of judged items; one that cannot be read is an UnusableRecord, for `judge_each`."""

    def open_one(reference: Any) -> Any:
        with record_faults(str(reference), CANNOT_READ):
            return open_image(reference)

    return open_one


def judge_each(critic: Critic, items: list[Item]) -> list[Judgement]:
    """The critic's judgement of every item; unscored where an image cannot be read or the critic's processor refuses
    it."""
    try:
        with reward_faults():
            return critic.judge(items)
    except UnusableRecord as fault:
        if len(items) == 1:
            log.warning("question %s is unscored: %s", items[0].id, fault)
            return [all_unscored(items[0], fault.reason)]
    return [judgement for item in items for judgement in judge_each(critic, [item])]
