"""Devices, disk and time."""
