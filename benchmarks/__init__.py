"""fdshare's benchmarks: ``python -m benchmarks`` measures fdshare and its peers side by side in one run."""
