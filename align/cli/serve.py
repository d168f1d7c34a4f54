"""The command that serves a checkpoint with vLLM: the whole command line, printed or run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from align.cli.console import say
from align.cli.options import ConfigOption, SetOption, app
from align.config import Config, checkpoint_config, find_config, load_config
from align.errors import UserError
from align.run.folder import RunDir
from align.run.parents import starts_from


@app.command(epilog="Example:  align serve --round 2 --data-parallel-size 8")
def serve(
    checkpoint: Annotated[
        str | None, typer.Argument(help="A checkpoint; default: the policy that --round starts from.")
    ] = None,
    round_: Annotated[
        int | None, typer.Option("--round", "-r", min=1, help="Of the run of align.yaml: serve what it samples from.")
    ] = None,
    critic: Annotated[bool, typer.Option("--critic", help="Serve critic.model instead.")] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    data_parallel_size: Annotated[int, typer.Option(min=1, help="Copies of the model behind the one port.")] = 1,
    run: Annotated[bool, typer.Option("--run", help="Run the command instead of printing it.")] = False,
) -> None:
    """Serve a checkpoint with vLLM so that it reads prompts as it does here: the whole command, printed or run."""
    from align.engines.vllm.command import serve_arguments
    from align.engines.vllm.hosting import PROGRAM, require_vllm

    alone = checkpoint is not None and round_ is None and config is None and not critic
    loaded = checkpoint_config(str(checkpoint), set_) if alone else load_config(find_config(config), set_)
    served, folder, room = _served(loaded, checkpoint, round_, critic=critic, alone=alone)
    settings = loaded.vllm.model_copy(update={"max_model_len": loaded.vllm.max_model_len or room})
    listening = ["--host", host, "--port", str(port)]
    if data_parallel_size > 1:
        listening += ["--data-parallel-size", str(data_parallel_size)]
    arguments = [*serve_arguments(served, settings, folder), *listening]
    if run:
        require_vllm()
        os.execv(sys.executable, [sys.executable, *PROGRAM, *arguments])
    key = "critic.servers" if critic else "sample.servers"
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    typer.echo(shlex.join(["vllm", "serve", *arguments]))
    say(
        f"served as {served.name}; in align.yaml: {key}: [{{url: '{address}', model: {served.name}}}]",
        next_command=None,
    )


def _served(
    config: Config, checkpoint: str | None, round_: int | None, *, critic: bool, alone: bool
) -> tuple[Any, Path, int | None]:
    """What is served, the folder for what the command names, and the tokens that prompt and response need."""
    from align.engines.vllm.command import Served
    from align.models.device import pick_device, pick_dtype
    from align.plan.serving import needs_of_server

    name, processor = "policy-{round}", config.model.processor
    if critic:
        if config.critic.model is None:
            raise UserError("critic.model is not set", fix="set it to the critic's checkpoint")
        checkpoint, name, processor = config.critic.model, "critic", config.critic.processor
    run = RunDir(config.run_dir)
    parent = 0 if checkpoint else starts_from(config, run, round_ or 1)
    checkpoint = checkpoint or run.checkpoint(parent, config.policy)
    max_images, room = (None, None) if alone else needs_of_server(config, checkpoint, processor, critic=critic)
    served = Served(
        checkpoint=checkpoint,
        name=Path(checkpoint).name if alone else name.replace("{round}", str(parent)),
        dtype=str(pick_dtype(config.model.dtype, pick_device(config.model.device))).removeprefix("torch."),
        processor=processor,
        top_logprobs=config.server.top_logprobs,
        max_images=max_images,
    )
    folder = Path(f"serve-{served.name}") if alone else config.run_dir / "servers" / served.name
    return served, folder.resolve(), room
