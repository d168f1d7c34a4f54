"""vLLM knows our families: a plugin that it finds by the entry point `vllm.general_plugins` when it starts.

Checkpoint folders in, vLLM models out: the towers, projectors, tiles and processors of `align.models`, vLLM's own text
models. Nothing is computed here. May import `align.models` and, where it is installed, vLLM; importing this module
alone needs neither vLLM nor a GPU.
"""

ARCHITECTURES = {
    "ValleyQwen2ForCausalLM": "align.engines.vllm.valley_eagle:ValleyEagle",
    "LlavaQwenForCausalLM": "align.engines.vllm.llava_lmms:LlavaLmms",
    "ValleyQwen3ForCausalLM": "align.engines.vllm.valley25:Valley25",
    "QH360_VL_LlamaForCausalLM": "align.engines.vllm.vl360:VL360",
    "ValleyLlamaForCausalLM": "align.engines.vllm.valley1:ValleyLlama",
    "LlavaLlamaForCausalLM": "align.engines.vllm.valley1:ValleyLlama",
}
"""Names in config.json and the classes that vLLM opens them with."""


def register() -> None:
    """Makes vLLM know our families; it calls this in each of its processes, in some more than once."""
    from vllm import ModelRegistry

    from align.engines.vllm.configs import register_configs

    register_configs()
    for architecture, path in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, path)
