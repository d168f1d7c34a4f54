"""Requests in, answers of OpenAI-compatible servers (vLLM, SGLang, transformers serve) out."""
