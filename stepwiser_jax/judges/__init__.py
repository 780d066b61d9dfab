"""Judges of chunks, one file or folder per kind: prompt, judge, verdict. `load` makes them, and
`writer` asks their models."""
