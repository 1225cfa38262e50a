"""Generated gRPC messages of a cell. `cell.proto` is the source; a test regenerates them and compares."""
