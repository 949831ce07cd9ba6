-- For wrk: what tests/test_hot_restart.py wants to know, as one line.
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    "load requests=%d connect=%d read=%d write=%d status=%d timeout=%d slowest_us=%d\n",
    summary.requests, errors.connect, errors.read, errors.write, errors.status, errors.timeout, latency.max))
end
