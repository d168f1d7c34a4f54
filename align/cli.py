"""The command line: each command reads align.yaml, runs one stage (or all), and names the next command.

torch is imported inside the commands, so `--help` is instant. Exit codes: 0 done, 2 the user can mend it, 1 our fault.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from align.config import (
    CONFIG_NAME,
    Config,
    checkpoint_config,
    commented_config,
    dump_config,
    find_config,
    load_config,
)
from align.distributed.launch import adopt_slurm, is_started_by_align, run_stage_command, wants_processes
from align.distributed.ranks import is_main_process, world_size
from align.distributed.worker_errors import Fault, fault_of, is_told_of, tell
from align.errors import UserError
from align.log import log
from align.monitoring.format import size
from align.run.folder import RunDir

if TYPE_CHECKING:
    from align.status.run_status import RunStatus, RunWatch

app = typer.Typer(
    name="align",
    help="Iterative DPO for vision-language models: sample, score, dpo, round after round.",
    epilog="Start with `align demo` (offline, on a CPU) or `align init`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help=f"Configuration file; default: {CONFIG_NAME} in the current folder."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one key, e.g. dpo.learning_rate=5e-7."),
]
RoundOption = Annotated[
    int, typer.Option("--round", "-r", min=1, help="Which round; it needs the round before complete.")
]
RedoOption = Annotated[
    bool, typer.Option("--redo", help="Discard what this stage (and later ones of the round) has done.")
]

ProcessesOption = Annotated[
    int | None, typer.Option("--num-processes", "-n", min=1, help="Processes on this machine, one a GPU.")
]


@app.command(epilog="Example:  align init --recipe valley2-dpo --policy ./Valley-Eagle-7B --pairs mmpr/pairs.jsonl")
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write align.yaml.")] = Path(),
    policy: Annotated[str | None, typer.Option(help="Checkpoint to start from.")] = None,
    questions: Annotated[str | None, typer.Option(help="Image questions (JSONL).")] = None,
    critic: Annotated[str | None, typer.Option(help="Checkpoint of the critic model.")] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Pairs that exist already (JSONL), for recipes that use some.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Start from a recipe; `list` names them.")] = None,
) -> None:
    """Write a commented align.yaml to start from."""
    from align.recipes import recipe_names, recipe_text

    if recipe == "list":
        _say("\n".join(recipe_names()), next_command="align init --recipe NAME")
        return
    path = folder / CONFIG_NAME
    if path.exists():
        raise UserError("there is one already", where=str(path), fix="edit it, or name another folder")
    if recipe is not None:
        text = recipe_text(recipe, policy=policy, questions=questions, critic=critic, pairs=pairs)
    else:
        values = {
            "policy": policy or "path/to/checkpoint",
            "questions": questions or (None if pairs else "questions.jsonl"),
            "pairs_file": pairs,
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
    _say(f"wrote {path}", next_command="align run" if recipe == "demo" else "edit it, then: align run")


@app.command(epilog="Example:  align data MMPR/meta.json --format mmpr --limit 100000 --copy-images --out mmpr")
def data(
    source: Annotated[str, typer.Argument(help="A file, a folder, or the id of a dataset.")],
    out: Annotated[Path, typer.Option(help="Folder for questions.jsonl or pairs.jsonl and images.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="plain, llava, llava-preference, mmpr, rlaif-v, rlhf-v, vlfeedback, mm-rlhf, spa-vl or povid.",
        ),
    ] = "plain",
    make: Annotated[str | None, typer.Option("--as", help="questions or pairs; default: what the format has.")] = None,
    columns: Annotated[str | None, typer.Option(help="For plain: question=prompt,images=picture,...")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths count from.")] = None,
    copy_images: Annotated[bool, typer.Option(help="Link or copy images that are files into OUT/images.")] = False,
    split: Annotated[str, typer.Option(help="Of a `datasets` source.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration name of a `datasets` source.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw at most so many rows.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    min_side: Annotated[int, typer.Option(min=1, help="Least shorter side of an image in pixels.")] = 28,
    against: Annotated[Path | None, typer.Option(help="Leave out images near to those of these questions.")] = None,
    against_root: Annotated[Path | None, typer.Option(help="Folder of their images.")] = None,
) -> None:
    """Convert a public data set, or a table of your own, into questions or pairs."""
    from align.data.importing import ImportWishes, import_data, parse_columns

    if make not in (None, "questions", "pairs"):
        raise UserError(f"--as is questions or pairs, found {make!r}")
    wishes = ImportWishes(
        format=format_,
        make=make,
        columns=parse_columns(columns),
        image_root=image_root,
        copy_images=copy_images,
        split=split,
        subset=subset,
        limit=limit,
        seed=seed,
        min_side=min_side,
        against=against,
        against_root=against_root,
    )
    done = import_data(source, out, wishes)
    left_out = ", ".join(f"{reason} ({count})" for reason, count in done.counts.dropped.most_common())
    _say(
        f"{done.counts.written} of {done.counts.rows} rows -> {done.path}\n"
        + (f"left out: {left_out}; see {out / 'import.json'}\n" if left_out else "")
        + f"images count from {done.image_root}",
        next_command=f"align init, with {'pairs_file' if done.path.stem == 'pairs' else 'questions'}: {done.path}"
        + ("" if done.image_root == out else f" and image_root: {done.image_root}"),
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
        _say(before.text(), next_command=None)
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
    _say(report_text(found) + wrote, next_command="align run" if clean or write else "align check --write FILE")
    if not data_only and UNREADABLE in found.bad_reasons and write is None:
        raise UserError(f"{found.bad_reasons[UNREADABLE]} images cannot be read")


@app.command(epilog="Example:  align plan --gpus 8 --gpu-memory 80")
def plan(
    config: ConfigOption = None,
    set_: SetOption = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all; default: launch.num_processes.")] = None,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="Memory of each in GiB.")] = 80.0,
    tflops: Annotated[float, typer.Option(min=0.001, help="What each achieves, in 10^12 operations a second.")] = 350.0,
    bandwidth: Annotated[float, typer.Option(min=0.001, help="Its memory's bandwidth in GB/s.")] = 2500.0,
    layer_us: Annotated[float, typer.Option(min=0, help="Microseconds of Python to start one layer.")] = 500.0,
    response_tokens: Annotated[int, typer.Option(min=1, help="Mean tokens of a response.")] = 200,
    json_: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """What a run will need: tokens, memory for each strategy, time of every stage. No weights are loaded."""
    from align.plan.make import Machine, make_plan
    from align.plan.text import plan_text

    loaded = load_config(find_config(config), set_)
    count = gpus or loaded.launch.num_processes * loaded.launch.num_machines
    machine = Machine(count, gpu_memory, tflops, bandwidth, layer_us)
    made = make_plan(loaded, machine, response_tokens=response_tokens)
    if json_:
        typer.echo(json.dumps(made.as_dict(), indent=2))
    else:
        _say(plan_text(made), next_command="align check")


@app.command(epilog="Example:  align sample --round 1 --set sample.num_responses=8")
def sample(
    round_: RoundOption = 1,
    config: ConfigOption = None,
    set_: SetOption = None,
    redo: RedoOption = False,
    num_processes: ProcessesOption = None,
) -> None:
    """Stage 1: K responses of the current policy to every image question."""
    counts = _stage("sample", round_, config, set_, redo=redo, num_processes=num_processes)
    _say(
        f"{counts['responses']} responses to {counts['questions']} questions",
        next_command=f"align score --round {round_}",
    )


@app.command(epilog="Example:  align score --round 1 --set critic.kind=verifier")
def score(
    round_: RoundOption = 1,
    config: ConfigOption = None,
    set_: SetOption = None,
    redo: RedoOption = False,
    num_processes: ProcessesOption = None,
) -> None:
    """Stage 2: a critic compares the responses; rewards become preference pairs."""
    counts = _stage("score", round_, config, set_, redo=redo, num_processes=num_processes)
    _say(f"{counts['scored']} responses to {counts['questions']} questions scored", next_command=None)
    pairs(round_, config, set_)


@app.command(
    epilog="Example:  align pairs --round 1 --redo --set pairs.strategy=topk_bottomk --set pairs.max_per_question=4"
)
def pairs(
    round_: RoundOption = 1, config: ConfigOption = None, set_: SetOption = None, redo: RedoOption = False
) -> None:
    """Make the pairs of a scored round again, with other settings (`align score` makes them the first time)."""
    counts = _stage("pairs", round_, config, set_, redo=redo, num_processes=1)
    _say(f"{counts['pairs']} pairs from {counts['questions']} questions", next_command=f"align dpo --round {round_}")


@app.command(epilog="Example:  align dpo --round 1 --num-processes 8 --strategy zero3 --set dpo.beta=0.1")
def dpo(
    round_: RoundOption = 1,
    config: ConfigOption = None,
    set_: SetOption = None,
    redo: RedoOption = False,
    num_processes: ProcessesOption = None,
    strategy: Annotated[str | None, typer.Option(help="ddp, zero2, zero3 or fsdp2.")] = None,
) -> None:
    """Stage 3: DPO on the pairs of the round, into a new checkpoint."""
    set_ = [*(set_ or []), *([f"launch.strategy={strategy}"] if strategy else [])]
    if round_ == 1 and load_config(find_config(config), set_).pairs_file is not None:
        pairs(round_, config, set_)
    _stage("dpo", round_, config, set_, redo=redo, num_processes=num_processes)
    _say("trained", next_command=f"align evaluate --round {round_}, or align sample --round {round_ + 1}")


@app.command(epilog="Example:  align evaluate --round 0   (the first policy)")
def evaluate(
    round_: Annotated[
        int, typer.Option("--round", "-r", min=0, help="Which round's checkpoint; 0 is the first policy.")
    ] = 0,
    config: ConfigOption = None,
    set_: SetOption = None,
    redo: RedoOption = False,
    num_processes: ProcessesOption = None,
    lmms_eval: Annotated[
        str | None, typer.Option(help="Tasks of lmms-eval, e.g. mme,mmbench_en_dev; `list` names them.")
    ] = None,
    lmms_eval_tasks: Annotated[Path | None, typer.Option(help="Folder of your own tasks (YAML).")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="For lmms-eval: this one, without a run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="For lmms-eval: so many documents of a task.")] = None,
    out: Annotated[Path | None, typer.Option(help="For lmms-eval: the JSON file of results.")] = None,
) -> None:
    """Held-out numbers of a checkpoint, with intervals; or benchmarks of lmms-eval."""
    if lmms_eval is not None:
        wishes = {"tasks": lmms_eval, "checkpoint": checkpoint, "folder": lmms_eval_tasks, "limit": limit, "out": out}
        _benchmarks(wishes | {"redo": redo}, round_, config, [*(set_ or []), *_processes(num_processes)])
        return
    if checkpoint is not None or limit is not None or out is not None or lmms_eval_tasks is not None:
        raise UserError("--checkpoint, --limit, --out and --lmms-eval-tasks go with --lmms-eval", fix="name its tasks")
    counts = _stage("evaluate", round_, config, set_, redo=redo, num_processes=num_processes)
    if is_main_process() and not is_started_by_align():
        from align.evaluation.table import print_table
        from align.loop import warning_of

        loaded = _load(config, set_ or [])
        print_table({loaded.name: loaded.run_dir})
        _warn(warning_of(loaded, round_))
    _say(f"{counts['questions']} held-out questions answered", next_command="align report")


@app.command(epilog="Example:  align run --rounds 3")
def run(
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of sample, score and dpo.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """All of it: every round, evaluation and the report. The same command goes on after an interruption."""
    from align.evaluation.table import print_table
    from align.loop import run_rounds
    from align.report import write_report

    set_ = [*(set_ or []), *([f"rounds={rounds}"] if rounds else [])]
    loaded = _load(config, set_)
    ended = run_rounds(loaded, _config_args(config, set_))
    if not is_main_process():
        return
    path = write_report(loaded.run_dir)
    print_table({loaded.name: loaded.run_dir})
    for said in ended.worse:
        _warn(said)
    best = ended.last
    if ended.early:
        best -= 1
        before = f"round {best}" if best else "the first policy"
        _say(
            f"the run ended after round {ended.last} of {loaded.rounds} (evaluate.stop_if_worse): {before} is better",
            next_command=None,
        )
    checkpoint = RunDir(loaded.run_dir).policy(best + 1, loaded.policy)
    _say(f"checkpoint: {checkpoint}\nreport:     {path}", next_command="open the report in a browser")


@app.command(epilog="Example:  align report runs/critic --control runs/random --out critic.html")
def report(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder, without a configuration; default: that of align.yaml.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    control: Annotated[Path | None, typer.Option(help="Folder of a control run to show beside this one.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run's folder.")] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images, where they are no longer where the run found them.")
    ] = None,
    evaluation_image_root: Annotated[
        Path | None, typer.Option(help="Folder of the held-out images, where it is another than --image-root.")
    ] = None,
    max_held_out: Annotated[int, typer.Option(min=0, help="Most held-out questions to embed with their images.")] = 60,
    max_training: Annotated[int, typer.Option(min=0, help="Most training questions to embed.")] = 40,
    backdrop: Annotated[
        bool, typer.Option(help="Offer the published course of Valley2-DPO behind the training curves.")
    ] = True,
) -> None:
    """One HTML page of the run: curves, pairs, critic, questions with their responses."""
    from align.report import write_report

    if run is not None and (config is not None or set_):
        raise UserError("a run's folder and a configuration were given", fix="name one of them")
    path = write_report(
        run if run is not None else load_config(find_config(config), set_).run_dir,
        control=control,
        image_root=image_root,
        evaluation_image_root=evaluation_image_root or image_root,
        out=out,
        max_held_out=max_held_out,
        max_training=max_training,
        backdrop=backdrop,
    )
    _say(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)", next_command="open it in a browser")


@app.command(epilog="Example:  align status runs/run --watch   (from another terminal)")
def status(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder; default: the run of align.yaml in the current folder.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until the run is complete.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 5.0,
) -> None:
    """Where a run stands: stages, progress, speed, time left, last losses, warnings."""
    from align.status.run_status import RunWatch, find_run

    watched = RunWatch(find_run(run))
    seen = _watch(watched, every) if watch else watched.look()
    _say(seen.text, next_command=seen.next_command)


def _watch(watched: RunWatch, every: float) -> RunStatus:
    """Show a run until it is complete: in place on a terminal, else again after every change."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    seen, before = watched.look(), ""
    live = Live(console=Console(), auto_refresh=False, transient=True) if sys.stdout.isatty() else None
    with live or contextlib.nullcontext():
        while not seen.complete:
            if live is not None:
                live.update(Text(seen.text), refresh=True)
            elif seen.text != before:
                typer.echo(seen.text)
            before = seen.text
            time.sleep(every)
            seen = watched.look()
    return seen


@app.command(epilog="Example:  align compare runs/critic runs/verifier")
def compare(
    one: Annotated[Path, typer.Argument(help="A run's folder.")],
    other: Annotated[Path, typer.Argument(help="Another run's folder.")],
) -> None:
    """Two runs side by side, and their paired difference on the same held-out questions."""
    from align.evaluation.compare import print_comparison

    print_comparison(one, other)


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
        _say(f"{what}; nothing was uploaded", next_command=f"align push {checkpoint} {repo}")
    else:
        _say(f"{what}: {done.url}", next_command=None)


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
    _say(
        f"{done.num_tensors} tensors, {size(done.num_bytes)}: {done.folder}{dropped}",
        next_command=f"align info {done.folder}",
    )


@app.command(epilog="Example:  align chat runs/run/round-3/checkpoint --image photo.jpg")
def chat(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image or video to talk about; may be repeated.")] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="Ask this and stop.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    web: Annotated[bool, typer.Option("--web", help="A page in the browser; needs the extra `web`.")] = False,
    compare: Annotated[str | None, typer.Option(help="On the page: another checkpoint, side by side.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 7860,
    host: Annotated[str, typer.Option(help="Where the page listens; 0.0.0.0 lets others in.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Open the page to anybody through gradio.live.")] = False,
) -> None:
    """Try a checkpoint: ask about images, in the terminal or on a page."""
    from align.engines.base import SamplingSettings

    settings = SamplingSettings(temperature, max_new_tokens)
    try:
        if web:
            from align.chat.web import Address, chat_on_page

            chat_on_page([checkpoint, *([compare] if compare else [])], settings, Address(host, port, share))
        else:
            from align.chat.terminal import chat_in_terminal

            chat_in_terminal(checkpoint, image or [], question, settings)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


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


def main() -> None:
    """Entry point: faults of the user end in one message and exit code 2."""
    adopt_slurm()
    _set_up_logging()
    if not is_started_by_align():
        signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except SystemExit as ended:
        # typer makes this of Ctrl-C, where the command itself does not take it.
        if isinstance(getattr(ended.__context__, "__cause__", None), KeyboardInterrupt):
            _fail(Fault("interrupted; the same command goes on from here", 130, "users"))
        raise
    except Exception as error:
        fault = fault_of(error)
        if fault.kind == "ours" and world_size() == 1 and not is_started_by_align():
            raise
        _fail(fault)


def _stage(
    name: str,
    number: int,
    config: Path | None,
    overrides: list[str] | None,
    *,
    redo: bool,
    num_processes: int | None,
) -> dict[str, Any]:
    """Run one stage here, or in the processes that the configuration asks for; returns its counts."""
    from align.loop import run_stage

    overrides = [*(overrides or []), *_processes(num_processes)]
    loaded = _load(config, overrides)
    this = RunDir(loaded.run_dir).round(number)
    if wants_processes(loaded) and name != "pairs":
        run_stage_command(loaded, name, number, _config_args(config, overrides) + (["--redo"] if redo else []))
    else:
        run_stage(loaded, name, number, redo=redo)
    return (this.manifest.stage(name) or {}).get("counts", {})


def _benchmarks(wishes: dict[str, Any], number: int, config: Path | None, overrides: list[str]) -> None:
    """Tasks of lmms-eval on a checkpoint, or on that of a round; here, or in several processes."""
    from align.hub.model_card import write_model_card
    from align.lmms_eval import Wishes, list_tasks, run_benchmarks
    from align.lmms_eval.table import print_benchmarks

    asked = Wishes(**wishes)
    if asked.tasks == "list":
        _say("\n".join(list_tasks(asked.folder)), next_command="align evaluate --lmms-eval TASKS")
        return
    alone = asked.checkpoint is not None and config is None
    loaded = checkpoint_config(str(asked.checkpoint), overrides) if alone else _load(config, overrides)
    if wants_processes(loaded):
        settings = [part for item in overrides for part in ("--set", item)]
        settings = settings if alone else _config_args(config, overrides)
        run_stage_command(loaded, "evaluate", number, settings + asked.arguments())
    else:
        run_benchmarks(loaded, asked, number)
    if is_main_process() and not is_started_by_align():
        print_benchmarks(asked.names, asked.results(loaded, number))
        if asked.checkpoint is None and number:
            write_model_card(loaded, number)
    _say(f"results: {asked.results(loaded, number)}", next_command=None)


def _processes(number: int | None) -> list[str]:
    return [f"launch.num_processes={number}"] if number else []


def _load(config: Path | None, overrides: list[str] | None) -> Config:
    loaded = load_config(find_config(config), overrides)
    if is_main_process():
        RunDir(loaded.run_dir).remember_config(dump_config(loaded))
    return loaded


def _config_args(config: Path | None, overrides: list[str]) -> list[str]:
    args = ["--config", str(find_config(config))]
    for override in overrides:
        args += ["--set", override]
    return args


def _say(text: str, *, next_command: str | None) -> None:
    if not is_main_process() or is_started_by_align():
        return
    typer.echo(text)
    if next_command:
        typer.secho(f"next: {next_command}", fg=typer.colors.CYAN)


def _warn(text: str | None) -> None:
    if text is not None:
        typer.secho(f"WARNING: {text}", fg=typer.colors.RED, bold=True, err=True)


def _stop(*_: object) -> None:
    """SIGTERM: what is finished is on the disk. Training takes the signal itself, to finish its step first."""
    if not is_told_of():
        log.info("stopped; the same command goes on from here")
    raise SystemExit(0)


def _fail(fault: Fault) -> NoReturn:
    """End this process for a fault, said by whichever process of a launch should say it."""
    text = tell(fault)
    if text is not None:
        typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)
    sys.exit(fault.code)


class _CurrentStderr(logging.StreamHandler[Any]):
    """Writes to what standard error is at the moment: while a bar is shown, above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def _set_up_logging() -> None:
    import os

    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    log.propagate = False
    # The libraries' own bars and notices would drown ours; their warnings still come through.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
