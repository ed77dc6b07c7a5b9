"""Blockyard: LLM serving on Kubernetes in which all KV caches of a service form one paged pool."""

__version__ = "0.1.0"
