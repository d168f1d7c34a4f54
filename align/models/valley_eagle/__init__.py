"""Valley-Eagle-7B, Valley2-DPO and their kin (ByteDance): `architectures: ["ValleyQwen2ForCausalLM"]`."""

from align.models.valley_eagle.configuration import ValleyEagleConfig
from align.models.valley_eagle.modeling import ValleyQwen2ForCausalLM
from align.models.valley_eagle.processing import ValleyProcessor

__all__ = ["ValleyEagleConfig", "ValleyProcessor", "ValleyQwen2ForCausalLM"]
