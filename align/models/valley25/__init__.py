"""Valley2.5 (ByteDance): Qwen3 with a Qwen2-VL encoder and a wide merger, `architectures: ["ValleyQwen3ForCausalLM"]`.

Paper: Valley2, arXiv 2501.05901, for the line of models; Valley2.5's layout is known from the authors' repository
(github.com/bytedance/Valley) and model card. Checkpoint: bytedance-research/Valley2.5. Licence of the weights:
Apache-2.0 as published; built on Qwen3 and Qwen2-VL (Apache-2.0).

The published config.json could not be had. So `architectures`, `model_type`, the names of the keys and the width of the
merger (`navit_merger_hidden_dim`, said to be "64k") are inferred; the width is read from the weights where config.json
does not give it. Verified against a composition of the published Valley2 code with Qwen3, on tiny random weights
(tests/golden/valley25_tiny): token ids, grids, pixels, logits, loss and greedy tokens; names and bytes of a saved
checkpoint. Not verified: the published weights, their chat template, half precision.

Valley3 (audio, another architecture) is not supported.
"""

from .configuration import Valley25Config
from .modeling import ValleyQwen3ForCausalLM
from .processing import Valley25Processor

__all__ = ["Valley25Config", "Valley25Processor", "ValleyQwen3ForCausalLM"]
