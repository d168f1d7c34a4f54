"""Which versions of other packages this one supports, out of its own metadata, compared with what is installed.

Nothing heavy is imported. Left out on purpose: what the extras want, which is said where an extra is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from align.errors import UserError

PACKAGE = "valley-align"


@dataclass(frozen=True)
class Installed:
    """A package that this one, or an extra of it, requires, and the version that is there (None: not installed).

    >>> trl = Requirement("trl<1.17,>=1.16")
    >>> Installed(trl, "1.16.2").supported, Installed(trl, "1.17.0").supported, Installed(trl, None).supported
    (True, False, False)
    >>> Installed(Requirement("torch>=2.11"), "2.13.0+cpu").supported
    True
    """

    requirement: Requirement
    version: str | None
    extra: str = ""

    @property
    def supported(self) -> bool:
        """Whether the installed version lies in the range."""
        return self.version is not None and self.requirement.specifier.contains(self.version, prereleases=True)

    @property
    def asked(self) -> str:
        """What pip is to be asked for, without the marker of an extra."""
        return f"{self.requirement.name}{self.requirement.specifier}"


def required(texts: Sequence[str] | None = None) -> Iterator[Installed]:
    """All that the package's metadata requires, or the given requirements; nothing where it is not installed itself."""
    if texts is None:
        try:
            texts = metadata.requires(PACKAGE) or []
        except metadata.PackageNotFoundError:
            texts = []
    for text in texts:
        requirement = Requirement(text)
        extra = re.search(r"""extra == ['"]([\w-]+)""", text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra[1] if extra else ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        yield Installed(requirement, version, extra[1] if extra else "")


def install_extra(extra: str, texts: Sequence[str] | None = None) -> str:
    """The command that installs what an extra lacks (all of it, where nothing is missing), without naming this package.

    >>> texts = ["nowhere-to-be-found>=2; extra == 'video'", "torch>=2.11; extra == 'video'", "trl>=1.16"]
    >>> install_extra("video", texts)
    "python -m pip install 'nowhere-to-be-found>=2'"
    """
    wanted = [each for each in required(texts) if each.extra == extra]
    return _install([each for each in wanted if not each.supported] or wanted)


def require_supported(texts: Sequence[str] | None = None) -> None:
    """Refuse a version that this package was not tested with.

    Raises:
        UserError: something required (by no extra) is missing or out of its range; one line names all and the command.
    """
    wrong = [each for each in required(texts) if not each.extra and not each.supported]
    if not wrong:
        return
    found = [f"{each.requirement.name} {each.version or '(not installed)'}" for each in wrong]
    raise UserError(
        f"not supported: {', '.join(found)}",
        fix=_install(wrong),
    )


def _install(packages: list[Installed]) -> str:
    return "python -m pip install " + " ".join(f"'{each.asked}'" for each in packages)
