"""The demo with its critic, with random preferences and with a critic that loves length; a report of each.

    python scripts/harmful_runs.py --folder build/harmful --reports docs/reports --pictures docs/images

Every run and every report is made by the command line, as a person's would; a run that is complete is not repeated.
About three minutes of one CPU core a run. `--pictures` needs Chromium. docs/reports/README.md shows what comes out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WITHOUT_MODEL = ["critic.model=", "critic.prompt=", "critic.options="]
RUNS = {
    "critic": [],
    "random": ["critic.kind=random", *WITHOUT_MODEL],
    "length": ["critic.kind=length", *WITHOUT_MODEL],
}
#: Beside which control a run's curves stand.
CONTROLS = {"critic": "random", "length": "random"}
FEW_QUESTIONS = ["--max-held-out", "40", "--max-training", "24"]
#: Name of a picture's kind -> width, height in pixels, dark. The height shows the verdict and the first curves.
VIEWS = {"light": (1440, 1340, False), "dark": (1440, 1340, True), "phone": (390, 1500, False)}


def align(*arguments: str, folder: Path, threads: int) -> None:
    command = [sys.executable, "-m", "align", *arguments]
    # The checkout's own package, wherever the command runs.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    subprocess.run(command, cwd=folder, check=True, env=environment)


def run_all(folder: Path, *, questions: int, held_out: int | None, rounds: int, threads: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "align.yaml").exists():
        align("init", "--recipe", "demo", folder=folder, threads=threads)
    for name, settings in RUNS.items():
        started = time.monotonic()
        overrides = [f"name={name}", f"sample.questions_per_round={questions}", *settings]
        overrides += [f"evaluate.limit={held_out}"] if held_out else []
        arguments = [part for override in overrides for part in ("--set", override)]
        align("run", "--rounds", str(rounds), *arguments, folder=folder, threads=threads)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def write_reports(folder: Path, reports: Path) -> list[Path]:
    pages = []
    for name in RUNS:
        page = reports.resolve() / f"{name}.html"
        control = ["--control", f"runs/{CONTROLS[name]}"] if name in CONTROLS else []
        align("report", f"runs/{name}", *control, *FEW_QUESTIONS, "--out", str(page), folder=folder, threads=1)
        pages.append(page)
    return pages


def take_pictures(pages: list[Path], folder: Path) -> None:
    """The top of each page as PNG with a palette, which keeps a picture below 150 kB."""
    from tests.browser.chromium import Page, find_chromium

    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("--pictures needs Chromium; install it, or leave the option out")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, Page(chromium, Path(profile)) as browser:
        for page in pages:
            for kind, (width, height, dark) in VIEWS.items():
                browser.open(page, width=width, height=height, dark=dark)
                path = folder / f"report-{page.stem}-{kind}.png"
                browser.screenshot(path, full=False)
                with Image.open(path) as image:
                    few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
                few.save(path, optimize=True)
            assert not browser.problems, browser.problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/harmful"), help="data and runs")
    parser.add_argument("--reports", type=Path, default=Path("build/harmful"), help="where the pages go")
    parser.add_argument("--pictures", type=Path, help="where pictures of the pages go; none without")
    parser.add_argument("--only-reports", action="store_true", help="of runs that are there")
    parser.add_argument("--questions", type=int, default=1000, help="a round")
    parser.add_argument("--held-out", type=int, help="of 500; all without")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    sizes = {"questions": options.questions, "held_out": options.held_out, "rounds": options.rounds}
    if not options.only_reports:
        run_all(options.folder, threads=options.threads, **sizes)
    pages = write_reports(options.folder, options.reports)
    if options.pictures:
        take_pictures(pages, options.pictures)
    print("\n".join(str(page) for page in pages))


if __name__ == "__main__":
    main()
