"""A checkpoint and the settings in, a ready engine out: in this process, or on servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from align.config import Config, ModelSettings, Server, ServerSettings
from align.engines.base import Engine
from align.errors import UserError

if TYPE_CHECKING:
    from align.engines.local import LocalEngine


def open_engine(
    checkpoint: str,
    settings: ModelSettings,
    *,
    open_image: Callable[[Any], Any],
    processor: dict[str, Any] | None = None,
    shared_prefix: str = "auto",
    batch_size: int | None = None,
) -> LocalEngine:
    """Load a checkpoint for inference in this process.

    Raises:
        UserError: the checkpoint cannot be opened (see `align.models.load`), or no question can be written for it.
    """
    from align.engines.local import LocalEngine
    from align.engines.prompts import check_prompts
    from align.models.device import pick_device, pick_dtype
    from align.models.load import load_model, load_processor

    device = pick_device(settings.device)
    opened = load_processor(checkpoint, **(processor or {}))
    check_prompts(opened, checkpoint)
    model = load_model(
        checkpoint,
        dtype=pick_dtype(settings.dtype, device),
        device=device,
        attn_implementation=settings.attention,
        allow_pickle=settings.allow_pickle,
    )
    return LocalEngine(
        model.eval(),
        opened,
        open_image=open_image,
        shared_prefix=shared_prefix,
        batch_size=batch_size,
    )


def open_servers(
    servers: Sequence[Server],
    checkpoint: str | None,
    settings: ServerSettings,
    *,
    open_image: Callable[[Any], Any],
    made_in_round: int | None = None,
) -> Engine:
    """An engine on servers that have been seen to serve the checkpoint.

    `made_in_round` is the round that made it, 0 for the first policy; None for a model that stays the same in a run.

    Raises:
        UserError: no server answers, one serves another model, or a name cannot tell the rounds apart.
    """
    from align.engines.server.endpoint import endpoints_of
    from align.engines.server.engine import ServerEngine

    named = named_for_round(servers, made_in_round)
    engine = ServerEngine(endpoints_of(named, checkpoint), open_image=open_image, settings=settings)
    engine.check()
    return engine


def open_policy(
    config: Config, checkpoint: str, servers: Sequence[Server], *, made_in_round: int, open_image: Callable[[Any], Any]
) -> Engine:
    """The policy as a checkpoint of a round: on the stage's servers where it names some, else in this process."""
    if servers:
        return open_servers(servers, checkpoint, config.server, open_image=open_image, made_in_round=made_in_round)
    return open_engine(
        checkpoint,
        config.model,
        open_image=open_image,
        processor=config.model.processor,
        shared_prefix=config.shared_prefix,
        batch_size=config.sample.batch_size,
    )


def served_as(servers: Sequence[Server], made_in_round: int | None = None) -> dict[str, str]:
    """For a manifest's inputs: the names that the model is served under, nothing where it is opened in this process.

    URLs are left out: an interrupted stage may go on with other servers of the same model.

    >>> served_as([Server(url="http://a", model="policy-{round}"), Server(url="http://b")], 0)
    {'served as': 'its path, policy-0'}
    """
    names = {server.model or "its path" for server in named_for_round(servers, made_in_round)}
    return {"served as": ", ".join(sorted(names))} if names else {}


def named_for_round(servers: Sequence[Server], made_in_round: int | None) -> list[Server]:
    """Servers with the round in the names of their models.

    >>> named_for_round([Server(url="http://a", model="policy-{round}")], 2)[0].model
    'policy-2'
    """
    found = []
    for server in servers:
        model = server.model
        if model is not None and made_in_round is not None:
            if made_in_round and "{round}" not in model:
                raise UserError(
                    f"the name {model!r} is the same in every round, so nothing tells which checkpoint the server has",
                    where=server.url,
                    fix="name it with the round, as in model: policy-{round}, and serve each checkpoint under its own",
                )
            model = model.replace("{round}", str(made_in_round))
        found.append(server.model_copy(update={"model": model}))
    return found
