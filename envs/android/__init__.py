"""Phones: `coso/Android-v0`, the drivers through which it acts, the embedded phone, task sets and evaluators."""
