"""A checkpoint and the settings in, a ready engine out: in this process, or on servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from align.config import ModelSettings, Server, ServerSettings
from align.engines.base import Engine
from align.errors import UserError


def open_engine(
    checkpoint: str,
    settings: ModelSettings,
    *,
    open_image: Callable[[Any], Any],
    processor: dict[str, Any] | None = None,
    shared_prefix: str = "auto",
    batch_size: int | None = None,
) -> Engine:
    """Load a checkpoint for inference in this process.

    Raises:
        UserError: the checkpoint cannot be opened (see `align.models.load`).
    """
    from align.engines.local import LocalEngine
    from align.models.load import load_model, load_processor
    from align.models.placement import pick_device, pick_dtype

    device = pick_device(settings.device)
    model = load_model(
        checkpoint,
        dtype=pick_dtype(settings.dtype, device),
        device=device,
        attn_implementation=settings.attention,
        allow_pickle=settings.allow_pickle,
    )
    return LocalEngine(
        model.eval(),
        load_processor(checkpoint, **(processor or {})),
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
    from align.engines.server import ServerEngine
    from align.engines.server_endpoint import endpoints_of

    named = named_for_round(servers, made_in_round)
    engine = ServerEngine(endpoints_of(named, checkpoint), open_image=open_image, settings=settings)
    engine.check()
    return engine


def served_names(servers: Sequence[Server], checkpoint: str | None, made_in_round: int | None = None) -> list[str]:
    """The names that a checkpoint is served under, for manifests: they change when the model does, URLs may change."""
    return sorted({server.model or checkpoint or "" for server in named_for_round(servers, made_in_round)})


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
