"""A configuration with its prompts measured and a machine's speed in;
seconds and tokens of every stage of the run out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from align.config import Config
from align.dpo.step_memory import How, Memory, inference_memory
from align.engines.judge import MemberModel, plan_critic
from align.engines.prompts import Prompter
from align.errors import UserError, reward_faults
from align.evaluation.win_rate import has_judge
from align.media.images import evaluation_images, question_images
from align.models.shapes import model_shape
from align.plan.branched_sizes import CountingModel, CountingScorer
from align.plan.prompt_sizes import PromptMeter, PromptSize, patch_size
from align.plan.speed import Cost, Speed, sent_bytes
from align.plan.times import (
    Training,
    judging,
    reading,
    referencing,
    sampling,
    training_steps,
)
from align.records import Question, read_questions
from align.sources import questions_of_round, read_all_questions
from reward.critics import Item, make_critic

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Lengths:
    """Tokens of responses: means of `chosen` and `rejected`; of every prompt's `longest`, and of `both` together.

    Where pairs are given and a row holds a question, the chosen and rejected ones of a row, of `branches` in all.
    """

    chosen: float
    rejected: float
    longest: list[int]
    both: list[int]
    branches: float = 2


def pairs_per_question(config: Config) -> int:
    """The most that `pairs.max_per_question` allows; without a limit, all pairs of the responses. 1 of given pairs."""
    if config.questions is None:
        return 1
    responses = config.sample.num_responses
    return config.pairs.max_per_question or responses * (responses - 1) // 2


def branches_of_row(config: Config, lengths: Lengths, *, shared: bool) -> float:
    """Responses in a row of training: those of a pair, or (`dpo.rows: question`) all that pairs of a question have."""
    if config.dpo.rows == "pair" or not shared or config.questions is None:
        return lengths.branches
    return min(config.sample.num_responses, 2 * pairs_per_question(config))


@dataclass(frozen=True)
class StageCost:
    """One stage: seconds of one run of it on all GPUs, how often the whole run has it,
    tokens that it reads and writes."""

    name: str
    seconds: float
    runs: float
    read_tokens: int
    written_tokens: int
    note: str = ""


@dataclass
class Judge:
    """A model that the critic asks: its speed, the questions as its processor reads them, and what it is asked."""

    checkpoint: str
    speed: Speed
    meter: PromptMeter
    judge_model: CountingModel
    scorer: CountingScorer
    served: bool
    shared: bool = True
    sizes: list[PromptSize] = field(default_factory=list)


class StagePlanner:
    """Plans each stage of a configuration; `notes` say what had to be assumed."""

    def __init__(
        self,
        config: Config,
        speed: Speed,
        sizes: Sequence[PromptSize],
        lengths: Lengths,
        how: How,
        *,
        shared: bool,
        processor: ProcessorMixin,
    ) -> None:
        self.config, self.speed, self.lengths, self.how = config, speed, lengths, how
        self.sizes = list(sizes[: config.sample.questions_per_round])
        self.shared, self.processor = shared, processor
        self.notes: list[str] = []
        self.machine = speed.machine
        self.judges = self._judges() if config.questions is not None else []

    def stages(self) -> list[StageCost]:
        """The cost of every stage of the configuration."""
        found = []
        if self.config.questions is not None:
            found.append(self._sample())
            found.append(self._score())
        found += self._training()
        if self.config.evaluate.questions is not None:
            found += self._evaluation()
        return found

    def critic_memory(self, size: int) -> dict[str, Memory]:
        """The critic's models on one GPU, where they are loaded here."""
        found = {}
        for judge in self.judges:
            if judge.served or not judge.judge_model.asked:
                continue
            tokens = max(
                branched.prompt_tokens + branched.segment_tokens + s.visual_tokens
                for branched in judge.judge_model.asked
                for s in judge.sizes
            )
            found["critic"] = inference_memory(
                judge.speed.shape, weight_bytes=size, prompt_tokens=tokens, new_tokens=0, key_bytes=size
            )
        return found

    def _seconds(self, cost: Cost) -> float:
        """On all GPUs: questions are shared out."""
        return cost.seconds(self.machine) / self.machine.gpus

    def _read(self, sizes: Sequence[PromptSize]) -> int:
        return sum(size.tokens for size in sizes)

    def _sample(self) -> StageCost:
        sample = self.config.sample
        cost = sampling(
            self.speed,
            self.sizes,
            sample.num_responses,
            self.lengths.chosen,
            fixed_batch=sample.batch_size,
            shared=self.shared,
            greedy=sample.temperature == 0,
        )
        written = round(len(self.sizes) * sample.num_responses * self.lengths.chosen)
        note = "on servers, at this speed" if sample.servers else ""
        if sample.until_pair:
            note = ", ".join(filter(None, [note, "without the further responses of until_pair"]))
        return StageCost("sample", self._seconds(cost), self.config.rounds, self._read(self.sizes), written, note)

    def _score(self) -> StageCost:
        controls = 2 * min(self.config.critic.reliability_sample, len(self.sizes)) if self.judges else 0
        share = 1 + controls / len(self.sizes)
        cost, read, written = self._judged(self._responses(self.config.sample.num_responses))
        note = "on servers, at this speed" if any(judge.served for judge in self.judges) else ""
        return StageCost(
            "score",
            self._seconds(cost.times(share)),
            self.config.rounds,
            round(share * read),
            round(share * written),
            note,
        )

    def _judged(self, responses: tuple[str, ...]) -> tuple[Cost, int, int]:
        """What the critic costs for these responses to every question, and the tokens it reads and writes."""
        if not self.judges:
            return Cost(), 0, 0
        for judge in self.judges:
            judge.judge_model.asked.clear()
            judge.scorer.scored = 0
        self._branched(responses)
        cost, read, written = Cost(), 0, 0
        for judge in self.judges:
            for branched in judge.judge_model.asked:
                cost += judging(
                    judge.speed, judge.sizes, branched, fixed_batch=self.config.critic.batch_size, shared=judge.shared
                )
                read += sum(branched.prompt_tokens + s.visual_tokens + branched.segment_tokens for s in judge.sizes)
                written += len(judge.sizes) * branched.branches * branched.new_tokens
            if judge.scorer.scored:
                longer = self.lengths.chosen
                cost += reading(judge.speed, judge.sizes, more_tokens=longer, shared=False).times(judge.scorer.scored)
                read += round(judge.scorer.scored * sum(s.tokens + longer for s in judge.sizes))
        return cost, read, written

    def _training(self) -> list[StageCost]:
        config = self.config
        fields = config.dpo.trainer_fields()
        # A row with corrupted pictures beside each, with the chosen responses: of half the tokens, as a rule.
        copies, share = (1, 1.0) if config.dpo.image_preference is None else (2, 0.75)
        branches = branches_of_row(config, self.lengths, shared=self.how.shared)
        half = branches / self.lengths.branches
        rows = int(fields.get("per_device_train_batch_size", 1))
        if config.dpo.tokens_per_batch is not None:
            mean = self._read(self.sizes) / len(self.sizes) + half * (self.lengths.chosen + self.lengths.rejected)
            rows = max(1, int(config.dpo.tokens_per_batch / (copies * mean)))
        accumulation = int(fields.get("gradient_accumulation_steps", 8))
        epochs = float(fields.get("num_train_epochs", 1))
        spread = self.how.strategy != "ddp"
        whole_questions = config.dpo.rows == "question" and self.how.shared
        training = Training(
            pairs=copies * (1 if whole_questions else pairs_per_question(config)),
            chosen=share * half * self.lengths.chosen,
            rejected=share * half * self.lengths.rejected,
            branches=branches,
            rows=copies * rows,
            accumulation=accumulation,
            checkpointing=self.how.checkpointing,
            kept_share=self.how.kept_layers / self.speed.shape.text.num_layers,
            shared=self.how.shared,
            live=config.dpo.reference == "live",
            frozen_towers=not any(tower.trained for tower in self.speed.shape.towers),
            shards=self.machine.gpus if spread else 1,
        )
        count = training.pairs * len(self.sizes)
        repeats = 1 if self.how.shared else 2
        read = round(training.pairs * repeats * self._read(self.sizes) + count * (training.chosen + training.rejected))
        found = []
        if not training.live:
            seconds = self._seconds(referencing(self.speed, self.sizes, training))
            found.append(StageCost("reference", seconds, config.rounds, read, 0))
        cost = training_steps(self.speed, self.sizes, training).times(epochs)
        # The optimiser's step is made by every process of ddp for itself: sharing pairs out does not divide it.
        steps = epochs * count / (training.rows * accumulation * self.machine.gpus)
        sent = (
            sent_bytes(self.how.strategy, self.speed.shape, self.machine.gpus, accumulation)
            if self.machine.gpus > 1
            else 0
        )
        exchanged = steps * sent / self.machine.sent_a_second
        seconds = max(self._seconds(cost), exchanged)
        note = "bound by the network" if exchanged > self._seconds(cost) else ""
        found.append(StageCost("dpo", seconds, config.rounds, round(epochs * read), 0, note))
        return found

    def _evaluation(self) -> list[StageCost]:
        evaluate = self.config.evaluate
        assert evaluate.questions is not None
        questions = read_questions(evaluate.questions)[: evaluate.limit]
        meter = PromptMeter(
            self.processor,
            evaluation_images(self.config),
            self._patch_px,
        )
        sizes = [meter.size(q.id, q.messages(), q.images) for q in questions]
        tokens = min(self.lengths.chosen, evaluate.max_new_tokens)
        # The greedy response and the samples are behind one prompt; a server is asked for them one after the other.
        cost = sampling(self.speed, sizes, 1 + evaluate.num_samples, tokens, shared=self.shared)
        written = round(len(sizes) * (1 + evaluate.num_samples) * tokens)
        read = self._read(sizes) * (2 if evaluate.servers else 1)
        note = "on servers, at this speed" if evaluate.servers else ""
        found = [StageCost("evaluate", self._seconds(cost), self.config.rounds + 1, read, written, note)]
        if self.judges and has_judge(self.config):
            share = len(sizes) / len(self.sizes)
            cost, read, written = self._judged(self._responses(2))
            # Against the first policy, and from the second round on against the round before.
            runs = 2 * self.config.rounds - 1
            found.append(
                StageCost(
                    "win rate", self._seconds(cost.times(share)), runs, round(share * read), round(share * written)
                )
            )
        return found

    @property
    def _patch_px(self) -> int:
        from align.models.meta import meta_model

        return patch_size(meta_model(self.config.policy))

    # The critic.

    def _judges(self) -> list[Judge]:
        """The models that the critic asks, each with its own shape where its checkpoint is here."""
        plan = plan_critic(self.config)
        by_name: dict[str, Judge] = {}
        for model in [*plan.shared, *plan.own.values()]:
            if model.checkpoint not in by_name:
                by_name[model.checkpoint] = self._judge(model)
        self._plan = plan
        return list(by_name.values())

    def _judge(self, model: MemberModel) -> Judge:
        from align.models.inspect import expected_shared_prefix
        from align.models.load import load_processor
        from align.models.meta import meta_model

        store = question_images(self.config)
        speed, processor, shared, patch_px = self.speed, self.processor, self.shared, 14
        if model.checkpoint != self.config.policy:
            try:
                empty = meta_model(model.checkpoint)
                processor = load_processor(model.checkpoint, **model.processor)
                speed, patch_px = replace(self.speed, shape=model_shape(empty)), patch_size(empty)
                shared = self.config.shared_prefix != "off" and expected_shared_prefix(empty).startswith("expected")
            except UserError:
                self.notes.append(
                    f"the critic {model.checkpoint or '(served)'} cannot be looked at here: counted as if it were the"
                    " policy"
                )
                speed, processor = self.speed, self.processor
        meter = PromptMeter(processor, store, patch_px)
        prompter = Prompter(processor, store.open)
        judge_model = CountingModel(prompter, round(self.lengths.chosen))
        judge = Judge(model.checkpoint, speed, meter, judge_model, CountingScorer(), bool(model.servers), shared)
        judge.sizes = self.sizes if processor is self.processor else self._measured(meter)
        return judge

    def _measured(self, meter: PromptMeter) -> list[PromptSize]:
        assert self.config.questions is not None
        questions = questions_of_round(self.config, 1)
        return [meter.size(q.id, q.messages(), q.images) for q in questions]

    def _branched(self, responses: tuple[str, ...]) -> None:
        """Let the critic judge one question, with everybody counting."""
        question = self._question()
        by_name = {judge.checkpoint: judge for judge in self.judges}
        shared = {model.need: by_name[model.checkpoint] for model in self._plan.shared}
        own = {name: by_name[model.checkpoint] for name, model in self._plan.own.items()}
        kinds = {name: model.need for name, model in self._plan.own.items()}
        with reward_faults():
            critic = make_critic(
                self._plan.kind,
                self._plan.options,
                judge_model=shared["judge_model"].judge_model if "judge_model" in shared else None,
                scorer=shared["scorer"].scorer if "scorer" in shared else None,
                judge_models={name: judge.judge_model for name, judge in own.items() if kinds[name] == "judge_model"},
                scorers={name: judge.scorer for name, judge in own.items() if kinds[name] == "scorer"},
            )
            critic.judge(
                [Item(id=question.id, question=question.as_text(), images=tuple(question.images), responses=responses)]
            )

    def _question(self) -> Question:
        """The question with the middle number of tokens."""
        assert self.config.questions is not None
        middle = sorted(self.sizes, key=lambda size: size.tokens)[len(self.sizes) // 2]
        return next(q for q in read_all_questions(self.config) if q.id == middle.id)

    def _responses(self, count: int) -> tuple[str, ...]:
        """Different texts of the planned number of tokens."""
        tokenizer = self.processor.tokenizer
        length = max(1, round(self.lengths.chosen))
        texts = []
        for number in range(count):
            ids = tokenizer.encode(f"{number} and a cat on a mat, " * length, add_special_tokens=False)[:length]
            texts.append(tokenizer.decode(ids))
        return tuple(texts)
