"""LLaVA-OneVision and LLaVA-Critic in the format of their authors (lmms-lab): `architectures:
["LlavaQwenForCausalLM"]`.

Paper: LLaVA-OneVision, arXiv 2408.03326; LLaVA-Critic, arXiv 2410.02712; tiling and un-padding: LLaVA-NeXT, arXiv
2310.03744. Checkpoints: lmms-lab/llava-onevision-qwen2-{0.5b,7b,72b}-{si,ov,ov-chat}, lmms-lab/llava-critic-{7b,72b}.
Licence of the weights: Apache-2.0 as published; they are built on Qwen2 (7B and 0.5B Apache-2.0, 72B the Qwen licence)
and SigLIP (Apache-2.0), and trained in part on answers of GPT-4, whose terms of use apply to such data.

Verified against what the original code computes on tiny random weights (tests/golden/llava_ov_original_tiny): token
ids, pixels, logits and greedy tokens for tiled, un-padded, pooled, several, square-padded images, video and text; names
and bytes of a saved checkpoint; the full-size shapes of the 7B layout against the published numbers of parameters. Not
verified: published weights themselves, half precision against the original.
"""

from .configuration import LlavaQwenConfig
from .modeling import LlavaQwenForCausalLM
from .processing import LlavaQwenProcessor

__all__ = ["LlavaQwenConfig", "LlavaQwenForCausalLM", "LlavaQwenProcessor"]
