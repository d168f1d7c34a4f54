"""Commands about one checkpoint: what it is, other layouts, the Hub, a conversation; the demo;
what is installed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align.cli.console import nothing_to_resume, say
from align.cli.options import app
from align.monitoring.format import size


@app.command(epilog="Example:  align info path/to/Valley-Eagle-7B --image photo.jpg")
def info(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    image: Annotated[Path | None, typer.Option(help="Count the visual tokens of this image.")] = None,
) -> None:
    """What a checkpoint is: family, sizes, visual tokens, trainable parts, licence, shared prefix."""
    from align.models.inspect import inspect_checkpoint

    found = inspect_checkpoint(checkpoint, image)
    rows = {
        "architecture": f"{found.architecture}, opened by {found.opened_by}",
        "about": found.about,
        "tensors": f"{found.num_tensors} ({', '.join(f'{n} {dtype}' for dtype, n in found.dtypes.items())})",
        "size": f"{size(found.num_bytes)} on disk",
        "parameters": ", ".join(f"{part} {count:,}" for part, count in found.parameters.items()),
        "freeze": f"dpo.freeze takes any of {', '.join(found.parameters)}, embeddings, head",
        "context": f"{found.context_tokens} tokens",
        "shared prefix": found.shared_prefix,
        "licence": found.licence or "not named in the folder's README.md",
    }
    if image is not None:
        rows["image"] = (
            f"{found.num_visual_tokens} tokens for {image.name}; {found.num_prompt_tokens} in a short prompt"
        )
    for name, text in rows.items():
        typer.echo(f"{name + ':':<15}{text}")


@app.command(epilog="Example:  align push runs/run/round-3/checkpoint me/my-model --dry-run")
def push(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="The repository on the Hugging Face Hub: owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Anybody may see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and upload nothing.")] = False,
) -> None:
    """Upload a checkpoint to the Hugging Face Hub, private unless said otherwise."""
    from align.hub.push import push as upload

    done = upload(checkpoint, repo, public=public, dry_run=dry_run)
    for name, num_bytes in done.files.items():
        typer.echo(f"{size(num_bytes):>12}  {name}")
    what = f"{len(done.files)} files, {size(done.num_bytes)}"
    if dry_run:
        say(f"{what}; nothing was uploaded", next_command=f"align push {checkpoint} {repo}")
    else:
        say(f"{what}: {done.url}", next_command=None)


@app.command(epilog="Example:  align convert llava-onevision-qwen2-7b-ov ov-hf --to llava-hf")
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    to: Annotated[str, typer.Option(help="The layout to write.")],
    base: Annotated[Path | None, typer.Option(help="For delta weights: the base model they are added to.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights (unsafe unless trusted).")
    ] = False,
) -> None:
    """A checkpoint in another layout, tensor by tensor; or delta weights added to their base."""
    from align.models.convert import convert as convert_checkpoint

    done = convert_checkpoint(source, target, to=to, base=base, allow_pickle=allow_pickle)
    dropped = f"; {done.num_dropped_rows} padding rows of the vocabulary left out" if done.num_dropped_rows else ""
    say(
        f"{done.num_tensors} tensors, {size(done.num_bytes)}: {done.folder}{dropped}",
        next_command=f"align info {done.folder}",
    )


@app.command(epilog="Example:  align chat runs/run/round-3/checkpoint --image photo.jpg")
def chat(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint folder, or where it is served: http://host:port, #NAME of several.")
    ],
    image: Annotated[list[Path] | None, typer.Option(help="An image or video to talk about; may be repeated.")] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="Ask this and stop.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    web: Annotated[bool, typer.Option("--web", help="A page in the browser; needs the extra `web`.")] = False,
    compare: Annotated[str | None, typer.Option(help="On the page: another checkpoint, side by side.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 7860,
    host: Annotated[str, typer.Option(help="Where the page listens; 0.0.0.0 lets others in.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Open the page to anybody through gradio.live.")] = False,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the server's key.")] = None,
) -> None:
    """Try a checkpoint: ask about images, in the terminal or on a page."""
    from align.engines.base import SamplingSettings

    settings = SamplingSettings(temperature, max_new_tokens)
    with nothing_to_resume():
        if web:
            from align.chat.web import Address, chat_on_page

            checkpoints = [checkpoint, *([compare] if compare else [])]
            chat_on_page(checkpoints, settings, Address(host, port, share), api_key_env=api_key_env)
        else:
            from align.chat.terminal import chat_in_terminal

            chat_in_terminal(checkpoint, image or [], question, settings, api_key_env=api_key_env)


@app.command(epilog="Example:  align demo --folder demo-run --seed 1")
def demo(
    folder: Annotated[Path, typer.Option(help="Where the demo's data, runs and report go.")] = Path("demo-run"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of sample, score and dpo.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    control: Annotated[bool, typer.Option(help="Also run the control with random preferences.")] = True,
) -> None:
    """Three rounds on real handwritten digits with a tiny Valley-Eagle, offline, on a CPU."""
    from align.demo.play import play_demo

    play_demo(folder, rounds=rounds, seed=seed, control=control)


@app.command(epilog="Example:  align env > env.txt   (for a bug report)")
def env() -> None:
    """Print versions, devices, strategies and what is missing: what a bug report needs, nothing private."""
    from align.check.environment import environment

    typer.echo(environment())
