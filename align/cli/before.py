"""Commands that come before a run: a configuration to start from, data, what is wrong, what it will need."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from align.cli.console import nothing_to_resume, say
from align.cli.options import ConfigOption, SetOption, app
from align.config import CONFIG_NAME, commented_config, find_config, load_config
from align.errors import UserError


@app.command(epilog="Example:  align init --recipe valley2-dpo --policy ./Valley-Eagle-7B --pairs mmpr/pairs.jsonl")
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write align.yaml.")] = Path(),
    policy: Annotated[str | None, typer.Option(help="Checkpoint to start from.")] = None,
    questions: Annotated[str | None, typer.Option(help="Image questions (JSONL).")] = None,
    critic: Annotated[str | None, typer.Option(help="Checkpoint of the critic model.")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Pairs that exist already (JSONL), for recipes that use some.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder that their image paths count from; default: that of the file.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Start from a recipe; `list` names them.")] = None,
    theirs: Annotated[
        Path | None,
        typer.Option("--from", help="Start from a configuration or a script of TRL, LLaMA-Factory or ms-swift."),
    ] = None,
) -> None:
    """Write a commented align.yaml to start from."""
    from align.recipes import recipe_names, recipe_text

    if recipe == "list":
        say("\n".join(recipe_names()), next_command="align init --recipe NAME")
        return
    path = folder / CONFIG_NAME
    if path.exists():
        raise UserError("there is one already", where=str(path), fix="edit it, or name another folder")
    images = None if image_root is None else str(image_root)
    after = "align run" if recipe == "demo" else "edit it, then: align run"
    if theirs is not None and recipe is not None:
        raise UserError("--from and --recipe exclude each other", fix="name one of them")
    if theirs is not None:
        from align.migrate.convert import migrate

        given = {"policy": policy, "pairs_file": pairs, "questions": questions, "image_root": images}
        done = migrate(theirs, given)
        say("\n".join(done.lines()), next_command=None)
        text, after = commented_config(done.values), f"{done.data}, then: align check"
    elif recipe is not None:
        text = recipe_text(recipe, policy=policy, questions=questions, critic=critic, pairs=pairs, image_root=images)
    else:
        values = {
            "policy": policy or "path/to/checkpoint",
            "questions": questions or (None if pairs else "questions.jsonl"),
            "pairs_file": pairs,
            "image_root": images,
            "critic": {"model": critic},
            "dpo": {"learning_rate": 5e-7, "beta": 0.1},
        } | ({"rounds": 1} if pairs and not questions else {})
        text = commented_config({key: value for key, value in values.items() if value is not None})
    folder.mkdir(parents=True, exist_ok=True)
    if recipe == "demo":
        from align.demo import write_demo
        from align.demo.play import NUM_EVAL, NUM_QUESTIONS

        write_demo(folder, num_questions=NUM_QUESTIONS, num_eval=NUM_EVAL, seed=0)
    path.write_text(text, encoding="utf-8")
    say(f"wrote {path}", next_command=after)


@app.command(epilog="Example:  align data MMPR/meta.json --limit 100000 --copy-images --out mmpr")
def data(
    source: Annotated[str, typer.Argument(help="A file, a folder, or the id of a dataset.")],
    out: Annotated[Path, typer.Option(help="Folder for questions.jsonl or pairs.jsonl and images.")],
    format_: Annotated[
        str | None, typer.Option("--format", help="How the rows are written; default: recognised by their shape.")
    ] = None,
    make: Annotated[
        str | None, typer.Option("--as", help="questions or pairs; default: pairs where there are preferences.")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Of a plain table: question=prompt,images=picture,...")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths count from.")] = None,
    copy_images: Annotated[bool, typer.Option(help="Link or copy images that are files into OUT/images.")] = False,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images that are URLs.")] = False,
    split: Annotated[str, typer.Option(help="Of a `datasets` source.")] = "train",
    subset: Annotated[
        str | None, typer.Option(help="Configuration of a `datasets` source, or name in a dataset_info.json.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw at most so many rows.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    min_side: Annotated[int, typer.Option(min=1, help="Least shorter side of an image in pixels.")] = 28,
    against: Annotated[Path | None, typer.Option(help="Leave out images near to those of these questions.")] = None,
    against_root: Annotated[Path | None, typer.Option(help="Folder of their images.")] = None,
) -> None:
    """Convert a public data set, or a table of your own, into questions or pairs."""
    from align.data.importing import ImportOptions, import_data, parse_columns

    options = ImportOptions(
        format=format_,
        make=make,
        columns=parse_columns(columns),
        image_root=image_root,
        copy_images=copy_images,
        allow_urls=allow_urls,
        split=split,
        subset=subset,
        limit=limit,
        seed=seed,
        min_side=min_side,
        against=against,
        against_root=against_root,
    )
    done = import_data(source, out, options)
    made = "--pairs" if done.path.stem == "pairs" else "--questions"
    root = "" if done.image_root == out else f" --image-root {done.image_root}"
    say(
        f"{done.counts.written} of {done.counts.rows} rows -> {done.path}\n{done.counts.text()}\n"
        f"images count from {done.image_root}",
        next_command=f"align init {made} {done.path}{root}",
    )


@app.command(epilog="Example:  align check --against mmbench/questions.jsonl --tower ./siglip-so400m")
def check(
    config: ConfigOption = None,
    set_: SetOption = None,
    against: Annotated[
        Path | None, typer.Option(help="Evaluation questions (JSONL); default: evaluate.questions.")
    ] = None,
    against_root: Annotated[Path | None, typer.Option(help="Folder of their images.")] = None,
    tower: Annotated[str | None, typer.Option(help="Also compare embeddings of this vision tower.")] = None,
    min_cosine: Annotated[float, typer.Option(min=-1, max=1, help="Near from this cosine of embeddings.")] = 0.9,
    max_bits: Annotated[int, typer.Option(min=0, max=128, help="Near up to so many differing bits of 128.")] = 10,
    write: Annotated[Path | None, typer.Option(help="Write the data without bad and near images here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write everything that was found here (JSON).")] = None,
    data_only: Annotated[bool, typer.Option("--data-only", help="Look at the data alone.")] = False,
    decode: Annotated[bool, typer.Option(help="Decode every image to its end (slow for many).")] = False,
) -> None:
    """All that is wrong with a run, before it begins: settings, data, checkpoints, critic, servers, disk.

    Then the data's images: tiny ones, repeats, and what is near to evaluation images.
    """
    from align.check.contamination import report_text, run_check, save_report
    from align.data.pictures import UNREADABLE

    loaded = load_config(find_config(config), set_)
    if not data_only:
        from align.check.preflight import run_preflight

        before = run_preflight(loaded, decode=decode)
        if before.problems:
            several = "s" if len(before.problems) > 1 else ""
            raise UserError(f"{len(before.problems)} problem{several}\n{before.text()}")
        say(before.text(), next_command=None)
    found = run_check(
        loaded,
        against=against,
        against_root=against_root,
        tower=tower,
        max_bits=max_bits,
        min_cosine=min_cosine,
        write=write,
    )
    if report is not None:
        save_report(found, report)
    wrote = f"\nwithout them: {write}" if write else ""
    clean = not (found.near or found.bad_images)
    say(report_text(found) + wrote, next_command="align run" if clean or write else "align check --write FILE")
    if not data_only and UNREADABLE in found.bad_reasons and write is None:
        raise UserError(f"{found.bad_reasons[UNREADABLE]} images cannot be read")


@app.command(epilog="Example:  align selftest --out selftest.json   (attach it to a bug report)")
def selftest(
    only: Annotated[list[str] | None, typer.Argument(help="Names of checks; default: all.")] = None,
    out: Annotated[Path, typer.Option(help="JSON of what was found; complete up to where it was stopped.")] = Path(
        "selftest.json"
    ),
) -> None:
    """Does this machine train, sample and score rightly, and how fast is it?

    A tiny model in the package is trained with every strategy that works here, sampled and asked, each against another
    way to the same numbers. What was measured is what `align plan` counts with from then on.
    """
    from align.selftest.checks import Selftest, temporary_folder
    from align.selftest.report import log_of, run_checks, summary

    def running(name: str) -> None:
        if sys.stdout.isatty():
            typer.echo(f"  ...     {name}\r", nl=False)

    with nothing_to_resume(), temporary_folder() as folder:
        checks = Selftest(Path(folder)).checks(only or ())
        typer.echo(f"{len(checks)} checks, minutes in all; what they print: {log_of(out)}")
        outcomes = run_checks(checks, out, lambda outcome: say(outcome.line(), next_command=None), running)
    failed = [outcome.name for outcome in outcomes if outcome.verdict == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(outcomes)} checks failed: {', '.join(failed)}",
            where=str(out),
            fix="compare with docs/troubleshooting.md, or attach the file to a bug report",
        )
    say(f"{summary(outcomes)} -> {out}", next_command="align plan")


@app.command(epilog="Example:  align plan --gpus 8 --gpu-memory 80")
def plan(
    config: ConfigOption = None,
    set_: SetOption = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all; default: launch.num_processes.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of each in GiB; default: measured, or 80.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="What each achieves, in 10^12 operations per second; default: measured, or 350."),
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="Its memory's bandwidth in GB/s; default: measured, or 2500.")
    ] = None,
    layer_us: Annotated[
        float | None,
        typer.Option(min=0, help="Microseconds of Python to start one layer; default: measured, or 500."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="JSON of an `align selftest` to count with; default: that of this machine, if it has a GPU."),
    ] = None,
    response_tokens: Annotated[int, typer.Option(min=1, help="Mean tokens of a response.")] = 200,
    json_: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """What a run will need: tokens, memory for each strategy, time of every stage. No weights are loaded."""
    from align.plan.make import make_plan
    from align.plan.measured import machine_of, measured_here, read_measured
    from align.plan.text import plan_text

    loaded = load_config(find_config(config), set_)
    count = gpus or loaded.launch.num_processes * loaded.launch.num_machines
    found = read_measured(measured) if measured is not None else measured_here()
    machine = machine_of(found, count, gpu_gib=gpu_memory, tflops=tflops, bandwidth_gbs=bandwidth, layer_us=layer_us)
    made = make_plan(loaded, machine, response_tokens=response_tokens)
    if json_:
        typer.echo(json.dumps(made.as_dict(), indent=2))
    else:
        say(plan_text(made), next_command="align check")
