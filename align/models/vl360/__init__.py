"""360VL: Llama-3 with CLIP and two C-Abstractors, 8B and 70B.

Repository: github.com/360CVGroup/360VL (Apache-2.0); the abstractor is Honeybee's (arXiv 2312.06742). Checkpoints:
qihoo360/360VL-8B and 360VL-70B, `architectures: ["QH360_VL_LlamaForCausalLM"]`. Licence of the weights: Apache-2.0, and
the Llama 3 licence below it.

CLIP was never trained by the authors; `dpo.freeze: [vision]` keeps it so.

Verified: the tiny golden of the authors' own code with two projectors (pixels, ids, logits, greedy tokens), names and
bytes of a round trip, three DPO steps against TRL, and under ZeRO-3; the tensors and bytes of the full-size shapes. The
plan with one projection per crop, and single pictures, are held against the published formulas written a second time.
The published weights were not available: depth and number of queries are those that config.json says; that their sum is
the 16.82 GB of 360VL-8B speaks for a depth of 3, two linears and 1,024 channels.
"""

from .configuration import QH360VLConfig
from .modeling import QH360_VL_LlamaForCausalLM
from .processing import QH360VLProcessor

__all__ = ["QH360VLConfig", "QH360VLProcessor", "QH360_VL_LlamaForCausalLM"]
