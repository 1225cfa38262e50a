"""Generated gRPC messages of a cell. `cell.proto` is the source; a test regenerates them and compares."""

MESSAGE_BYTES = 128 << 20
"""Largest message, on both ends: three texts of 16 MB and 16 MB of figures, and room."""
