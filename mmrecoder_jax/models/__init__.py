"""Qwen2.5-VL: configuration, processor, tokenizer, flax modules, sharding rules, weights in and
out.
"""
