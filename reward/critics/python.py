"""A critic of one's own: a Python function of question, images and responses in; the rewards that it returns out.

    def judge(question, images, responses):
        return [float(len(response) < 200) for response in responses]

`question` is text, `images` are PIL images, `responses` texts; None as a reward leaves that response unscored. A
function with a parameter `answer` is given the reference answer (None where there is none), too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field, PrivateAttr

from reward.critics.base import DECIMALS, BaseCritic, Item, Judgement
from reward.errors import RewardError
from reward.judgement import all_unscored

NOT_JUDGED = "the function returned None"
NOT_FINITE = "the function returned a number that is not finite"
NO_NUMBER = "the function returned something that is no number"

Function = Callable[..., Any]


class PythonCritic(BaseCritic):
    """Rewards what a function returns.

    function: `file.py:name`, or the function itself.
    """

    function: str | Function
    open_image: Any = Field(None, exclude=True)
    _call: Function = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """What the settings lead to; raises RewardError where they cannot be used."""
        self._call = load_function(self.function) if isinstance(self.function, str) else self.function
        check_signature(self._call, str(self.function))

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """A judgement for each item, in their order."""
        return [self._judge_one(item) for item in items]

    def _judge_one(self, item: Item) -> Judgement:
        images = [image if self.open_image is None else self.open_image(image) for image in item.images]
        more = {"answer": item.answer} if "answer" in inspect.signature(self._call).parameters else {}
        try:
            returned = self._call(item.question, images, list(item.responses), **more)
        except Exception as error:
            return all_unscored(item, f"the function raised {_where(error)}", {"error": f"{error}"[:500]})
        return _judgement(item, returned)


def split_function(function: str) -> tuple[Path, str]:
    """The file and the name in it.

    >>> split_function("my_critic.py:judge")
    (PosixPath('my_critic.py'), 'judge')
    """
    file, separator, name = function.rpartition(":")
    if not separator or not name.isidentifier() or not file.endswith(".py"):
        raise RewardError(f"function must be a file and a name in it, as in my_critic.py:judge, found {function!r}")
    return Path(file), name


def load_function(function: str) -> Function:
    """Import the file and give the function; a file is imported once for as long as it does not change.

    Raises:
        RewardError: the file does not exist or cannot be imported, or has no such function.
    """
    path, name = split_function(function)
    if not path.is_file():
        raise RewardError(f"there is no file {path}, which critic.function names")
    module = _imported(path.resolve(), path.stat().st_mtime_ns)
    found = getattr(module, name, None)
    if found is None:
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise RewardError(f"{path} has no function {name!r}" + (f"; it has: {', '.join(names)}" if names else ""))
    return found


@lru_cache(maxsize=16)
def _imported(path: Path, modified: int) -> ModuleType:
    # A name of its own, so that it hides no other module; what stands beside the file may be imported by it.
    name = f"critic_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RewardError(f"{path} cannot be imported: {_where(error)}: {error}") from error
    return module


def check_signature(function: Any, name: str) -> None:
    """Raise RewardError unless it can be called with a question, its images and its responses."""
    if not callable(function):
        raise RewardError(f"{name} is {type(function).__name__}, expected a function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise RewardError(f"{name} must return its rewards; it is a coroutine or a generator")
    signature = inspect.signature(function)
    more = {"answer": None} if "answer" in signature.parameters else {}
    try:
        signature.bind("question", [], [], **more)
    except TypeError as error:
        raise RewardError(
            f"{name}{signature} cannot be called as {getattr(function, '__name__', name)}(question, images, responses):"
            f" {error}"
        ) from None


def _where(error: BaseException) -> str:
    """The kind of an exception and the line that raised it, without what differs from question to question."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return type(error).__name__ + place


def _judgement(item: Item, returned: Any) -> Judgement:
    num = len(item.responses)
    try:
        values = list(returned)
    except TypeError:
        return all_unscored(item, f"the function returned {type(returned).__name__}, expected a list of rewards")
    if isinstance(returned, str | dict) or len(values) != num:
        return all_unscored(item, f"the function returned {len(values)} rewards for {num} responses")
    rewards: list[float | None] = []
    unscored: dict[int, str] = {}
    for index, value in enumerate(values):
        reward, reason = _number(value)
        rewards.append(reward)
        if reason is not None:
            unscored[index] = reason
    return Judgement(id=item.id, rewards=rewards, unscored=unscored)


def _number(value: Any) -> tuple[float | None, str | None]:
    """A reward, or the reason why there is none; numbers of numpy and torch do."""
    if value is None:
        return None, NOT_JUDGED
    try:
        number = float(value) if not isinstance(value, str) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    if number is None:
        return None, NO_NUMBER
    return (round(number, DECIMALS), None) if math.isfinite(number) else (None, NOT_FINITE)
