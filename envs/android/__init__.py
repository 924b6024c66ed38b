"""Phones: `coso/Android-v0`, its drivers, the embedded phone, task sets and evaluators."""
