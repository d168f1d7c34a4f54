"""The embedded demo: pictures of real handwritten digits, questions about them, a tiny policy and a tiny critic."""

from align.demo.data import write_demo

__all__ = ["write_demo"]
