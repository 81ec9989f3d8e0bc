"""Planner, simulator and workloads: pure arithmetic."""
