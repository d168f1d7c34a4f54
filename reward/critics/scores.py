"""Finished scores in (a file of judgements), the same rewards out: nothing is judged again.

As members of a panel, the scores of several critics become one by the panel's rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from reward.critics.base import BaseCritic, FileName, Item, Judgement
from reward.errors import RewardError
from reward.judgement import all_unscored
from reward.lines import read_lines

NOT_IN_FILE = "the scores file has no line for the question"
OTHER_RESPONSES = "the scores file is about other responses to the question"


class ScoresCritic(BaseCritic):
    """Looks up judgements by question.

    file: scores.jsonl of a run, or lines of its format: `{"id": question, "rewards": [one per response]}`.
    """

    file: FileName
    _by_id: dict[str, Judgement] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        """What the settings lead to; raises RewardError where they cannot be used."""
        for where, line in read_lines(Path(self.file), Judgement):
            if line.id in self._by_id:
                raise RewardError(f"{where}: the question {line.id} is scored twice")
            self._by_id[line.id] = line

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        return [self._judge_one(item) for item in items]

    def _judge_one(self, item: Item) -> Judgement:
        found = self._by_id.get(item.id)
        if found is None:
            return all_unscored(item, NOT_IN_FILE)
        if len(found.rewards) != len(item.responses):
            return all_unscored(item, "the scores file has rewards for another number of responses")
        if item.key is not None and found.judged not in (None, item.key):
            return all_unscored(item, OTHER_RESPONSES)
        return found
