"""Modules of the plugin subclass vLLM's classes: their doctests are collected where vLLM is installed."""

import importlib.util
from pathlib import Path

PLUGIN = Path(__file__).parent / "align" / "engines" / "vllm"
WITHOUT_VLLM = ("__init__.py", "chat_template.py")

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = [str(path) for path in PLUGIN.glob("*.py") if path.name not in WITHOUT_VLLM]
