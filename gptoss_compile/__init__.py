"""gptoss-compile: a compiler and a minimal serving runtime for OpenAI's GPT-OSS models."""

__version__ = "0.1.0"
