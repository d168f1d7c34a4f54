"""Valley 1 and Chinese-Valley: Llama with CLIP, for videos and pictures (arXiv 2306.07207).

Repository: github.com/RupertLuo/Valley (Apache-2.0). Checkpoints: luoruipu1/Valley2-7b and Valley2-7b-pretrain (the "2"
is Llama 2's, it is not ByteDance's Valley2), luoruipu1/valley-13b-v1-delta (to be added to LLaMA-13B, see
`align.models.delta`), both
`architectures: ["ValleyLlamaForCausalLM"]`; Zhaoziwang/chinese_valley13b_v1,
`["LlavaLlamaForCausalLM"]` with a Chinese-CLIP
tower. Licences of the weights: research only, and the terms of LLaMA, Vicuna or Llama 2 below them; the training data
are CC BY-NC 4.0.

CLIP was never trained by the authors; `dpo.freeze: [vision]` keeps it so.

Verified: the tiny golden of the authors' own code with mean pooling (pixels, ids, logits, greedy tokens, loss), from a
real video file too; ids against the slow LlamaTokenizer of transformers 4.28, which the original used; names and bytes
of a round trip; three DPO steps against TRL, and under ZeRO-3; the tensors of the full-size shapes. Importance and
delta pooling are held against the published formulas written a second time, not against recorded outputs. The published
weights themselves were not available, Chinese-Valley's not even as a golden:
its names follow from the same code with the other tower.
"""

from .configuration import ChineseValleyConfig, ValleyLlamaConfig
from .modeling import LlavaLlamaForCausalLM, ValleyLlamaForCausalLM
from .processing import ValleyLlamaProcessor

__all__ = [
    "ChineseValleyConfig",
    "LlavaLlamaForCausalLM",
    "ValleyLlamaConfig",
    "ValleyLlamaForCausalLM",
    "ValleyLlamaProcessor",
]
