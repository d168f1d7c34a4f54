"""A checkpoint and the settings in, a ready engine out: in this process, or on servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import Config, ModelSettings, Server, ServerSettings
from align.engines.base import Engine
from align.errors import UserError

if TYPE_CHECKING:
    from align.engines.local import LocalEngine
    from align.engines.server.endpoint import Endpoint
    from align.engines.server.engine import ServerEngine


# Of a server that was started here, for the manifest.
SAME_PIXELS = "sent without loss; cut and resized by the checkpoint's own processor, as in this process"
OTHER_PIXELS = (
    "sent without loss; cut and resized by vLLM's processor of the family, whose pixels no server shows: with "
    "torchvision they may differ from those of this process by up to 3 of 255"
)


def arithmetic_settings(config: Config) -> dict[str, Any]:
    """What changes a model's numbers wherever it is asked, for a manifest's settings."""
    return {
        "model": {"dtype": config.model.dtype, "attention": config.model.attention},
        "shared_prefix": config.shared_prefix,
        "image_conversion": config.model.image_conversion,
    }


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
    processor: dict[str, Any] | None = None,
) -> ServerEngine:
    """An engine on servers that have been seen to serve the checkpoint.

    `made_in_round` is the round that made it, 0 for the first policy; None for a model that stays the same in a run.
    `processor`: settings of the checkpoint's own, with which prompts are compared where the checkpoint lies here.

    Raises:
        UserError: no server answers, one serves another model, or a name cannot tell the rounds apart.
    """
    from align.engines.server.endpoint import endpoints_of

    endpoints = endpoints_of(named_for_round(servers, made_in_round), checkpoint)
    return _checked(endpoints, checkpoint, settings, open_image=open_image, processor=processor or {})


def _checked(
    endpoints: list[Endpoint],
    checkpoint: str | None,
    settings: ServerSettings,
    *,
    open_image: Callable[[Any], Any],
    processor: dict[str, Any],
) -> ServerEngine:
    """An engine on endpoints that answer and have the model; where the checkpoint lies here,
    with all that is compared."""
    from align.engines.server.chat import scaled_down
    from align.engines.server.comparison import PromptComparison, check_weights
    from align.engines.server.engine import ServerEngine
    from align.engines.server.own_processor import OwnProcessor

    engine = ServerEngine(endpoints, open_image=open_image, settings=settings)
    engine.check()
    if checkpoint is None or not Path(checkpoint).is_dir():
        return engine
    from align.models.load import context_of, load_processor

    known = {check_weights(each.url, each.root, checkpoint) for each in endpoints if each.alive}
    engine.about["weights"] = "; ".join(sorted(known))
    engine.fleet.context = context_of(checkpoint)
    engine.own = OwnProcessor(
        lambda: load_processor(checkpoint, **processor),
        lambda image: scaled_down(open_image(image), settings.max_image_pixels)[0],
    )
    if settings.compare_prompts:
        engine.comparison = PromptComparison(engine.own)
    return engine


def open_policy(
    config: Config,
    checkpoint: str,
    servers: Sequence[Server],
    *,
    made_in_round: int,
    open_image: Callable[[Any], Any],
    engine: str = "local",
    logs: Path | None = None,
) -> Engine:
    """The policy as a checkpoint of a round: on the stage's servers where it names some, else by its `engine`.

    `logs`: where servers that are started here write, a file without its ending.
    """
    if servers:
        return open_servers(
            servers,
            checkpoint,
            config.server,
            open_image=open_image,
            made_in_round=made_in_round,
            processor=config.model.processor,
        )
    processor = config.model.processor
    hosted, why = open_hosted(config, checkpoint, processor, engine=engine, open_image=open_image, logs=logs)
    if hosted is not None:
        return hosted
    opened = open_engine(
        checkpoint,
        config.model,
        open_image=open_image,
        processor=config.model.processor,
        shared_prefix=config.shared_prefix,
        batch_size=config.sample.batch_size,
    )
    opened.notes["engine"] = why
    return opened


def open_hosted(
    config: Config,
    checkpoint: str,
    processor: dict[str, Any],
    *,
    engine: str,
    open_image: Callable[[Any], Any],
    logs: Path | None,
) -> tuple[Engine | None, str]:
    """An engine on vLLM servers that are started here, where `engine` chooses them, and why it does or does not.

    They run until `align.engines.vllm.hosting.release`, or until another model is hosted.
    """
    from align.engines.vllm.hosting import choose, host

    use, why = choose(engine, checkpoint, config.vllm)
    if not use:
        return None, why
    assert logs is not None
    from align.engines.server.endpoint import endpoints_of
    from align.engines.vllm.command import Served, is_ours
    from align.models.device import pick_device, pick_dtype
    from align.run.hashes import checkpoint_hash

    served = Served(
        checkpoint=checkpoint,
        name=f"checkpoint-{checkpoint_hash(checkpoint)[:16]}",
        dtype=str(pick_dtype(config.model.dtype, pick_device(config.model.device))).removeprefix("torch."),
        processor=processor,
        top_logprobs=config.server.top_logprobs,
    )
    replicas = host(served, config.vllm, logs)
    endpoints = endpoints_of(replicas.servers, None)
    for endpoint in endpoints:
        endpoint.has_ended = partial(replicas.ended, endpoint.url)
    # One that died is waited for while it is restarted; images need not be made smaller for the way.
    changes = {"wait_s": config.vllm.start_timeout_s, "max_image_pixels": config.max_image_pixels}
    settings = config.server.model_copy(update=changes)
    hosted = _checked(endpoints, checkpoint, settings, open_image=open_image, processor=processor)
    hosted.about["engine"] = f"{why}; {len(endpoints)} started here"
    hosted.about["images"] = SAME_PIXELS if is_ours(checkpoint) else OTHER_PIXELS
    return hosted, why


def served_as(servers: Sequence[Server], made_in_round: int | None = None) -> dict[str, str]:
    """For a manifest's inputs: the names that the model is served under, nothing where it is opened in this process.

    URLs are left out: an interrupted stage may resume with other servers of the same model.

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
