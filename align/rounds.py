"""The loop: sample, score, dpo and evaluate, round after round, each stage skipped where it is complete."""

from __future__ import annotations

from align.config import Config
from align.launch import run_stage_command, wants_processes
from align.progress import log
from align.rundir import RunDir


def run_rounds(config: Config, config_args: list[str]) -> None:
    """Run all rounds of a configuration; an interrupted run goes on where it stopped.

    `config_args` are the command-line arguments that lead to this very configuration, for stages that must start in
    several processes of their own.
    """
    from align.card import write_model_card
    from align.evaluate import run_evaluate
    from align.sample import run_sample
    from align.score import run_score

    run = RunDir(config.run_dir)
    if config.evaluate.questions is not None:
        with run.round(0).lock():
            run_evaluate(config, 0)
    for number in range(1, config.rounds + 1):
        log.info("round %d of %d", number, config.rounds)
        with run.round(number).lock():
            run_sample(config, number)
            run_score(config, number)
            if not wants_processes(config):
                _dpo(config, number)
        if wants_processes(config):
            run_stage_command(config, "dpo", number, config_args)
        if config.evaluate.questions is not None:
            with run.round(number).lock():
                run_evaluate(config, number)
        write_model_card(config, number)


def _dpo(config: Config, number: int) -> None:
    from align.dpo.train import run_dpo

    run_dpo(config, number)
