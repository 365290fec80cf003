"""Requests that share a batch: slots, planning, workers."""
