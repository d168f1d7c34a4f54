"""What lmms-eval asks in (its Instances), the checkpoint's answers out, each kept as soon as it is there.

A request is a prompt with pictures and either settings of generation or a continuation whose probability is wanted.
Prompts are asked through an engine, greedily or as the task says; the continuations of one prompt are scored behind it
in one go. Nothing of lmms-eval is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from align.distributed.ranks import barrier
from align.engines.base import Engine, SampleRequest, SampleResult, SamplingSettings
from align.errors import UserError
from align.lmms_eval.instances import Answered, Request, cut_at, generation_request, numbered, scoring_request
from align.lmms_eval.visuals import Dialogue, Unaskable, dialogue_of
from align.media.video import frame_sampler_of
from align.models.record_faults import UnusableRecord
from align.monitoring.progress import progress
from align.run.hashes import text_hash
from align.run.resumable import PartialFile
from align.run.sharding import batches
from reward.judge_model import BranchedPrompt

# So many questions have their pictures in memory.
AT_A_TIME = 64


class Answerer:
    """Answers requests through an engine, which is opened when the first unfinished one comes.

    `datasets[task][split][doc_id]` is the document of a request; lmms-eval fills it. `used` holds the ids of all that
    was asked for.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        partial: PartialFile,
        *,
        label: str,
        video_frames: int | None = None,
        num_processes: int = 1,
    ) -> None:
        self._open = open_engine
        self._engine: Any = None
        self.datasets: dict[str, Any] = {}
        self.partial, self.label = partial, label
        self.video_frames, self.num_processes = video_frames, num_processes
        self.used: list[str] = []
        self.notes: dict[str, str] = {}

    def generate(self, instances: Sequence[Any]) -> list[Answered]:
        """Texts; that of a request that could not be asked is empty.

        Raises:
            UserError: none of the requests could be asked.
        """
        return self._answer(numbered(map(generation_request, instances)), self._generate)

    def score(self, instances: Sequence[Any]) -> list[Answered]:
        """Log-probabilities of continuations, and whether each is what the checkpoint itself would begin with.

        Raises:
            UserError: a request could not be asked, since no number stands for that.
        """
        requests = numbered(scoring_request(instance, self._document) for instance in instances)
        return self._answer(requests, self._score, may_skip=False)

    @property
    def engine(self) -> Any:
        """The engine, opened when it is needed."""
        if self._engine is None:
            self._engine = self._open()
        return self._engine

    def _document(self, task: str, split: str, doc_id: int) -> Any:
        return self.datasets[task][split][doc_id]

    def _answer(
        self,
        requests: list[Request],
        work: Callable[[list[Request], Callable[[Answered], None]], None],
        *,
        may_skip: bool = True,
    ) -> list[Answered]:
        found: dict[str, Answered] = self.partial.read()
        todo = [request for request in requests if request.id not in found]
        barrier()  # nobody appends before everybody has read
        total, done = (self.num_processes * count for count in (len(requests), len(requests) - len(todo)))
        with progress(self.label, total=total, done=done, weight=self.num_processes) as advance:

            def keep(answer: Answered) -> None:
                if answer.skipped and not may_skip:
                    raise UserError(
                        f"document {answer.doc_id} cannot be asked: {answer.skipped} {answer.detail}".rstrip(),
                        where=answer.task,
                        fix="a task that compares probabilities needs all of its documents",
                    )
                self.partial.append(answer)
                found[answer.id] = answer
                advance(1)

            work(todo, keep)
        if self._engine is not None:
            self.notes |= self._engine.notes
        self.used += [request.id for request in requests]
        answers = [found[request.id] for request in requests]
        _refuse_if_none_was_asked(answers)
        return answers

    def _generate(self, todo: list[Request], keep: Callable[[Answered], None]) -> None:
        for settings in dict.fromkeys(request.settings for request in todo):
            assert settings is not None, "what is scored is not generated"
            for some in batches([request for request in todo if request.settings == settings], AT_A_TIME):
                self._branched(some, settings, keep)

    def _branched(self, requests: list[Request], settings: SamplingSettings, keep: Callable[[Answered], None]) -> None:
        asked: dict[str, Request] = {}
        samples = []
        for request in requests:
            dialogue = self._look(request, keep)
            if dialogue is not None:
                asked[request.id] = replace(request, note=" ".join(filter(None, (request.note, dialogue.note))) or None)
                seed = int(text_hash("lmms-eval", request.id)[:15], 16)
                samples.append(SampleRequest(request.id, dialogue.messages, tuple(dialogue.images), 1, seed))

        def on_result(result: SampleResult) -> None:
            request = asked[result.id]
            text = cut_at(result.texts[0], request.ends)
            keep(request.answered(text=text, num_tokens=result.num_tokens[0], finish_reason=result.finish_reasons[0]))

        def on_unusable(id_: str, fault: UnusableRecord) -> None:
            keep(asked[id_].answered(skipped=fault.reason, detail=str(fault)))

        if samples:
            self.engine.sample(samples, settings, on_result, on_unusable=on_unusable)

    def _look(self, request: Request, keep: Callable[[Answered], None]) -> Dialogue | None:
        """The dialogue of a request; None, and the reason kept, where it cannot be made."""
        document = self._document(request.task, request.split, request.doc_id)
        try:
            return dialogue_of(request.look(document), request.prompt, request.gives_messages, self._sampler)
        except Unaskable as reason:
            keep(request.answered(skipped=str(reason), detail=reason.detail))
        except (UserError, OSError, ValueError) as error:
            keep(request.answered(skipped="a picture or video cannot be read", detail=str(error)))
        except SystemExit as error:
            # Some tasks leave the program where a video is not where they want it.
            keep(request.answered(skipped="the task does not find a file", detail=str(error.code)))
        return None

    def _sampler(self, num_frames: int, rate: float | None) -> list[int]:
        prompter = getattr(self.engine, "prompter", None)
        return frame_sampler_of(getattr(prompter, "processor", None), self.video_frames)(num_frames, rate)

    def _score(self, todo: list[Request], keep: Callable[[Answered], None]) -> None:
        by_prompt = [list(same) for _, same in groupby(todo, lambda r: (r.task, r.split, r.doc_id, r.prompt))]
        for some in batches(by_prompt, AT_A_TIME):
            prompts = []
            for same in some:
                dialogue = self._look(same[0], keep)
                assert dialogue is not None, "what cannot be asked has ended the task"
                same[:] = [replace(request, note=dialogue.note) for request in same]
                options = tuple(request.continuation or "" for request in same)
                prompts.append(BranchedPrompt(tuple(dialogue.images), None, dialogue.text, ((),), "", options))
            lengths = [[len(self._tokens(option)) for option in branched.options] for branched in prompts]
            tables = self.engine.log_probs(prompts)
            begun = self.engine.generate(prompts, max_new_tokens=max(map(max, lengths)))
            for same, table, (said,), counts in zip(some, tables, begun, lengths, strict=True):
                for request, value, count in zip(same, table[0], counts, strict=True):
                    begins = self._tokens(said)[:count] == self._tokens(request.continuation or "")
                    keep(request.answered(log_prob=float(value), num_tokens=count, is_greedy=begins))

    def _tokens(self, text: str) -> list[int]:
        if not hasattr(self.engine, "prompter"):
            raise UserError(
                "tasks that compare probabilities need the model in this process", fix="set evaluate.servers to []"
            )
        return self.engine.prompter.tokenise(text)


def _refuse_if_none_was_asked(answers: list[Answered]) -> None:
    if answers and all(answer.skipped for answer in answers):
        first = answers[0]
        raise UserError(
            f"none of its {len(answers)} requests can be asked: {first.skipped} {first.detail}".rstrip(),
            where=first.task,
            fix="leave this task out",
        )
