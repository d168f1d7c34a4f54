"""All that is asked of the real local engine, on the simulated device: behind shared prompts, and with full sequences."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from align import accelerator
from align.engines.base import FurtherSamples, GivenResponses, SampleRequest, SampleResult, SamplingSettings
from align.engines.local import LocalEngine
from align.engines.shared_path import SharedPath
from reward.judge_model import BranchedPrompt
from scripts.valley_size import build_valley
from tests.cuda_rehearsal.simulation import CUDA, Simulation, simulated
from tests.cuda_rehearsal.training import build

QUESTION = "Describe the picture in detail, and say what is unusual about it."
VERBS = ("sample", "score", "generate", "loglikelihood")
BATCH_SIZE, NUM_SAMPLES, NUM_FURTHER, NEW_TOKENS, GIVEN_TOKENS = 2, 2, 1, 2, 24


def answer(
    family: str,
    *,
    verbs: tuple[str, ...] = VERBS,
    paths: tuple[str, ...] = ("shared",),
    num_questions: int = BATCH_SIZE,
    width: int = 60,
    height: int = 50,
    layers: int | None = None,
) -> dict[str, Any]:
    """What every verb of the engine did, `[path][verb]`, and the sizes that its tensors are held against.

    The engine of the path `checked` sets out with the check of equivalence, which says here that it cannot tell, since
    floating-point contents are unknown: it goes on unshared. That of the path `shared` is given the shared one.
    """
    accelerator.avoid_cudnn_attention()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name, simulated() as simulation:
        folder = Path(name)
        if family.startswith("valley-eagle"):
            model, processor = build_valley(family, "cuda", torch.bfloat16, layers)
        else:
            model, processor = build(family, folder)
            model = model.to(CUDA, torch.bfloat16)
        image = Image.new("RGB", (width, height))
        found: dict[str, Any] = {"vocabulary": model.config.get_text_config().vocab_size}
        for path in paths:
            engine = LocalEngine(model, processor, batch_size=BATCH_SIZE)
            if path == "shared":
                engine.path = SharedPath(model, engine.eos_token_ids)
            asked = Asked(engine, image, simulation, num_questions)
            found[path] = {verb: asked.noted(verb) for verb in verbs}
            found["fallback"] = engine.fallback_reason
        found["prompt_tokens"] = asked.prompt_tokens()
        return found


class Asked:
    """One engine, asked for everything about one picture."""

    def __init__(self, engine: LocalEngine, image: Image.Image, simulation: Simulation, num_questions: int) -> None:
        self.engine, self.image, self.simulation = engine, image, simulation
        self.num_questions = num_questions

    def prompt_tokens(self) -> int:
        prompter = self.engine.prompter
        return prompter.encode([prompter.render(self.messages())], [[self.image]])["input_ids"].shape[1]

    def noted(self, verb: str) -> dict[str, Any]:
        """What happened on the device, and how many answers there were."""
        self.simulation.reset()
        count = getattr(self, verb)()
        log = self.simulation.log
        return {
            "answers": count,
            "operations": self.simulation.operations,
            "waits": dict(log.waits),
            "attention": [[*key, times] for key, times in log.attention.items()],
            "shapes": [[*key, times] for key, times in log.shapes.items()],
        }

    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]

    def sample(self) -> int:
        results: list[SampleResult] = []
        self.engine.sample(
            [
                SampleRequest(f"q{seed}", self.messages(), (self.image,), NUM_SAMPLES, seed)
                for seed in range(self.num_questions)
            ],
            SamplingSettings(temperature=1.0, max_new_tokens=NEW_TOKENS, top_p=0.9, repetition_penalty=1.1),
            results.append,
            further=FurtherSamples(lambda result: NUM_FURTHER if len(result.texts) == NUM_SAMPLES else 0, 0.5),
        )
        return sum(len(result.texts) for result in results)

    def score(self) -> int:
        return sum(table.size for table in self.engine.log_probs([self.comparison(("A", "not B"))]))

    def generate(self) -> int:
        return sum(map(len, self.engine.generate([self.comparison(())], max_new_tokens=NEW_TOKENS)))

    def comparison(self, options: tuple[str, ...]) -> BranchedPrompt:
        """Both orders of two responses, as the pairwise critic asks for them."""
        responses = [word * GIVEN_TOKENS for word in ("cat ", "dog ")]
        branches = tuple((f"A: {one}", f"B: {other}") for one in responses for other in responses if one != other)
        return BranchedPrompt((self.image,), None, f"{QUESTION}\n", branches, "\nWhich is better?", options)

    def loglikelihood(self) -> int:
        given = [
            GivenResponses(f"q{number}", self.messages(), (self.image,), ((5,) * GIVEN_TOKENS, (7,) * GIVEN_TOKENS))
            for number in range(BATCH_SIZE)
        ]
        counts: list[int] = []
        self.engine.loglikelihood(given, lambda _, values: counts.append(sum(map(len, values))), temperature=0.7)
        return sum(counts)
